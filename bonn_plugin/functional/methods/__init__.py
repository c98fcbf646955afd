"""The ways to binarise that the papers compare with, one file each: what a layer computes and its gradients."""

from bonn_plugin.functional.methods.abc_net import abc_inputs, abc_weight, first_shifts
from bonn_plugin.functional.methods.bases import Bases
from bonn_plugin.functional.methods.bireal import bireal_weight
from bonn_plugin.functional.methods.bnn import bnn_weight, clip_weight_
from bonn_plugin.functional.methods.dorefa import dorefa_input, dorefa_weight
from bonn_plugin.functional.methods.pcnn import pcnn_weight, projection_loss
from bonn_plugin.functional.methods.reactnet import reactnet_weight
from bonn_plugin.functional.methods.tbn import ternarize_input
from bonn_plugin.functional.methods.xnor import xnor_input_scale, xnor_weight

__all__ = [
    "Bases",
    "abc_inputs",
    "abc_weight",
    "bireal_weight",
    "bnn_weight",
    "clip_weight_",
    "dorefa_input",
    "dorefa_weight",
    "first_shifts",
    "pcnn_weight",
    "projection_loss",
    "reactnet_weight",
    "ternarize_input",
    "xnor_input_scale",
    "xnor_weight",
]
