"""``inc_weight_only``: linear layers store integers (neural-compressor's round-to-nearest)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from bonn_plugin.functional import pack_int4
from bonn_plugin.modifiers.base import ConvertContext, register_modifier
from bonn_plugin.modifiers.rest import RestConfig, RestModifier
from bonn_plugin.nn import WeightOnlyLinear, replace_module
from bonn_plugin.passes import round_to_nearest


class IncWeightOnlyConfig(RestConfig):
    """Settings of ``inc_weight_only``.

    Attributes:
        bits: of a weight.
        group_size: weights of a row that share a scale; -1, and anything longer than a row, is the whole row.
    """

    type: Literal["inc_weight_only"] = "inc_weight_only"
    bits: Literal[8, 4] = 8
    group_size: Annotated[int, Field(ge=1)] | Literal[-1] = 32


@register_modifier("inc_weight_only", IncWeightOnlyConfig)
class IncWeightOnly(RestModifier[IncWeightOnlyConfig]):
    """Replaces linear layers by ``WeightOnlyLinear``: integer weights, arithmetic in float32."""

    takes = (nn.Linear,)

    def convert(self, model: nn.Module, context: ConvertContext) -> None:
        """Replace the layers; see ``Modifier.convert``."""
        config = self.config
        for name, layer in self.layers(model).items():
            assert isinstance(layer, nn.Linear)
            row = layer.in_features
            group_size = row if config.group_size == -1 else min(config.group_size, row)
            made = WeightOnlyLinear(
                row, layer.out_features, bits=config.bits, group_size=group_size, bias=layer.bias is not None
            )
            if context.forecast is None:
                found = round_to_nearest(name, layer, config.bits, group_size)
                made.weight = found.integers if config.bits == 8 else pack_int4(found.integers)
                made.weight_scale, made.bias = found.scale, found.bias
            replace_module(model, name, made.to(layer.weight.device))
