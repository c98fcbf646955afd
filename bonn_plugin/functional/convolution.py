"""The convolution of signs with signs, as training needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class _ConvolveSigns(Function):
    """A convolution whose operands are ±1: for the backward pass it keeps a byte of each, not a float."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, s: Tensor, *shape: Any) -> Tensor:
        ctx.save_for_backward(a > 0, s > 0)
        ctx.shape = shape
        return torch.nn.functional.conv2d(a, s, None, *shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, s = (positive.to(grad.dtype).mul_(2).sub_(1) for positive in ctx.saved_tensors)
        stride, padding, dilation, groups = ctx.shape
        wanted = [*ctx.needs_input_grad[:2], False]
        grad_a, grad_s, _ = torch.ops.aten.convolution_backward(
            grad, a, s, None, stride, padding, dilation, False, [0, 0], groups, wanted
        )
        return grad_a, grad_s, None, None, None, None


def convolve_signs(
    a: Tensor,
    s: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Convolve activations ±1 with weights ±1 (BONN, Algorithm 1, line 7); padded positions are 0.

    The values and gradients are those of ``torch.nn.functional.conv2d``; what is kept for the backward pass is a
    quarter of that.

    Args:
        a: +1 and -1, (B, C_in, H, W), floating point.
        s: +1 and -1, (C_out, C_in / groups, kh, kw), in the dtype of ``a``.
        stride: (height, width), as are ``padding`` and ``dilation``.
        padding: zeros on both sides.
        dilation: spacing of the kernel's elements.
        groups: groups of the convolution.

    Returns:
        (B, C_out, H', W'), whole numbers.
    """
    y: Tensor = _ConvolveSigns.apply(a, s, list(stride), list(padding), list(dilation), groups)
    return y
