"""Pure functions that read like the papers: no modules, no configuration."""

from bonn_plugin.functional.binarize import (
    Ste,
    binarize_activation,
    binarize_weight,
    keep_positive_,
    scale_backward,
    scale_forward,
    sign,
    sign_weight,
)
from bonn_plugin.functional.convolution import convolve_signs
from bonn_plugin.functional.distillation import distillation_loss
from bonn_plugin.functional.grouping import (
    group_count,
    group_filters,
    group_mean,
    merge_filters,
    pruning_loss,
    sensitivity_keeps,
)
from bonn_plugin.functional.integer import affine_of, pack_int4, quantize_affine, sum_dtype, unpack_int4
from bonn_plugin.functional.losses import feature_loss, kernel_loss, update_centers
from bonn_plugin.functional.packing import pack_signs, unpack_signs

__all__ = [
    "Ste",
    "affine_of",
    "binarize_activation",
    "binarize_weight",
    "convolve_signs",
    "distillation_loss",
    "feature_loss",
    "group_count",
    "group_filters",
    "group_mean",
    "keep_positive_",
    "kernel_loss",
    "merge_filters",
    "pack_int4",
    "pack_signs",
    "pruning_loss",
    "quantize_affine",
    "scale_backward",
    "scale_forward",
    "sensitivity_keeps",
    "sign",
    "sign_weight",
    "sum_dtype",
    "unpack_int4",
    "unpack_signs",
    "update_centers",
]
