"""Modules: the training convolution, the packed one, what passes leave of real layers, and what each of them stores."""

from bonn_plugin.nn.bases_conv import PackedBasesConv2d
from bonn_plugin.nn.binary_conv import BinaryConv2d
from bonn_plugin.nn.folded import FoldedNorm
from bonn_plugin.nn.geometry import ConvGeometry
from bonn_plugin.nn.half import HalfConv2d, HalfLinear
from bonn_plugin.nn.input_code import BitsInput, InputCode, RealInput, ShiftedSigns, TernaryInput
from bonn_plugin.nn.integer import IntegerConv2d, IntegerLinear
from bonn_plugin.nn.merge import FilterMerge
from bonn_plugin.nn.method_conv import MethodConv2d, ProjectionConv2d
from bonn_plugin.nn.packed_conv import PackedConv2d
from bonn_plugin.nn.prior import BimodalPrior
from bonn_plugin.nn.rprelu import RPReLU
from bonn_plugin.nn.sign_conv import SignConv2d, StoredSignConv2d
from bonn_plugin.nn.sign_input import SignInput
from bonn_plugin.nn.sparse import SparseConv2d, SparseLinear
from bonn_plugin.nn.storage import (
    Filters,
    Merging,
    Replacement,
    Role,
    StoredTensor,
    register_replacement,
    replace_module,
    replacement_class,
    stored_tensors,
)
from bonn_plugin.nn.weight_only import WeightOnlyLinear

BINARISED = (SignInput, PackedConv2d, PackedBasesConv2d, StoredSignConv2d)
"""Convolutions that ``binarize`` has taken, in training and as they are stored."""

__all__ = [
    "BINARISED",
    "BimodalPrior",
    "BinaryConv2d",
    "BitsInput",
    "ConvGeometry",
    "FilterMerge",
    "Filters",
    "FoldedNorm",
    "HalfConv2d",
    "HalfLinear",
    "InputCode",
    "IntegerConv2d",
    "IntegerLinear",
    "Merging",
    "MethodConv2d",
    "PackedBasesConv2d",
    "PackedConv2d",
    "ProjectionConv2d",
    "RPReLU",
    "RealInput",
    "Replacement",
    "Role",
    "ShiftedSigns",
    "SignConv2d",
    "SignInput",
    "SparseConv2d",
    "SparseLinear",
    "StoredSignConv2d",
    "StoredTensor",
    "TernaryInput",
    "WeightOnlyLinear",
    "register_replacement",
    "replace_module",
    "replacement_class",
    "stored_tensors",
]
