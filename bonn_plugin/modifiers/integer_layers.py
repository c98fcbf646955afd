"""From a real layer, and the norm folded into it, to the place of its 8-bit successor."""

from __future__ import annotations

from torch import nn

from bonn_plugin.nn import ConvGeometry, FoldedNorm, IntegerConv2d, IntegerLinear, replace_module
from bonn_plugin.nn.resize import note_unpruned, unpruned


def empty_layer(layer: nn.Module, norm: nn.Module | None, *, dynamic: bool = False) -> IntegerConv2d | IntegerLinear:
    """Return an 8-bit layer of the same shape, its tensors still to be filled.

    Args:
        layer: a convolution or a linear layer.
        norm: the batch norm that is folded in, None if none.
        dynamic: whether the scale of the input is chosen at run time.
    """
    bias = layer.bias is not None or norm is not None
    stands = _elements(layer, "bias") + (0 if norm is None else _elements(norm, "weight") + _elements(norm, "bias"))
    if isinstance(layer, nn.Conv2d):
        made: IntegerConv2d | IntegerLinear = IntegerConv2d(
            ConvGeometry.of(layer), bias=bias, dynamic=dynamic, bias_stands_for=stands
        )
    else:
        assert isinstance(layer, nn.Linear)
        made = IntegerLinear(layer.in_features, layer.out_features, bias=bias, dynamic=dynamic, bias_stands_for=stands)
    whole = unpruned(layer)
    if whole:  # what the bias stands for is said above
        note_unpruned(made, {"weight": whole["weight"]})
    return made.to(layer.weight.device)


def _elements(module: nn.Module, name: str) -> int:
    """Return how many elements a parameter has in the whole network, 0 if there is none."""
    parameter = getattr(module, name)
    return 0 if parameter is None else unpruned(module).get(name, int(parameter.numel()))


def put(model: nn.Module, name: str, layer: nn.Module, norm: str | None) -> None:
    """Put ``layer`` in the place ``name``, and nothing in the place of the norm that it took in."""
    device = next(model.get_submodule(name).parameters()).device
    replace_module(model, name, layer.to(device))
    if norm is not None:
        replace_module(model, norm, FoldedNorm())


__all__ = ["empty_layer", "put"]
