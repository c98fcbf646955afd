"""ABC-Net: Lin, Zhao, Pan, "Towards Accurate Binary Convolutional Neural Network", NIPS 2017.

X ~ sum_m alpha_m B_m with B_m = sign(X - mean(X) + u_m std(X)), u_m = -1 + 2 (m - 1) / (M - 1), 0 for one base, and
alpha by least squares for each filter (the channel-wise form); dL/dX = sum_m alpha_m dL/dB_m-hat: each sign's
gradient passes as it is. An activation is sum_n beta_n A_n with A_n = +1 where clip(x + v_n, 0, 1) >= 1/2 and -1
elsewhere, v_n and beta_n learned, gradient where 0 <= x + v_n <= 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from bonn_plugin.functional.binarize import sign
from bonn_plugin.functional.methods.bases import Bases


class _Bases(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, count: int) -> Tensor:
        centred = weight - weight.mean((1, 2, 3), keepdim=True)
        spread = weight.std((1, 2, 3), correction=0, keepdim=True)
        shifts = [2 * m / (count - 1) - 1 for m in range(count)] if count > 1 else [0.0]
        return torch.stack([sign(centred + u * spread) for u in shifts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.sum(0), None


class _ShiftedSign(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(((x + shift) >= 0) & ((x + shift) <= 1))
        return sign(x + shift - 0.5)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (inside,) = ctx.saved_tensors
        passed = grad * inside
        return passed, passed.sum()


def abc_weight(weight: Tensor, count: int) -> Bases:
    """Return M bases and alpha, (M, C_out), the least squares fit of each filter.

    Args:
        weight: X, (C_out, C_in / groups, kh, kw).
        count: M.
    """
    signs: Tensor = _Bases.apply(weight, count)
    with torch.no_grad():
        columns = signs.flatten(2).permute(1, 2, 0).double()  # (C_out, n, M)
        square = columns.mT @ columns
        # bases may be equal in a filter of few elements: the smallest of the solutions
        alpha = torch.linalg.pinv(square, hermitian=True) @ (columns.mT @ weight.flatten(1).double()[..., None])
    return Bases(signs, alpha[..., 0].mT.to(weight.dtype).contiguous())


def abc_inputs(x: Tensor, shifts: Tensor) -> list[Tensor]:
    """Return A_n, ±1 in the shape and dtype of ``x``, for each of the shifts v, (N,)."""
    made: list[Tensor] = [_ShiftedSign.apply(x, shift) for shift in shifts.to(x.dtype)]
    return made


def first_shifts(count: int) -> Tensor:
    """Return v to begin with, (N,): signs that change at 0 for one base, else evenly from -1 to 1; ours."""
    edges = torch.linspace(-1, 1, count) if count > 1 else torch.zeros(1)
    return 0.5 - edges


__all__ = ["abc_inputs", "abc_weight", "first_shifts"]
