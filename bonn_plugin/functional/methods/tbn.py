"""TBN: Wan, Shen, Liu, Zhu, Qin, Shao, Shen, "TBN: Convolutional Neural Network with Ternary Inputs and Binary
Weights", ECCV 2018.

Weights as in XNOR-Net. An activation is sign(x) where |x| exceeds delta times the mean of |x|, and 0 elsewhere
(delta = 0.4); its gradient passes where |x| <= 1.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class _Ternarize(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: float) -> Tensor:
        magnitude = x.abs()
        ctx.save_for_backward(magnitude <= 1)
        edge = delta * magnitude.mean(tuple(range(1, x.dim())), keepdim=True)
        return x.sign() * (magnitude > edge)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None


def ternarize_input(x: Tensor, delta: float = 0.4) -> Tensor:
    """Return -1, 0 and +1 in the shape and dtype of ``x``, (B, ...); the mean of |x| is that of each sample."""
    ternary: Tensor = _Ternarize.apply(x, delta)
    return ternary


__all__ = ["ternarize_input"]
