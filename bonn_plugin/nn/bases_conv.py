"""The packed convolution of methods whose input is not one sign or whose weights are several: M bits a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bonn_plugin.functional import pack_signs, unpack_signs
from bonn_plugin.functional.methods import Bases
from bonn_plugin.nn.geometry import ConvAttributes, ConvGeometry
from bonn_plugin.nn.input_code import InputCode, input_code
from bonn_plugin.nn.operations import Macs
from bonn_plugin.nn.storage import Role, StoredTensor, register_replacement

MOST_BASES = 8


def sum_of_bases(geometry: ConvGeometry, code: InputCode, x: Tensor, signs: Sequence[Tensor], scale: Tensor) -> Tensor:
    """Return sum over m, n of beta_n alpha_m conv(A_n(x), B_m), (B, C_out, H', W').

    Sums of whole numbers are exact, and are scaled after: training and the packed layer give the same bits.

    Args:
        geometry: the convolution's shape.
        code: makes A_n of the input; beta are its factors.
        x: (B, C_in, H, W).
        signs: B_m, (C_out, C_in / groups, kh, kw) each.
        scale: alpha, (M, C_out) or (M, 1).
    """
    factors = code.factors()
    total: Tensor | None = None
    for n, a in enumerate(code.codes(x)):
        for m, s in enumerate(signs):
            y = _convolve(geometry, code, a, s)
            y = (y.to(scale.dtype) * scale[m][:, None, None]).to(x.dtype)
            if factors is not None:
                y = y * factors[n].to(y)
            total = y if total is None else total + y
    assert total is not None
    return total


def _convolve(geometry: ConvGeometry, code: InputCode, a: Tensor, s: Tensor) -> Tensor:
    half = (torch.float16, torch.bfloat16)
    if code.large and (a.dtype in half or torch.is_autocast_enabled(a.device.type)):
        with torch.autocast(a.device.type, enabled=False):
            return geometry.convolve(a.float(), s.float())
    return geometry.convolve(a, s)


@register_replacement("packed_bases_conv2d")
class PackedBasesConv2d(ConvAttributes, nn.Module):
    """sum over m, n of beta_n alpha_m conv(A_n(x), B_m) + bias with B_m packed.

    Exact, and no faster than a full-precision convolution. Buffers: ``weight_packed`` uint8
    (M * C_out, ceil(n / 8)), base after base; ``weight_scale`` float32 (M, C_out) or (M, 1); ``bias`` (C_out,) or None.

    Args:
        geometry: the convolution's shape.
        code: what it reads of its input.
        bases: M.
        filter_scales: whether each filter has a scale of its own.
        bias: whether there is a bias.

    Raises:
        ValueError: M is not from 1 to 8.
    """

    kind: str
    weight_packed: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        geometry: ConvGeometry,
        code: InputCode,
        *,
        bases: int = 1,
        filter_scales: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if type(bases) is not int or not 1 <= bases <= MOST_BASES:
            raise ValueError(f"{bases!r} bases of a weight: 1 to {MOST_BASES}")
        self.geometry = geometry
        self.code = code
        self.bases = bases
        self.binarizes_input = code.bends
        c_out, *rest = geometry.weight_shape
        self.register_buffer("weight_packed", torch.zeros(bases * c_out, -(-math.prod(rest) // 8), dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.ones(bases, c_out if filter_scales else 1))
        self.register_buffer("bias", torch.zeros(c_out) if bias else None)

    @classmethod
    @torch.no_grad()
    def from_bases(
        cls, geometry: ConvGeometry, bases: Bases, code: InputCode, bias: Tensor | None
    ) -> PackedBasesConv2d:
        """Pack the signs of all bases.

        Args:
            geometry: the convolution's shape.
            bases: signs and scales.
            code: what it reads of its input; its tensors are copied.
            bias: (C_out,).
        """
        copied = input_code(code.spec())
        copied.load_state_dict(code.state_dict())
        count, filters = len(bases.signs), bases.scale.shape[1]
        own = filters == geometry.out_channels
        packed = cls(geometry, copied, bases=count, filter_scales=own, bias=bias is not None)
        packed.to(bases.signs.device)
        packed.weight_packed = pack_signs(bases.signs.detach().flatten(0, 1))
        packed.weight_scale = bases.scale.detach().clone()
        packed.bias = bias
        return packed

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C_in, H, W) to (B, C_out, H', W'); one image, (C_in, H, W), as ``nn.Conv2d`` does."""
        if x.dim() == 3:
            return self.forward(x[None])[0]
        y = sum_of_bases(self.geometry, self.code, x, list(self._signs(x.dtype)), self.weight_scale)
        return y if self.bias is None else y + self.bias[:, None, None]

    def _signs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        shape = self.geometry.weight_shape
        flat = unpack_signs(self.weight_packed, (self.bases * shape[0], *shape[1:]), dtype)
        return flat.view(self.bases, *shape)

    @property
    def weight(self) -> Tensor:
        """Return sum_m alpha_m B_m, (C_out, C_in / groups, kh, kw), for code that reads ``conv.weight``."""
        return (self._signs() * self.weight_scale[..., None, None, None]).sum(0)

    def macs(self, output: Tensor) -> Macs:
        """Count its operations for an ``output`` (B, C_out, H, W), over all bases."""
        return self.code.macs(self.bases * output[0].numel() * math.prod(self.geometry.weight_shape[1:]))

    def stored_tensors(self) -> Mapping[str, StoredTensor]:
        """Declare M bits a weight, which stand for one float32, the scales, and the bias where there is one."""
        n = math.prod(self.geometry.weight_shape)
        own = {
            "weight_packed": StoredTensor(self.weight_packed, Role.BINARY_WEIGHT, self.bases * n, 1, n),
            "weight_scale": StoredTensor.real(self.weight_scale, Role.SCALE, added=True),
        }
        if self.bias is not None:
            own["bias"] = StoredTensor.real(self.bias, Role.REAL_WEIGHT)
        return own

    def spec(self) -> dict[str, Any]:
        """Return the JSON-ready arguments of ``from_spec``."""
        return {
            **self.geometry.to_dict(),
            "code": self.code.spec(),
            "bases": self.bases,
            "filter_scales": self.weight_scale.shape[1] == self.geometry.out_channels,
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> PackedBasesConv2d:
        """Build the layer with empty tensors. Raises ValueError on a spec that makes no sense."""
        return cls(
            ConvGeometry.from_dict(spec),
            input_code(spec.get("code")),
            bases=spec.get("bases"),  # type: ignore[arg-type]
            filter_scales=bool(spec.get("filter_scales")),
            bias=bool(spec.get("bias")),
        )

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        return f"{self.geometry}, bases={self.bases}"


__all__ = ["MOST_BASES", "PackedBasesConv2d", "sum_of_bases"]
