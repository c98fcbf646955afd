"""Layers whose weights are stored in 16 bits, as neural-compressor's mixed precision leaves them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bonn_plugin.nn.geometry import ConvAttributes, ConvGeometry
from bonn_plugin.nn.integer import linear_sizes
from bonn_plugin.nn.operations import Macs
from bonn_plugin.nn.storage import Role, StoredTensor, register_replacement

HALVES: Mapping[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}
"""The 16-bit formats by name."""


class _Half(nn.Module):
    """Buffers ``weight`` and ``bias`` in 16 bits; the arithmetic is float32.

    Args:
        shape: of the weight, first axis C_out.
        dtype: a key of ``HALVES``.
        bias: whether there is a bias, (C_out,).

    Raises:
        ValueError: ``dtype`` is none of these.
    """

    kind: str
    weight: Tensor
    bias: Tensor | None

    def __init__(self, shape: tuple[int, ...], dtype: str, bias: bool) -> None:
        super().__init__()
        if dtype not in HALVES:
            raise ValueError(f"{dtype!r} is none of {', '.join(HALVES)}")
        self.dtype = dtype
        self.register_buffer("weight", torch.zeros(shape, dtype=HALVES[dtype]))
        self.register_buffer("bias", torch.zeros(shape[0], dtype=HALVES[dtype]) if bias else None)

    def dense_weight(self) -> Tensor:
        """Return the weight as float32, in its shape."""
        return self.weight.float()

    def _dense_bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias.float()

    def stored_tensors(self) -> Mapping[str, StoredTensor]:
        """Declare the weight, and the bias if there is one."""
        own = {"weight": StoredTensor.real(self.weight, Role.REAL_WEIGHT)}
        if self.bias is not None:
            own["bias"] = StoredTensor.real(self.bias, Role.REAL_WEIGHT)
        return own

    def macs(self, output: Tensor) -> Macs:
        """Count its multiply-accumulates for an ``output`` (B, ...)."""
        return Macs(real=output[0].numel() * math.prod(self.weight.shape[1:]))


@register_replacement("half_conv2d")
class HalfConv2d(ConvAttributes, _Half):
    """A convolution with weights of 16 bits; see the base class."""

    def __init__(self, geometry: ConvGeometry, dtype: str, *, bias: bool) -> None:
        super().__init__(geometry.weight_shape, dtype, bias)
        self.geometry = geometry

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C_in, H, W) to (B, C_out, H', W'), float32."""
        with torch.autocast(x.device.type, enabled=False):
            y = self.geometry.convolve(x.float(), self.dense_weight())
            bias = self._dense_bias()
            return y if bias is None else y + bias[:, None, None]

    def spec(self) -> dict[str, Any]:
        """Return the JSON-ready arguments of ``from_spec``."""
        return {**self.geometry.to_dict(), "dtype": self.dtype, "bias": self.bias is not None}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> HalfConv2d:
        """Build the layer with empty tensors. Raises ValueError on a spec that makes no sense."""
        return cls(ConvGeometry.from_dict(spec), str(spec.get("dtype")), bias=bool(spec.get("bias")))


@register_replacement("half_linear")
class HalfLinear(_Half):
    """A linear layer with weights of 16 bits; see the base class."""

    def __init__(self, in_features: int, out_features: int, dtype: str, *, bias: bool) -> None:
        super().__init__((out_features, in_features), dtype, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features), float32."""
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.float(), self.dense_weight(), self._dense_bias())

    def spec(self) -> dict[str, Any]:
        """Return the JSON-ready arguments of ``from_spec``."""
        out_features, in_features = self.weight.shape
        sizes = {"in_features": in_features, "out_features": out_features}
        return {**sizes, "dtype": self.dtype, "bias": self.bias is not None}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> HalfLinear:
        """Build the layer with empty tensors. Raises ValueError on a spec that makes no sense."""
        return cls(*linear_sizes(spec), str(spec.get("dtype")), bias=bool(spec.get("bias")))


__all__ = ["HALVES", "HalfConv2d", "HalfLinear"]
