"""DoReFa-Net: Zhou, Wu, Ni, Zhou, Wen, Zou, "DoReFa-Net", arXiv 1606.06160, with 1-bit weights.

X̂ = E|X| sign(X) with one scale a layer, dL/dX = dL/dX̂ (section 2.3); activations are clipped to [0, 1] and
rounded to k bits (section 2.4), gradient through the rounding as if it were not there (section 2.2). Gradients are not
quantised: that speeds training up on hardware for it, and changes nothing of the network that is stored.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from bonn_plugin.functional.methods.bases import Bases, not_zero, sign_with_gradient


class _Round(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def dorefa_weight(weight: Tensor) -> Bases:
    """Return sign(X) and E|X| of the layer.

    Args:
        weight: X, (C_out, C_in / groups, kh, kw).
    """
    scale = not_zero(weight.detach().abs().mean())
    return Bases(sign_with_gradient(weight, 1 / scale)[None], scale.expand(1, 1))


def dorefa_input(x: Tensor, bits: int) -> Tensor:
    """Return round((2^k - 1) clip(x, 0, 1)), whole numbers from 0 to 2^k - 1 in the shape and dtype of ``x``.

    The activation is this divided by 2^k - 1; a layer divides its sums, which are exact. The gradient is that of the
    clip.
    """
    rounded: Tensor = _Round.apply(x.clamp(0, 1) * (2**bits - 1))
    return rounded


__all__ = ["dorefa_input", "dorefa_weight"]
