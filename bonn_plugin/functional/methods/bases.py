"""What all methods make of a kernel: signs and the numbers that they are multiplied by."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from bonn_plugin.functional.binarize import sign


class Bases(NamedTuple):
    """A kernel as sum_m scale_m * signs_m.

    A layer computes sum_m scale_m * conv(a, signs_m), so that the gradient which reaches ``signs`` is that of the
    scaled kernel times its scale.

    Attributes:
        signs: ±1, (M, C_out, C_in / groups, kh, kw); M is 1 but for ABC-Net.
        scale: (M, C_out), or (M, 1) where a layer has one; no gradient.
    """

    signs: Tensor
    scale: Tensor


class _SignWithGradient(Function):
    """sign(X); the gradient is multiplied by a factor of the method's own."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return sign(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return grad * factor, None


def sign_with_gradient(weight: Tensor, factor: Tensor) -> Tensor:
    """Return sign(X), whose gradient reaches X times ``factor``, which broadcasts to the shape of ``weight``."""
    signs: Tensor = _SignWithGradient.apply(weight, factor)
    return signs


def filter_mean(weight: Tensor) -> Tensor:
    """Return mean |X_i| of each filter, (C_out, 1, 1, 1), without gradient and above 0."""
    return not_zero(weight.detach().abs().mean((1, 2, 3), keepdim=True))


def not_zero(scale: Tensor) -> Tensor:
    """Return ``scale``, at least so large that 1 / scale is finite: weights that are all zero have none."""
    return scale.clamp(min=8 * torch.finfo(scale.dtype).tiny)


__all__ = ["Bases", "filter_mean", "not_zero", "sign_with_gradient"]
