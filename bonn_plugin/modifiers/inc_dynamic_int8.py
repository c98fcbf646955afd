"""``inc_dynamic_int8``: what stays real computes in 8 bits, scaled at run time (neural-compressor's dynamic PT2E)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from bonn_plugin.errors import ModelError
from bonn_plugin.modifiers.base import ConvertContext, PrepareContext, register_modifier
from bonn_plugin.modifiers.integer_layers import empty_layer, put
from bonn_plugin.modifiers.rest import RestConfig, RestModifier
from bonn_plugin.passes import look, quantize_dynamic


class IncDynamicInt8Config(RestConfig):
    """Settings of ``inc_dynamic_int8``: those of ``RestConfig``."""

    type: Literal["inc_dynamic_int8"] = "inc_dynamic_int8"


@register_modifier("inc_dynamic_int8", IncDynamicInt8Config)
class IncDynamicInt8(RestModifier[IncDynamicInt8Config]):
    """Replaces layers by ``IntegerConv2d`` and ``IntegerLinear`` whose input's scale is chosen at run time.

    It covers the range of the whole batch, so that an image's logits depend on the others of its batch.
    """

    _example: torch.Tensor | None = None

    def prepare(self, model: nn.Module, context: PrepareContext) -> None:
        """Choose the layers, and keep an example of the input; see ``Modifier.prepare``."""
        super().prepare(model, context)
        self._example = context.example_input

    def convert(self, model: nn.Module, context: ConvertContext) -> None:
        """Replace the layers; see ``Modifier.convert``."""
        layers = self.layers(model)
        example = self._example if context.forecast is None else context.forecast
        if example is None:
            raise ModelError(f"{self.config.type} needs to run the network once: pass example_inputs to prepare")
        parameter = next(model.parameters())
        for name, seen in look(model, self.names, example.to(parameter)).items():
            norm = None if seen.norm is None else model.get_submodule(seen.norm)
            layer = empty_layer(layers[name], norm, dynamic=True)
            if context.forecast is None:
                made = quantize_dynamic(name, layers[name], norm, seen.input)
                layer.fill(made.weight, made.weight_scale, made.bias, None, None)
            put(model, name, layer, seen.norm)
