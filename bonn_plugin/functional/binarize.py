"""Binarisation of weights and activations (BONN, ICCV 2019, Eq. 12 and 15, Algorithm 1 lines 5-7).

The forward value of every function here is a plain sign; what the paper prescribes, and what autograd
would not derive, is the backward pass. ``sign(0)`` is +1 throughout: one bit holds two values.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Ste = Literal["clip", "polynomial"]
MODULATION_FLOOR = 0.01
"""Least value of an element of w, as a share of the mean of w."""


def sign(x: Tensor) -> Tensor:
    """Return +1 where ``x >= 0`` and -1 elsewhere, with the shape and dtype of ``x``; no gradient.

    >>> import torch
    >>> sign(torch.tensor([-0.5, 0.0, 2.0]))
    tensor([-1.,  1.,  1.])
    """
    return (x.detach() >= 0).to(x.dtype).mul_(2).sub_(1)


class _SignWeight(Function):
    """S = sign(X); the incoming gradient is read as G = dL/dX̂, with X̂ = w̄ S (Eq. 12 and 15)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, modulation: Tensor) -> Tensor:
        ctx.save_for_backward(weight, modulation)
        return sign(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        weight, modulation = ctx.saved_tensors
        masked = grad * ((modulation * weight).abs() <= 1)
        return masked * modulation, (masked * weight).sum(0)


class _ScaleForward(Function):
    """Multiply by a scalar in the forward pass and by nothing in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        # Through the scale's precision: rounding w̄ itself to bfloat16 would bias a whole layer.
        return (x.to(scale.dtype) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ScaleBackward(Function):
    """Multiply by nothing in the forward pass and by a scalar in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return (grad.to(scale.dtype) * scale).to(grad.dtype), None


class _SignActivation(Function):
    """a = sign(x), gradient passed where |x| <= bound (the clipped straight-through estimator)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        # The mask is kept as bool: a quarter of the memory of keeping x itself.
        ctx.save_for_backward(x.abs() <= bound)
        return sign(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None


class _SignActivationPolynomial(Function):
    """a = sign(x), gradient 2 (1 - |x|) on |x| <= 1 (Bi-Real Net, ECCV 2018, Eq. 5-6)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return sign(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        shaped: Tensor = grad * (1 - x.abs()).clamp_(min=0).mul_(2)
        return shaped


def binarize_weight(weight: Tensor, modulation: Tensor) -> Tensor:
    """Binarise a convolution's kernel: X̂ = w̄ sign(X), w̄ the mean of the modulation vector.

    The backward pass, for an incoming G = dL/dX̂ and m = 1[-1 <= w∘X <= 1], is Eq. 12 and 15:
    dL/dX = G∘m∘w and dL/dw = sum_i G_i∘m_i∘X_i.

    Args:
        weight: latent kernel X, (C_out, C_in / groups, kh, kw), floating point.
        modulation: w, (C_in / groups, kh, kw), shared by the layer's filters.

    Returns:
        X̂ with the shape and dtype of ``weight``; every element is w̄ or -w̄.

    Raises:
        ValueError: the shapes do not fit together.
    """
    _check_modulation(weight, modulation)
    signs: Tensor = _SignWeight.apply(weight, modulation)
    scaled: Tensor = _ScaleForward.apply(signs, modulation.detach().mean())
    return scaled


def binarize_activation(x: Tensor, ste: Ste = "clip", bound: float = 1.0) -> Tensor:
    """Binarise an activation: a = sign(x), with a straight-through gradient (Algorithm 1, line 6).

    Args:
        x: activation of any shape, floating point.
        ste: ``"clip"`` passes the gradient where ``|x| <= bound`` (BNN, XNOR-Net, BONN);
            ``"polynomial"`` multiplies it by 2 (1 - |x|) on ``|x| <= 1`` (Bi-Real Net).
        bound: half width of the clip; no meaning for ``"polynomial"``.

    Returns:
        A tensor of +1 and -1 with the shape and dtype of ``x``.

    Raises:
        ValueError: an unknown ``ste``, a bound that is not positive, or a bound given to the polynomial.
    """
    if bound <= 0:
        raise ValueError(f"bound must be positive, not {bound}")
    if ste == "clip":
        clipped: Tensor = _SignActivation.apply(x, bound)
        return clipped
    if ste == "polynomial":
        if bound != 1.0:
            raise ValueError("the polynomial gradient has a fixed bound of 1")
        shaped: Tensor = _SignActivationPolynomial.apply(x)
        return shaped
    raise ValueError(f"unknown ste {ste!r}: 'clip' or 'polynomial'")


@torch.no_grad()
def keep_positive_(modulation: Tensor) -> None:
    """Raise what is below the floor, ``MODULATION_FLOOR`` of the mean of w with 0 for what is below zero; in place.

    In Eq. 12 w stands for the derivative of X̂ = w̄ sign(X) by X. X̂ rises with X while w̄ is positive, so that an element
    below zero turns the gradient of its weights round: they climb the loss. Nothing in the paper keeps w positive but
    the kernel loss, whose pull ends at a positive value (Eq. 16); Adam takes steps of full length and passes zero.

    Args:
        modulation: w of a layer, of any shape, floating point; where all of it is below zero the floor is a share of
            its mean magnitude. What is not finite makes all of it NaN, so that it is seen.
    """
    mean = modulation.clamp(min=0).mean()
    mean = torch.where(mean > 0, mean, modulation.abs().mean())
    unseen = 0 * modulation.sum()  # NaN where something is not finite: -inf would be raised to the floor
    modulation.copy_(torch.maximum(modulation, MODULATION_FLOOR * mean + unseen))


def sign_weight(weight: Tensor, modulation: Tensor) -> Tensor:
    """Return sign(X) as ±1, reading the incoming gradient as dL/dX̂: the inner half of ``binarize_weight``."""
    _check_modulation(weight, modulation)
    signs: Tensor = _SignWeight.apply(weight, modulation)
    return signs


def scale_forward(x: Tensor, scale: Tensor) -> Tensor:
    """Return ``scale * x``; the gradient of ``x`` passes unscaled and ``scale``, a scalar, gets none."""
    scaled: Tensor = _ScaleForward.apply(x, scale)
    return scaled


def scale_backward(x: Tensor, scale: Tensor) -> Tensor:
    """Return ``x``; its gradient is multiplied by ``scale``, a scalar that gets no gradient itself."""
    same: Tensor = _ScaleBackward.apply(x, scale)
    return same


def _check_modulation(weight: Tensor, modulation: Tensor) -> None:
    if weight.shape[1:] != modulation.shape:
        raise ValueError(
            f"modulation has shape {tuple(modulation.shape)}, "
            f"the filters of the weight have {tuple(weight.shape[1:])}: they must be the same"
        )
