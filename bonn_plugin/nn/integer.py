"""Layers with 8-bit weights and activations, as neural-compressor's static and dynamic passes leave them.

The integers and scales are that framework's; the arithmetic is plain torch, so that a checkpoint needs nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from bonn_plugin.functional import affine_of, quantize_affine, sum_dtype
from bonn_plugin.nn.geometry import ConvAttributes, ConvGeometry
from bonn_plugin.nn.operations import Macs
from bonn_plugin.nn.storage import Role, StoredTensor, register_replacement


class _Integer(nn.Module):
    """s_x s_w[c] * sum (q - z) w[c] + bias[c], with the sum of integers exact.

    Buffers: ``weight`` int8, first axis C_out; ``weight_scale`` float32 (C_out,), s_w; ``bias`` float32 (C_out,)
    or None; ``input_scale`` float32 (), s_x, and ``input_zero_point`` uint8 (), z, both None where they are chosen at
    run time from the whole batch, so that an image's result depends on the others of its batch.

    Args:
        shape: of the weight.
        bias: whether there is a bias.
        dynamic: whether scale and zero point of the input are chosen at run time.
        bias_stands_for: float32 parameters of the original network that the bias is made of: its own, and the
            factor and shift of a norm that was folded in.
    """

    kind: str
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(self, shape: tuple[int, ...], *, bias: bool, dynamic: bool, bias_stands_for: int) -> None:
        super().__init__()
        if bias_stands_for < 0 or (bias_stands_for and not bias):
            raise ValueError(f"a bias can't stand for {bias_stands_for} parameters")
        self.dynamic = dynamic
        self.bias_stands_for = bias_stands_for
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(shape[0]))
        self.register_buffer("bias", torch.zeros(shape[0]) if bias else None)
        self.register_buffer("input_scale", None if dynamic else torch.ones(()))
        self.register_buffer("input_zero_point", None if dynamic else torch.zeros((), dtype=torch.uint8))

    def fill(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        input_scale: Tensor | None,
        input_zero_point: Tensor | None,
    ) -> Self:
        """Take over the tensors, of the shapes and dtypes above, and return the layer itself."""
        given = {
            "weight": weight,
            "weight_scale": weight_scale,
            "bias": bias,
            "input_scale": input_scale,
            "input_zero_point": input_zero_point,
        }
        for name, tensor in given.items():
            own = getattr(self, name)
            if (own is None) != (tensor is None):
                raise ValueError(f"{name} is {'missing' if tensor is None else 'one too many'}")
            if own is not None and tensor is not None:
                if own.shape != tensor.shape or own.dtype != tensor.dtype:
                    raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {own.dtype} {own.shape}")
                setattr(self, name, tensor.detach().clone().contiguous())
        return self

    def _integers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return q - z of the input in a dtype in which the sums are exact, and the scale s_x."""
        if self.input_scale is None or self.input_zero_point is None:
            scale, zero_point = affine_of(x)
        else:
            scale, zero_point = self.input_scale, self.input_zero_point
        terms = math.prod(self.weight.shape[1:])
        return quantize_affine(x, scale, zero_point).to(sum_dtype(terms)), scale

    def _real(self, sums: Tensor, input_scale: Tensor, trailing: int) -> Tensor:
        ones = (1,) * trailing
        y = sums.float() * (self.weight_scale * input_scale).reshape(-1, *ones)
        return y if self.bias is None else y + self.bias.reshape(-1, *ones)

    def dense_weight(self) -> Tensor:
        """Return the weight as float32, in its shape."""
        return self.weight.float() * self.weight_scale.reshape(-1, *(1,) * (self.weight.dim() - 1))

    def stored_tensors(self) -> Mapping[str, StoredTensor]:
        """Declare the integers and what turns them into numbers."""
        own = {
            "weight": StoredTensor.real(self.weight, Role.INTEGER_WEIGHT),
            "weight_scale": StoredTensor.real(self.weight_scale, Role.SCALE, added=True),
        }
        if self.bias is not None:
            n = self.bias.numel()
            own["bias"] = StoredTensor(self.bias, Role.REAL_WEIGHT, n, 32, self.bias_stands_for)
        if self.input_scale is not None and self.input_zero_point is not None:
            own["input_scale"] = StoredTensor.real(self.input_scale, Role.SCALE, added=True)
            own["input_zero_point"] = StoredTensor.real(self.input_zero_point, Role.SCALE, added=True)
        return own

    def macs(self, output: Tensor) -> Macs:
        """Count its multiply-accumulates for an ``output`` (B, ...) as real ones."""
        return Macs(real=output[0].numel() * math.prod(self.weight.shape[1:]))

    def _settings(self) -> dict[str, Any]:
        return {
            "bias": self.bias is not None,
            "dynamic": self.dynamic,
            "bias_stands_for": self.bias_stands_for,
        }


def _settings_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    stands = spec.get("bias_stands_for", 0)
    if type(stands) is not int:
        raise ValueError(f"{stands!r} is not a number of parameters")
    return {"bias": bool(spec.get("bias")), "dynamic": bool(spec.get("dynamic")), "bias_stands_for": stands}


@register_replacement("integer_conv2d")
class IntegerConv2d(ConvAttributes, _Integer):
    """A convolution in 8 bits; see the base class. Padded positions are 0, which is the integer z.

    Args:
        geometry: the convolution's shape.
        bias: whether there is a bias.
        dynamic: whether scale and zero point of the input are chosen at run time.
        bias_stands_for: float32 parameters of the original network that the bias is made of.
    """

    def __init__(self, geometry: ConvGeometry, *, bias: bool, dynamic: bool = False, bias_stands_for: int = 0) -> None:
        super().__init__(geometry.weight_shape, bias=bias, dynamic=dynamic, bias_stands_for=bias_stands_for)
        self.geometry = geometry

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C_in, H, W) to (B, C_out, H', W'), float32."""
        with torch.autocast(x.device.type, enabled=False):
            integers, scale = self._integers(x)
            return self._real(self.geometry.convolve(integers, self.weight.to(integers.dtype)), scale, 2)

    def spec(self) -> dict[str, Any]:
        """Return the JSON-ready arguments of ``from_spec``."""
        return {**self.geometry.to_dict(), **self._settings()}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> IntegerConv2d:
        """Build the layer with empty tensors. Raises ValueError on a spec that makes no sense."""
        return cls(ConvGeometry.from_dict(spec), **_settings_of(spec))

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        return f"{self.geometry}, bias={self.bias is not None}, dynamic={self.dynamic}"


@register_replacement("integer_linear")
class IntegerLinear(_Integer):
    """A linear layer in 8 bits; see the base class.

    Args:
        in_features: size of an input.
        out_features: size of an output.
        bias: whether there is a bias.
        dynamic: whether scale and zero point of the input are chosen at run time.
        bias_stands_for: float32 parameters of the original network that the bias is made of.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, dynamic: bool = False, bias_stands_for: int = 0
    ) -> None:
        super().__init__((out_features, in_features), bias=bias, dynamic=dynamic, bias_stands_for=bias_stands_for)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features), float32."""
        with torch.autocast(x.device.type, enabled=False):
            integers, scale = self._integers(x)
            return self._real(nn.functional.linear(integers, self.weight.to(integers.dtype)), scale, 0)

    def spec(self) -> dict[str, Any]:
        """Return the JSON-ready arguments of ``from_spec``."""
        out_features, in_features = self.weight.shape
        return {"in_features": in_features, "out_features": out_features, **self._settings()}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> IntegerLinear:
        """Build the layer with empty tensors. Raises ValueError on a spec that makes no sense."""
        return cls(*linear_sizes(spec), **_settings_of(spec))

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, bias={self.bias is not None}, dynamic={self.dynamic}"


def linear_sizes(spec: Mapping[str, Any]) -> tuple[int, int]:
    """Return in_features and out_features of a spec. Raises ValueError where they are no sizes."""
    sizes = (spec.get("in_features"), spec.get("out_features"))
    if any(type(n) is not int or n < 1 for n in sizes):
        raise ValueError(f"{sizes} are not the sizes of a linear layer")
    return int(str(sizes[0])), int(str(sizes[1]))


__all__ = ["IntegerConv2d", "IntegerLinear", "linear_sizes"]
