"""The Bayesian losses of BONN (ICCV 2019): kernel loss (Eq. 7, 9, 13, 16-18) and feature loss (Eq. 8, 9)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from bonn_plugin.functional.binarize import sign


class _KernelLoss(Function):
    """The braces of Eq. 9 for one layer with the gradients of Eq. 13 and 16 to 18.

    The gradients are simple and the weights need reading once for loss and gradients together, so
    both are made in the forward pass. No plain scalar loss gives them: those of X and w are sums over
    the K elements of a filter, those of mu and sigma averages.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, modulation: Tensor, mu: Tensor, sigma: Tensor, nu: float) -> Tensor:
        filters = weight.shape[0]
        n = modulation.numel()
        x = weight.reshape(filters, n)
        w = modulation.reshape(1, n)
        s = sign(x)
        residual = w * x - w.mean() * s  # w∘X - X̂
        distance = x - mu[:, None] * s  # X+ - mu, X- + mu
        precision = nu / sigma.square()
        squares = distance.square().sum(1)
        loss = 0.5 * (residual.square().sum() + (precision * squares).sum() + nu * n * sigma.square().log().sum())
        grad_x = torch.addcmul(w * residual, precision[:, None], distance)
        grad_w = (residual * x).sum(0)
        grad_mu = -precision / n * (s * distance).sum(1)
        grad_sigma = nu / n * (n / sigma - squares / sigma**3)
        ctx.save_for_backward(grad_x.view_as(weight), grad_w.view_as(modulation), grad_mu, grad_sigma)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_w, grad_mu, grad_sigma = ctx.saved_tensors
        return grad * grad_x, grad * grad_w, grad * grad_mu, grad * grad_sigma, None


def kernel_loss(weight: Tensor, modulation: Tensor, mu: Tensor, sigma: Tensor, nu: float) -> Tensor:
    """Bayesian kernel loss of one layer: one half of the braces of Eq. 9, without lambda.

    1/2 sum_i { ||X̂_i - w∘X_i||^2 + nu/sigma_i^2 [sum_+ (X_ik - mu_i)^2 + sum_- (X_ik + mu_i)^2]
    + nu K log sigma_i^2 }, where K is the number of elements of a filter and X̂ = w̄ sign(X) a constant.

    Gradients follow the paper and not autograd: Eq. 13 for X, Eq. 16 for w, and Eq. 17 and 18 for mu
    and sigma, which are averaged over the K elements.

    Args:
        weight: latent kernel X, (C_out, C_in / groups, kh, kw).
        modulation: w, (C_in / groups, kh, kw).
        mu: mode of each filter, (C_out,).
        sigma: spread of each filter, (C_out,), positive.
        nu: variance of the quantisation error, in squared units of the weights.

    Returns:
        A scalar with the dtype of ``weight``.
    """
    loss: Tensor = _KernelLoss.apply(weight, modulation, mu, sigma, nu)
    return loss


def feature_loss(features: Tensor, labels: Tensor, centers: Tensor, sigma: Tensor) -> Tensor:
    """Bayesian feature loss: one half of the braces of Eq. 9 (Eq. 8), batch mean, without theta.

    1/2 mean_b { ||f - c_y||^2 + sum_k [(f_k - c_yk)^2 / sigma_yk^2 + log sigma_yk^2] }. The centres get
    no gradient: they move by ``update_centers``.

    Args:
        features: penultimate features f, (B, D).
        labels: class indices y, (B,), int64.
        centers: class centres c, (M, D).
        sigma: class spreads, (M, D), positive.

    Returns:
        A scalar with the dtype of ``features``.
    """
    difference = features - centers.detach()[labels]
    variance = sigma[labels].square()
    squares = difference.square()
    return 0.5 * (squares + squares / variance + variance.log()).sum(1).mean()


def update_centers(centers: Tensor, features: Tensor, labels: Tensor, rate: float) -> Tensor:
    """Move the class centres by the centre-loss rule (Wen et al., ECCV 2016, Eq. 4), as BONN section 2.3.3 asks.

    c_m <- c_m - rate * sum_{y_b = m} (c_m - f_b) / (1 + count_m); classes without a sample stay.

    Args:
        centers: (M, D); not changed.
        features: (B, D).
        labels: (B,), int64.
        rate: the centres' own learning rate, 0 to 1.

    Returns:
        The new centres, (M, D).
    """
    features = features.detach().to(centers.dtype)
    difference = torch.zeros_like(centers).index_add_(0, labels, centers[labels] - features)
    # not bincount, which waits for the GPU
    count = centers.new_zeros(len(centers)).index_add_(0, labels, centers.new_ones(len(labels)))
    return centers - rate * difference / (1 + count)[:, None]
