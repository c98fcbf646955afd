"""Weight-only integers: neural-compressor's round-to-nearest pass on one linear layer."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bonn_plugin.errors import ModelError
from bonn_plugin.passes.host import hosted, quantization


@dataclass(frozen=True)
class WeightOnly:
    """What the pass made of a linear layer.

    Attributes:
        integers: int8 (out, in), from -8 to 7 with 4 bits.
        scale: float16 (out, groups).
        bias: float16 (out,), None where there is none.
    """

    integers: Tensor
    scale: Tensor
    bias: Tensor | None


@torch.no_grad()
def round_to_nearest(name: str, layer: nn.Linear, bits: int, group_size: int) -> WeightOnly:
    """Quantise the weight of a linear layer, symmetric about 0, with a scale for each group of a row.

    Args:
        name: the layer's name, for messages.
        layer: left as it is.
        bits: 4 or 8.
        group_size: weights that share a scale; at most the size of a row.

    Raises:
        ModelError: the framework is missing or fails.
    """
    with hosted(f"{name}: weight-only int{bits}"):
        api = quantization()
        config = api.RTNConfig(bits=bits, group_size=group_size, use_sym=True, use_layer_wise=False)
        alone = nn.Sequential(copy.deepcopy(layer))
        made: Any = api.convert(api.prepare(alone, config))[0]
        if not hasattr(made, "unpack"):
            raise ModelError(f"{name}: neural-compressor left the layer in float32")
        parts = made.unpack()
        integers = parts["int_weight"].to(torch.int16)
        if parts.get("zp") is not None:
            groups = torch.arange(layer.in_features) // group_size
            integers = integers - parts["zp"].to(torch.int16)[:, groups]
        scale, bias = parts["scales"], made.bias if layer.bias is not None else None
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    if bool((integers < low).any()) or bool((integers > high).any()):
        raise ModelError(f"{name}: neural-compressor gives integers beyond {bits} bits")
    bias = None if bias is None else bias.detach().to(torch.float16)
    if not bool(torch.isfinite(scale).all()) or (bias is not None and not bool(torch.isfinite(bias).all())):
        raise ModelError(f"{name} has values beyond float16, in which neural-compressor keeps scales and biases")
    return WeightOnly(integers.to(torch.int8), scale.detach().to(torch.float16), bias)


__all__ = ["WeightOnly", "round_to_nearest"]
