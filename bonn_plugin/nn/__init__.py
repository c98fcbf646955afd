"""Modules: the training convolution, the packed one, what passes leave of real layers, and what each of them stores."""

from bonn_plugin.nn.binary_conv import BinaryConv2d
from bonn_plugin.nn.folded import FoldedNorm
from bonn_plugin.nn.geometry import ConvGeometry
from bonn_plugin.nn.half import HalfConv2d, HalfLinear
from bonn_plugin.nn.integer import IntegerConv2d, IntegerLinear
from bonn_plugin.nn.merge import FilterMerge
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

__all__ = [
    "BimodalPrior",
    "BinaryConv2d",
    "ConvGeometry",
    "FilterMerge",
    "Filters",
    "FoldedNorm",
    "HalfConv2d",
    "HalfLinear",
    "IntegerConv2d",
    "IntegerLinear",
    "Merging",
    "PackedConv2d",
    "RPReLU",
    "Replacement",
    "Role",
    "SignConv2d",
    "SignInput",
    "SparseConv2d",
    "SparseLinear",
    "StoredSignConv2d",
    "StoredTensor",
    "WeightOnlyLinear",
    "register_replacement",
    "replace_module",
    "replacement_class",
    "stored_tensors",
]
