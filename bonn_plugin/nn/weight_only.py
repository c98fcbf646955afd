"""A linear layer with integer weights and real activations, as neural-compressor's weight-only pass leaves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bonn_plugin.functional import unpack_int4
from bonn_plugin.nn.integer import linear_sizes
from bonn_plugin.nn.operations import Macs
from bonn_plugin.nn.storage import Role, StoredTensor, register_replacement


@register_replacement("weight_only_linear")
class WeightOnlyLinear(nn.Module):
    """A linear layer whose weight is an integer times the scale of its group; the arithmetic is float32.

    Buffers: ``weight`` int8 (out, in) with 8 bits, or uint8 (out, ceil(in / 2)) with 4, see ``pack_int4``;
    ``weight_scale`` float16 (out, ceil(in / group_size)); ``bias`` float16 (out,) or None.

    Args:
        in_features: size of an input.
        out_features: size of an output.
        bits: 8 or 4.
        group_size: weights of a row that share a scale.
        bias: whether there is a bias.

    Raises:
        ValueError: another number of bits, or a group that is empty or longer than a row.
    """

    kind: str
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bits: int, group_size: int, bias: bool) -> None:
        super().__init__()
        if bits not in (4, 8) or not 1 <= group_size <= in_features:
            raise ValueError(f"{bits} bits in groups of {group_size} do not fit rows of {in_features}")
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group_size = group_size
        stored = (in_features, torch.int8) if bits == 8 else (-(-in_features // 2), torch.uint8)
        self.register_buffer("weight", torch.zeros(out_features, stored[0], dtype=stored[1]))
        groups = -(-in_features // group_size)
        self.register_buffer("weight_scale", torch.ones(out_features, groups, dtype=torch.float16))
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float16) if bias else None)

    def integers(self) -> Tensor:
        """Return the weight's integers, int8 (out, in)."""
        return self.weight if self.bits == 8 else unpack_int4(self.weight, self.in_features)

    def dense_weight(self) -> Tensor:
        """Return the weight as float32, (out, in)."""
        scale = self.weight_scale.float().repeat_interleave(self.group_size, dim=1)[:, : self.in_features]
        return self.integers().float() * scale

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features), float32."""
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(x.float(), self.dense_weight(), bias)

    def stored_tensors(self) -> Mapping[str, StoredTensor]:
        """Declare the integers, their scales, and the bias if there is one."""
        n = self.in_features * self.out_features
        own = {
            "weight": StoredTensor(self.weight, Role.INTEGER_WEIGHT, n, self.bits, n),
            "weight_scale": StoredTensor.real(self.weight_scale, Role.SCALE, added=True),
        }
        if self.bias is not None:
            own["bias"] = StoredTensor.real(self.bias, Role.REAL_WEIGHT)
        return own

    def macs(self, output: Tensor) -> Macs:
        """Count its multiply-accumulates for an ``output`` (B, ..., out)."""
        return Macs(real=output[0].numel() * self.in_features)

    def spec(self) -> dict[str, Any]:
        """Return the JSON-ready arguments of ``from_spec``."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return {**sizes, "bits": self.bits, "group_size": self.group_size, "bias": self.bias is not None}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> WeightOnlyLinear:
        """Build the layer with empty tensors. Raises ValueError on a spec that makes no sense."""
        bits, group_size = spec.get("bits"), spec.get("group_size")
        if type(bits) is not int or type(group_size) is not int:
            raise ValueError(f"{bits!r} bits in groups of {group_size!r}")
        return cls(*linear_sizes(spec), bits=bits, group_size=group_size, bias=bool(spec.get("bias")))


__all__ = ["WeightOnlyLinear"]
