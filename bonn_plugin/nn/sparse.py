"""Layers whose weights are mostly zero: a bit for each weight that is none, and the values of the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bonn_plugin.functional import pack_signs, unpack_signs
from bonn_plugin.nn.geometry import ConvAttributes, ConvGeometry
from bonn_plugin.nn.operations import Macs
from bonn_plugin.nn.storage import Role, StoredTensor, register_replacement


def smaller_sparse(weight: Tensor) -> bool:
    """Whether mask and values of ``weight`` take fewer bytes than the weight as it is."""
    values = int(torch.count_nonzero(weight)) * weight.element_size()
    return values + -(-weight.numel() // 8) < weight.numel() * weight.element_size()


class SparseWeight(nn.Module):
    """What both kinds of layers have in common.

    Buffers: ``weight_mask`` uint8 (ceil(n / 8),), a bit 1 where a weight is not 0, see ``pack_signs``;
    ``weight_values`` (values,), the others' values in their order; ``bias`` (C_out,) where there is one.
    No engine here skips the zeros: computed is the whole layer.

    Args:
        shape: of the weight, (C_out, ...).
        values: weights that are not 0.
        bias: whether there is a bias.
        dtype: of values and bias.

    Raises:
        ValueError: the numbers do not fit each other.
    """

    kind: str
    weight_mask: Tensor
    weight_values: Tensor
    bias: Tensor | None

    def __init__(self, shape: tuple[int, ...], values: int, bias: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        n = math.prod(shape)
        if not (all(size >= 1 for size in shape) and 0 <= values <= n):
            raise ValueError(f"{values} values do not fit a weight of shape {tuple(shape)}")
        self.shape = tuple(shape)
        self.register_buffer("weight_mask", torch.zeros(-(-n // 8), dtype=torch.uint8))
        self.register_buffer("weight_values", torch.zeros(values, dtype=dtype))
        self.register_buffer("bias", torch.zeros(shape[0], dtype=dtype) if bias else None)

    @torch.no_grad()
    def take(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take the tensors of a dense layer."""
        kept = weight.detach() != 0
        self.weight_mask = pack_signs(kept.reshape(1, -1).to(weight.dtype) - 0.5)[0]
        self.weight_values = weight.detach()[kept].clone()
        self.bias = None if bias is None else bias.detach().clone()

    def dense_weight(self) -> Tensor:
        """Return the weight with its zeros."""
        n = math.prod(self.shape)
        kept = unpack_signs(self.weight_mask[None], (1, n))[0] > 0
        weight = torch.zeros(n, dtype=self.weight_values.dtype, device=self.weight_values.device)
        weight[kept] = self.weight_values
        return weight.reshape(self.shape)

    def stored_tensors(self) -> Mapping[str, StoredTensor]:
        """Declare mask and values, and the bias where there is one."""
        n = math.prod(self.shape)
        values = self.weight_values
        own = {
            "weight_mask": StoredTensor(self.weight_mask, Role.MASK, n, 1, 0),
            "weight_values": StoredTensor(
                values, Role.REAL_WEIGHT, values.numel(), values.element_size() * 8, original_elements=n
            ),
        }
        if self.bias is not None:
            own["bias"] = StoredTensor.real(self.bias, Role.REAL_WEIGHT)
        return own


@register_replacement("sparse_conv2d")
class SparseConv2d(ConvAttributes, SparseWeight):
    """A convolution in full precision, its weight stored sparse.

    Args:
        geometry: the convolution's shape.
        values: weights that are not 0.
        bias: whether there is a bias.
    """

    def __init__(self, geometry: ConvGeometry, values: int, bias: bool) -> None:
        super().__init__(geometry.weight_shape, values, bias)
        self.geometry = geometry

    @classmethod
    def of(cls, conv: nn.Conv2d) -> SparseConv2d:
        """Return the sparse form of a convolution. Raises ValueError on a padding that it can't express."""
        sparse = cls(ConvGeometry.of(conv), int(torch.count_nonzero(conv.weight)), conv.bias is not None)
        sparse.take(conv.weight, conv.bias)
        return sparse

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C_in, H, W) to (B, C_out, H', W')."""
        g = self.geometry
        return F.conv2d(x, self.dense_weight(), self.bias, g.stride, g.padding, g.dilation, g.groups)

    def macs(self, output: Tensor) -> Macs:
        """Count its multiply-accumulates for an ``output`` (B, C_out, H, W), those with zeros too."""
        return Macs(real=output[0].numel() * math.prod(self.geometry.weight_shape[1:]))

    def spec(self) -> dict[str, Any]:
        """Return the JSON-ready arguments of ``from_spec``."""
        return {**self.geometry.to_dict(), "values": self.weight_values.numel(), "bias": self.bias is not None}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> SparseConv2d:
        """Build the layer with empty tensors. Raises ValueError on a spec that makes no sense."""
        return cls(ConvGeometry.from_dict(spec), _count(spec, "values"), bool(spec.get("bias")))


@register_replacement("sparse_linear")
class SparseLinear(SparseWeight):
    """A linear layer in full precision, its weight stored sparse.

    Args:
        shape: (C_out, C_in).
        values: weights that are not 0.
        bias: whether there is a bias.
    """

    def __init__(self, shape: tuple[int, int], values: int, bias: bool) -> None:
        super().__init__(shape, values, bias)

    @classmethod
    def of(cls, linear: nn.Linear) -> SparseLinear:
        """Return the sparse form of a linear layer."""
        shape = (linear.out_features, linear.in_features)
        sparse = cls(shape, int(torch.count_nonzero(linear.weight)), linear.bias is not None)
        sparse.take(linear.weight, linear.bias)
        return sparse

    def forward(self, x: Tensor) -> Tensor:
        """(..., C_in) to (..., C_out)."""
        return F.linear(x, self.dense_weight(), self.bias)

    def macs(self, output: Tensor) -> Macs:
        """Count its multiply-accumulates for an ``output`` (B, ..., C_out), those with zeros too."""
        return Macs(real=output[0].numel() * self.shape[1])

    def spec(self) -> dict[str, Any]:
        """Return the JSON-ready arguments of ``from_spec``."""
        outputs, inputs = self.shape
        return {
            "out_features": outputs,
            "in_features": inputs,
            "values": self.weight_values.numel(),
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> SparseLinear:
        """Build the layer with empty tensors. Raises ValueError on a spec that makes no sense."""
        shape = (_count(spec, "out_features"), _count(spec, "in_features"))
        return cls(shape, _count(spec, "values"), bool(spec.get("bias")))


def _count(spec: Mapping[str, Any], key: str) -> int:
    value = spec.get(key)
    if type(value) is not int:
        raise ValueError(f"{key} is {value!r}, not a number")
    return value


__all__ = ["SparseConv2d", "SparseLinear", "SparseWeight", "smaller_sparse"]
