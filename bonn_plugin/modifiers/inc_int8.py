"""``inc_int8``: what stays real computes in 8 bits, scaled by training images (neural-compressor's static PT2E)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bonn_plugin.errors import ModelError
from bonn_plugin.modifiers.base import ConvertContext, register_modifier
from bonn_plugin.modifiers.integer_layers import empty_layer, put
from bonn_plugin.modifiers.rest import RestConfig, RestModifier, calibration_batches
from bonn_plugin.passes import Seen, StaticCalibration, look


class IncInt8Config(RestConfig):
    """Settings of ``inc_int8``.

    Attributes:
        calibration_batches: batches of training images by which the scales of the activations are chosen.
    """

    type: Literal["inc_int8"] = "inc_int8"
    calibration_batches: Annotated[int, Field(ge=1, le=10_000)] = 8


@register_modifier("inc_int8", IncInt8Config)
class IncInt8(RestModifier[IncInt8Config]):
    """Replaces layers by ``IntegerConv2d`` and ``IntegerLinear``; a norm right behind a convolution is folded in."""

    def convert(self, model: nn.Module, context: ConvertContext) -> None:
        """Calibrate and replace the layers; see ``Modifier.convert``."""
        layers = self.layers(model)
        if context.forecast is not None:
            for name, seen in look(model, self.names, context.forecast).items():
                put(model, name, empty_layer(layers[name], _norm(model, seen)), seen.norm)
            return
        batches = calibration_batches(context, self.config.type, self.config.calibration_batches, model)
        try:
            seen_by_name = look(model, self.names, batches[0])
        except RuntimeError as error:
            raise ModelError(
                f"{self.config.type}: the network does not take the calibration images: {error}"
            ) from error
        passes = {
            name: StaticCalibration(name, layers[name], _norm(model, seen), seen.input)
            for name, seen in seen_by_name.items()
        }
        _observe(model, passes, batches)
        for name, seen in seen_by_name.items():
            made = passes[name].finish()
            layer = empty_layer(layers[name], _norm(model, seen))
            layer.fill(made.weight, made.weight_scale, made.bias, made.input_scale, made.input_zero_point)
            put(model, name, layer, seen.norm)


def _norm(model: nn.Module, seen: Seen) -> nn.Module | None:
    return None if seen.norm is None else model.get_submodule(seen.norm)


@torch.no_grad()
def _observe(model: nn.Module, passes: Mapping[str, StaticCalibration], batches: list[Tensor]) -> None:
    def hook_for(calibrate: StaticCalibration) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            calibrate(args[0])

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_for(p)) for name, p in passes.items()]
    try:
        for images in batches:
            model(images)
    finally:
        for handle in handles:
            handle.remove()
