"""The convolution of a compressed checkpoint: its weights stay packed, one bit each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bonn_plugin.functional import pack_signs, sign, unpack_signs
from bonn_plugin.nn.geometry import ConvGeometry
from bonn_plugin.nn.operations import Macs
from bonn_plugin.nn.storage import Role, StoredTensor, register_replacement


@torch.library.custom_op("bonn::binary_conv2d", mutates_args=())
def binary_conv2d(
    x: Tensor,
    weight_packed: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Convolve signs with packed signs.

    Args:
        x: ±1, (B, C_in, H, W), floating point.
        weight_packed: uint8, (filters, ceil(n / 8)), see ``pack_signs``.
        weight_shape: (filters, C_in / groups, kh, kw).
        stride: (height, width), as are ``padding`` (with zeros) and ``dilation``.
        groups: groups of the convolution.

    Returns:
        (B, filters, H', W') in the dtype of ``x``; whole numbers.
    """
    weight = unpack_signs(weight_packed, weight_shape, x.dtype)
    return torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation, groups)


@binary_conv2d.register_fake
def _(
    x: Tensor,
    weight_packed: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    weight = x.new_empty(weight_shape)
    return torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation, groups)


@register_replacement("packed_conv2d")
class PackedConv2d(nn.Module):
    """w̄ * conv(sign(x - t), sign(X)) + bias from one bit a weight.

    Exact, and no faster than a full-precision convolution: the signs are unpacked at each call. It
    is there for evaluation and as the source of an export.

    Args:
        geometry: the convolution's shape.
        threshold: whether there is a threshold t per input channel.
        bias: whether there is a bias.
    """

    binarizes_input = True
    kind: str

    weight_packed: Tensor
    weight_scale: Tensor
    threshold: Tensor | None
    bias: Tensor | None

    def __init__(self, geometry: ConvGeometry, *, threshold: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.geometry = geometry
        shape = geometry.weight_shape
        n = shape[1] * shape[2] * shape[3]
        self.register_buffer("weight_packed", torch.zeros(shape[0], -(-n // 8), dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.ones(()))
        self.register_buffer("threshold", torch.zeros(geometry.in_channels) if threshold else None)
        self.register_buffer("bias", torch.zeros(geometry.out_channels) if bias else None)

    @classmethod
    def from_dense(
        cls, geometry: ConvGeometry, weight: Tensor, scale: Tensor, threshold: Tensor | None, bias: Tensor | None
    ) -> PackedConv2d:
        """Pack the signs of ``weight``, (C_out, C_in / groups, kh, kw); ``scale`` is w̄, a scalar."""
        packed = cls(geometry, threshold=threshold is not None, bias=bias is not None)
        packed.weight_packed = pack_signs(weight)
        packed.weight_scale = scale
        packed.threshold = threshold
        packed.bias = bias
        return packed

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C_in, H, W) to (B, C_out, H', W')."""
        if self.threshold is not None:
            x = x - self.threshold.to(x.dtype)[:, None, None]
        g = self.geometry
        y: Tensor = binary_conv2d(
            sign(x),
            self.weight_packed,
            list(g.weight_shape),
            list(g.stride),
            list(g.padding),
            list(g.dilation),
            g.groups,
        )
        y = (y.to(self.weight_scale.dtype) * self.weight_scale).to(y.dtype)
        if self.bias is not None:
            y = y + self.bias[:, None, None]
        return y

    def dense_weight(self) -> Tensor:
        """Return X̂ = w̄ sign(X), (C_out, C_in / groups, kh, kw), float32."""
        return unpack_signs(self.weight_packed, self.geometry.weight_shape) * self.weight_scale

    def stored_tensors(self) -> Mapping[str, StoredTensor]:
        """Declare the packed signs, the scale, and threshold and bias where there are any."""
        c_out, *rest = self.geometry.weight_shape
        weights = c_out * rest[0] * rest[1] * rest[2]
        own = {
            "weight_packed": StoredTensor(self.weight_packed, Role.BINARY_WEIGHT, weights, 1, weights),
            "weight_scale": StoredTensor.real(self.weight_scale, Role.SCALE, added=True),
        }
        if self.threshold is not None:
            own["threshold"] = StoredTensor.real(self.threshold, Role.THRESHOLD, added=True)
        if self.bias is not None:
            own["bias"] = StoredTensor.real(self.bias, Role.REAL_WEIGHT)
        return own

    def macs(self, output: Tensor) -> Macs:
        """Count its multiply-accumulates for an ``output`` (B, C_out, H, W): all of them binary."""
        return Macs(binary=output[0].numel() * math.prod(self.geometry.weight_shape[1:]))

    def spec(self) -> dict[str, Any]:
        """Return the JSON-ready arguments of ``from_spec``."""
        return {
            **self.geometry.to_dict(),
            "threshold": self.threshold is not None,
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> PackedConv2d:
        """Build the layer with empty tensors. Raises ValueError on a spec that makes no sense."""
        return cls(ConvGeometry.from_dict(spec), threshold=bool(spec.get("threshold")), bias=bool(spec.get("bias")))

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        g = self.geometry
        return (
            f"{g.in_channels}, {g.out_channels}, kernel_size={g.kernel_size}, stride={g.stride}, "
            f"padding={g.padding}, groups={g.groups}, threshold={self.threshold is not None}"
        )
