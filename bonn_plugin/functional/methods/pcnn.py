"""PCNN: Gu, Li, Zhang, Han, Cao, Liu, Doermann, "Projection Convolutional Neural Networks for 1-bit CNNs via Discrete
Back Propagation", AAAI 2019, with one projection.

A kernel C is projected onto ±a, a = mean |C| of the layer, by W∘C with a learned plane W (kh, kw) that all channels
share; forward takes the mean of W. Backward, with m = 1[-1 <= W∘C <= 1]: dL_s/dC = dL_s/dĈ∘m∘W and
dL_s/dW = sum over filters and channels of dL_s/dĈ∘m∘C. The projection loss is lambda/2 sum ||Ĉ - W∘C||^2 with Ĉ
constant. Its C + eta delta, a look ahead by the step of one iteration, is taken as C: eta delta is small beside C.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from bonn_plugin.functional.binarize import sign
from bonn_plugin.functional.methods.bases import Bases, not_zero


class _Project(Function):
    """sign(w̄ C); the incoming gradient is a times that of Ĉ."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, projection: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, projection, scale)
        return sign(projection.mean() * weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, projection, scale = ctx.saved_tensors
        masked = grad / scale * ((projection * weight).abs() <= 1)
        return masked * projection, (masked * weight).sum((0, 1)), None


def pcnn_weight(weight: Tensor, projection: Tensor) -> Bases:
    """Return sign(w̄ C) and a.

    Args:
        weight: C, (C_out, C_in / groups, kh, kw).
        projection: W, (kh, kw).
    """
    scale = not_zero(weight.detach().abs().mean())
    signs: Tensor = _Project.apply(weight, projection, scale)
    return Bases(signs[None], scale.expand(1, 1))


def projection_loss(weight: Tensor, projection: Tensor) -> Tensor:
    """Return 1/2 sum ||Ĉ - W∘C||^2 of one layer, a scalar, without lambda.

    Args:
        weight: C, (C_out, C_in / groups, kh, kw).
        projection: W, (kh, kw).
    """
    with torch.no_grad():
        projected = sign(projection.mean() * weight) * weight.abs().mean()
    return (projected - projection * weight).square().sum() / 2


__all__ = ["pcnn_weight", "projection_loss"]
