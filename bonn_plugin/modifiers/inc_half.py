"""``inc_half``: what stays real is stored in 16 bits (neural-compressor's mixed precision)."""

from __future__ import annotations

from typing import Literal

from torch import nn

from bonn_plugin.modifiers.base import ConvertContext, register_modifier
from bonn_plugin.modifiers.rest import RestConfig, RestModifier
from bonn_plugin.nn import ConvGeometry, HalfConv2d, HalfLinear, replace_module
from bonn_plugin.nn.half import HALVES
from bonn_plugin.passes import to_half


class IncHalfConfig(RestConfig):
    """Settings of ``inc_half``.

    Attributes:
        dtype: the 16-bit format.
    """

    type: Literal["inc_half"] = "inc_half"
    dtype: Literal["float16", "bfloat16"] = "float16"


@register_modifier("inc_half", IncHalfConfig)
class IncHalf(RestModifier[IncHalfConfig]):
    """Replaces layers by ``HalfConv2d`` and ``HalfLinear``: weights in 16 bits, arithmetic in float32."""

    def convert(self, model: nn.Module, context: ConvertContext) -> None:
        """Replace the layers; see ``Modifier.convert``."""
        for name, layer in self.layers(model).items():
            device = next(layer.parameters()).device
            bias = layer.bias is not None
            if isinstance(layer, nn.Conv2d):
                made: HalfConv2d | HalfLinear = HalfConv2d(ConvGeometry.of(layer), self.config.dtype, bias=bias)
            else:
                assert isinstance(layer, nn.Linear)
                made = HalfLinear(layer.in_features, layer.out_features, self.config.dtype, bias=bias)
            if context.forecast is None:
                made.weight, made.bias = to_half(name, layer, HALVES[self.config.dtype])
            replace_module(model, name, made.to(device))
