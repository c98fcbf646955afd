"""The convolution of a compressed checkpoint: its weights stay packed, one bit each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bonn_plugin.functional import pack_signs, sign, unpack_signs
from bonn_plugin.functional.methods import xnor_input_scale
from bonn_plugin.nn.geometry import ConvAttributes, ConvGeometry
from bonn_plugin.nn.operations import Macs
from bonn_plugin.nn.storage import Filters, Role, StoredTensor, register_replacement


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
class PackedConv2d(ConvAttributes, nn.Module):
    """w̄ * conv(sign(x - t), sign(X)) + bias from one bit a weight, equal filters stored and computed once.

    Exact, and no faster than a full-precision convolution: the signs are unpacked at each call. It
    is there for evaluation and as the source of an export.

    Buffers: ``weight_packed`` uint8 (unique, ceil(n / 8)), see ``pack_signs``; ``weight_scale`` w̄, a scalar, or
    (C_out,) where the method has a scale a filter.
    Where filters were merged, ``weight_index`` (C_out,) is the row of ``weight_packed`` that each output
    takes, in the smallest integer dtype that holds it; where some outputs take the opposite of a row,
    ``weight_sign`` uint8 (ceil(C_out / 8),) has a bit 1 for +1 and 0 for -1; where outputs are zeroed,
    ``weight_kept`` has in the same form a bit 0 for each of these. Filters of a grouped convolution are not
    merged: each of its groups needs a number of filters of its own.

    Args:
        geometry: the convolution's shape.
        threshold: whether there is a threshold t per input channel.
        bias: whether there is a bias.
        unique: filters that are stored, C_out if None.
        sign: whether there are output signs.
        kept: whether there are zeroed outputs.
        filter_scales: whether each filter has a scale of its own.
        input_scale: whether outputs are multiplied by the mean of |x - t| over their window (XNOR-Net, Eq. 11).

    Raises:
        ValueError: ``unique`` does not fit the geometry.
    """

    binarizes_input = True
    kind: str

    weight_packed: Tensor
    weight_scale: Tensor
    weight_index: Tensor | None
    weight_sign: Tensor | None
    weight_kept: Tensor | None
    threshold: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        geometry: ConvGeometry,
        *,
        threshold: bool = False,
        bias: bool = False,
        unique: int | None = None,
        sign: bool = False,
        kept: bool = False,
        filter_scales: bool = False,
        input_scale: bool = False,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.input_scale = input_scale
        shape = geometry.weight_shape
        unique = shape[0] if unique is None else unique
        if not 1 <= unique <= shape[0] or (geometry.groups > 1 and unique < shape[0]):
            raise ValueError(f"{unique} unique filters do not fit {shape[0]} outputs in {geometry.groups} groups")
        self.unique_filters = unique
        n = shape[1] * shape[2] * shape[3]
        outputs = -(-shape[0] // 8)
        index = torch.zeros(shape[0], dtype=index_dtype(unique)) if unique < shape[0] else None
        self.register_buffer("weight_packed", torch.zeros(unique, -(-n // 8), dtype=torch.uint8))
        self.register_buffer("weight_index", index)
        self.register_buffer("weight_sign", torch.zeros(outputs, dtype=torch.uint8) if sign else None)
        self.register_buffer("weight_kept", torch.zeros(outputs, dtype=torch.uint8) if kept else None)
        self.register_buffer("weight_scale", torch.ones(shape[0] if filter_scales else ()))
        self.register_buffer("threshold", torch.zeros(geometry.in_channels) if threshold else None)
        self.register_buffer("bias", torch.zeros(geometry.out_channels) if bias else None)

    @classmethod
    def from_dense(
        cls,
        geometry: ConvGeometry,
        weight: Tensor,
        scale: Tensor,
        threshold: Tensor | None,
        bias: Tensor | None,
        kept: Tensor | None = None,
        *,
        input_scale: bool = False,
    ) -> PackedConv2d:
        """Pack the signs of ``weight``; filters whose signs are all equal, or all opposite, are stored once.

        Args:
            geometry: the convolution's shape.
            weight: (C_out, C_in / groups, kh, kw).
            scale: w̄, a scalar, or (C_out,).
            threshold: (C_in,).
            bias: (C_out,).
            kept: bool (C_out,), the outputs that are not zeroed; None for all.
            input_scale: see the class.
        """
        if kept is not None and bool(kept.all()):
            kept = None
        rows, index, signs = unique_filters(weight, kept)
        if geometry.groups > 1:
            rows, index, signs = torch.arange(len(weight)), None, None
        packed = cls(
            geometry,
            threshold=threshold is not None,
            bias=bias is not None,
            unique=len(rows),
            sign=signs is not None,
            kept=kept is not None,
            filter_scales=scale.dim() > 0,
            input_scale=input_scale,
        )
        packed.weight_packed = pack_signs(weight[rows.to(weight.device)])
        packed.weight_scale = scale
        packed.weight_index = None if index is None else index.to(weight.device, index_dtype(len(rows)))
        packed.weight_sign = None if signs is None else pack_signs(signs.to(weight.device)[None])[0]
        packed.weight_kept = None if kept is None else pack_signs(kept.to(weight)[None] - 0.5)[0]
        packed.threshold = threshold
        packed.bias = bias
        return packed

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C_in, H, W) to (B, C_out, H', W'); one image, (C_in, H, W), as ``nn.Conv2d`` does."""
        if x.dim() == 3:
            return self.forward(x[None])[0]
        if self.threshold is not None:
            x = x - self.threshold.to(x.dtype)[:, None, None]
        g = self.geometry
        y: Tensor = binary_conv2d(
            sign(x),
            self.weight_packed,
            [self.unique_filters, *g.weight_shape[1:]],
            list(g.stride),
            list(g.padding),
            list(g.dilation),
            g.groups,
        )
        if self.weight_index is not None:
            y = y.index_select(1, self.weight_index.long())
        factor = self.output_sign()
        if factor is not None:  # sums of ±1 are exact, and so is their opposite
            y = y * factor.to(y.dtype)[:, None, None]
        y = (y.to(self.weight_scale.dtype) * by_channel(self.weight_scale)).to(y.dtype)
        if self.input_scale:
            y = scale_by_input(y, x, self.geometry)
        if self.bias is not None:
            y = y + self.bias[:, None, None]
        return y

    def output_sign(self) -> Tensor | None:
        """Return what multiplies each output before scale and bias: float32 (C_out,), None where it is 1 throughout.

        An entry is +1, -1 where the output takes the opposite of its stored filter, or 0 where it is zeroed.
        """
        shape = (1, self.geometry.out_channels)
        factor = None if self.weight_sign is None else unpack_signs(self.weight_sign[None], shape)[0]
        if self.weight_kept is not None:
            kept = (unpack_signs(self.weight_kept[None], shape)[0] + 1) / 2
            factor = kept if factor is None else factor * kept
        return factor

    def dense_weight(self) -> Tensor:
        """Return X̂ = w̄ sign(X), (C_out, C_in / groups, kh, kw), float32; 0 where the output is zeroed."""
        weight = unpack_signs(self.weight_packed, (self.unique_filters, *self.geometry.weight_shape[1:]))
        if self.weight_index is not None:
            weight = weight.index_select(0, self.weight_index.long())
        factor = self.output_sign()
        if factor is not None:
            weight = weight * factor[:, None, None, None]
        scale = self.weight_scale
        return weight * (scale[:, None, None, None] if scale.dim() else scale)

    @property
    def weight(self) -> Tensor:
        """X̂, see ``dense_weight``: for code that reads the dtype, the device or the shape of ``conv.weight``."""
        return self.dense_weight()

    @property
    def filters(self) -> Filters:
        """Its outputs, the filters stored for them, and the outputs that are zeroed."""
        outputs = self.geometry.out_channels
        zeroed = 0
        if self.weight_kept is not None:
            zeroed = int((unpack_signs(self.weight_kept[None], (1, outputs)) < 0).sum())
        return Filters(outputs, self.unique_filters, zeroed)

    def without_merging(self) -> PackedConv2d:
        """Return a layer of the same shape that stores each filter: to count what merging saves."""
        return PackedConv2d(
            self.geometry,
            threshold=self.threshold is not None,
            bias=self.bias is not None,
            filter_scales=self.weight_scale.dim() > 0,
            input_scale=self.input_scale,
        )

    def stored_tensors(self) -> Mapping[str, StoredTensor]:
        """Declare the packed signs, the scale, and index, signs, threshold and bias where there are any."""
        c_out, *rest = self.geometry.weight_shape
        n = rest[0] * rest[1] * rest[2]
        own = {
            "weight_packed": StoredTensor(
                self.weight_packed, Role.BINARY_WEIGHT, self.unique_filters * n, 1, c_out * n
            ),
            "weight_scale": StoredTensor.real(self.weight_scale, Role.SCALE, added=True),
        }
        if self.weight_index is not None:
            bits = (self.unique_filters - 1).bit_length()
            own["weight_index"] = StoredTensor(self.weight_index, Role.INDEX, c_out, bits, 0)
        if self.weight_sign is not None:
            own["weight_sign"] = StoredTensor(self.weight_sign, Role.INDEX, c_out, 1, 0)
        if self.weight_kept is not None:
            own["weight_kept"] = StoredTensor(self.weight_kept, Role.INDEX, c_out, 1, 0)
        if self.threshold is not None:
            own["threshold"] = StoredTensor.real(self.threshold, Role.THRESHOLD, added=True)
        if self.bias is not None:
            own["bias"] = StoredTensor.real(self.bias, Role.REAL_WEIGHT)
        return own

    def macs(self, output: Tensor) -> Macs:
        """Count its multiply-accumulates for an ``output`` (B, C_out, H, W): binary, of the stored filters only.

        Real are those of K, where there is one.
        """
        positions = output[0].numel() // self.geometry.out_channels
        binary = Macs(binary=positions * self.unique_filters * math.prod(self.geometry.weight_shape[1:]))
        return binary + input_scale_macs(self.geometry, output) if self.input_scale else binary

    def spec(self) -> dict[str, Any]:
        """Return the JSON-ready arguments of ``from_spec``."""
        return {
            **self.geometry.to_dict(),
            "threshold": self.threshold is not None,
            "bias": self.bias is not None,
            "unique": self.unique_filters,
            "sign": self.weight_sign is not None,
            "kept": self.weight_kept is not None,
            "filter_scales": self.weight_scale.dim() > 0,
            "input_scale": self.input_scale,
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> PackedConv2d:
        """Build the layer with empty tensors. Raises ValueError on a spec that makes no sense."""
        flags = {name: bool(spec.get(name)) for name in _FLAGS}
        unique = spec.get("unique")
        if unique is not None and type(unique) is not int:
            raise ValueError(f"{unique!r} is not a number of filters")
        return cls(ConvGeometry.from_dict(spec), unique=unique, **flags)

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        return f"{self.geometry}, threshold={self.threshold is not None}, unique={self.unique_filters}"


_FLAGS = ("threshold", "bias", "sign", "kept", "filter_scales", "input_scale")


def by_channel(scale: Tensor) -> Tensor:
    """Return a scale that multiplies (B, C_out, H, W): a scalar as it is, (C_out,) as (C_out, 1, 1)."""
    return scale[:, None, None] if scale.dim() else scale


def scale_by_input(y: Tensor, x: Tensor, geometry: ConvGeometry) -> Tensor:
    """Return ``y`` (B, C_out, H', W') times K of ``x`` (B, C_in, H, W), see ``xnor_input_scale``."""
    g = geometry
    k = xnor_input_scale(x, g.kernel_size, g.stride, g.padding, g.dilation, g.groups)
    return y * k.repeat_interleave(g.out_channels // g.groups, 1).to(y.dtype)


def input_scale_macs(geometry: ConvGeometry, output: Tensor) -> Macs:
    """Count what K costs for an ``output`` (B, C_out, H', W'), all of it real.

    An addition for each element of the input, of which ``stride`` times H' by W' positions are taken; the box filter,
    one channel a group; a multiplication of each output.
    """
    g = geometry
    positions = output[0].numel() // g.out_channels
    mean = positions * math.prod(g.stride) * g.in_channels
    return Macs(real=mean + positions * (g.groups * math.prod(g.kernel_size) + g.out_channels))


def unique_filters(weight: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Find the filters whose signs are neither equal nor opposite to those of a filter before them.

    Args:
        weight: (C_out, ...), floating point.
        kept: bool (C_out,); filters that are not kept count as none, and index 0. None keeps all.

    Returns:
        The places of the unique filters, int64 (unique,), rising, on the CPU; for each filter the row of its
        unique one, int64 (C_out,), None if all are unique; and +1 or -1 by which that one's outputs are
        multiplied, float32 (C_out,), None if all are +1.
    """
    positive = (weight.detach().flatten(1) >= 0).cpu().numpy()
    # A filter and its opposite have one form in common: that whose first bit is set.
    opposite = ~positive[:, 0]
    canonical = np.packbits(positive ^ opposite[:, None], axis=1)
    rows: dict[bytes, int] = {}
    places: list[int] = []
    index = torch.zeros(len(weight), dtype=torch.long)
    signs = torch.ones(len(weight))
    for i, form in enumerate(canonical):
        if kept is not None and not kept[i]:
            continue
        row = rows.setdefault(form.tobytes(), len(places))
        if row == len(places):
            places.append(i)
        index[i] = row
        if opposite[i] != opposite[places[row]]:
            signs[i] = -1
    merged = len(places) < len(weight)
    return torch.tensor(places), index if merged else None, signs if bool((signs < 0).any()) else None


def index_dtype(rows: int) -> torch.dtype:
    """Return the smallest integer dtype that counts to ``rows - 1``."""
    return torch.uint8 if rows <= 256 else torch.int16 if rows <= 2**15 else torch.int32
