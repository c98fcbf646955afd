"""The shape of a convolution, shared by the training and the packed layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ConvGeometry:
    """Arguments of a two-dimensional convolution with zero padding; pairs are (height, width)."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Self:
        """Read the geometry of a convolution.

        Raises:
            ValueError: the padding is not zeros, or not one number for both sides of each axis.
        """
        if conv.padding_mode != "zeros":
            raise ValueError(f"padding mode {conv.padding_mode!r} is not supported: only zeros")
        kernel = _pair(conv.kernel_size)
        dilation = _pair(conv.dilation)
        if conv.padding == "valid":
            padding = (0, 0)
        elif conv.padding == "same":
            total = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
            if any(t % 2 for t in total):
                raise ValueError("padding 'same' with an even kernel pads one side more than the other")
            padding = (total[0] // 2, total[1] // 2)
        else:
            padding = _pair(conv.padding)
        return cls(conv.in_channels, conv.out_channels, kernel, _pair(conv.stride), padding, dilation, conv.groups)

    @classmethod
    def from_dict(cls, spec: Mapping[str, Any]) -> Self:
        """Rebuild from ``to_dict``.

        Raises:
            ValueError: a value is missing, unknown or out of range.
        """
        pairs = ("kernel_size", "stride", "padding", "dilation")
        try:
            kernel, stride, padding, dilation = (_pair(spec[name]) for name in pairs)
            channels, filters, groups = (int(spec[name]) for name in ("in_channels", "out_channels", "groups"))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the geometry of a convolution: {error}") from None
        geometry = cls(channels, filters, kernel, stride, padding, dilation, groups)
        positive = (
            geometry.in_channels,
            geometry.out_channels,
            geometry.groups,
            *geometry.kernel_size,
            *geometry.stride,
            *geometry.dilation,
        )
        if min(positive) < 1 or min(geometry.padding) < 0:
            raise ValueError("not the geometry of a convolution: a size is out of range")
        if geometry.in_channels % geometry.groups or geometry.out_channels % geometry.groups:
            raise ValueError("not the geometry of a convolution: groups do not divide the channels")
        return geometry

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, JSON-ready."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """(C_out, C_in / groups, kh, kw)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def __str__(self) -> str:
        """Return what ``print(model)`` shows of a convolution."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, groups={self.groups}"
        )

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve ``x`` (B, C_in, H, W) with ``weight``; padded positions are 0."""
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)


class ConvAttributes:
    """What a network's own code may read of a convolution, such as ``conv.kernel_size``."""

    geometry: ConvGeometry
    padding_mode = "zeros"
    transposed = False

    @property
    def in_channels(self) -> int:
        """C_in."""
        return self.geometry.in_channels

    @property
    def out_channels(self) -> int:
        """C_out."""
        return self.geometry.out_channels

    @property
    def kernel_size(self) -> tuple[int, int]:
        """(height, width), as are ``stride``, ``padding`` and ``dilation``."""
        return self.geometry.kernel_size

    @property
    def stride(self) -> tuple[int, int]:
        """Step between two outputs."""
        return self.geometry.stride

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros on both sides of each axis."""
        return self.geometry.padding

    @property
    def dilation(self) -> tuple[int, int]:
        """Spacing of the kernel's elements."""
        return self.geometry.dilation

    @property
    def groups(self) -> int:
        """Groups of the convolution."""
        return self.geometry.groups


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, (str, bytes)) or len(value) != 2:
        raise TypeError(f"{value!r} is not a pair")
    return int(value[0]), int(value[1])
