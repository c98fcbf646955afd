"""Bayesian pruning (BONN, IJCV 2022, Eq. 3.104-3.107): filters in groups, their means, and the loss that pulls."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def group_count(filters: int, keep: float) -> int:
    """Return J = max(1, round(keep * filters)), the groups that ``keep`` asks of a layer.

    >>> group_count(64, 0.25)
    16
    """
    return max(1, round(keep * filters))


def group_filters(weight: Tensor, keep: float, seed: int) -> Tensor:
    """Divide a layer's filters into groups by K-means (Eq. 3.104), at most J = max(1, round(keep * C_out)).

    Groups are numbered in the order of their first filter. There are fewer than J where the layer has
    fewer than J different filters, or where a group lost all its filters: nothing is made up to fill them.

    Args:
        weight: latent kernel X, (C_out, ...), floating point.
        keep: share of filters to keep, 0 < keep <= 1; 1 puts each filter in a group of its own.
        seed: of the K-means initialisation.

    Returns:
        int64 (C_out,), the group of each filter, on the device of ``weight``.

    Raises:
        ValueError: ``keep`` is out of range, or the weight has values that are not finite.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be above 0 and at most 1, not {keep}")
    filters = weight.detach().flatten(1).float().cpu().numpy()
    if not np.isfinite(filters).all():
        raise ValueError("the weight has values that are not finite")
    groups = group_count(len(filters), keep)
    if groups == len(filters):
        return torch.arange(len(filters), device=weight.device)
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    # One thread: the work is small, and the threads of BLAS and OpenMP wait for each other many times over.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different filters than groups: see above
        labels = KMeans(groups, n_init=1, random_state=seed).fit(_coordinates(filters)).labels_
    return torch.from_numpy(_in_order(labels)).to(weight.device)


def sensitivity_keeps(weights: Sequence[Tensor], keep: float) -> list[float]:
    """Choose the share of filters to keep in each layer, so that over all layers ``keep`` of the weights stay.

    Ward's hierarchy of a layer's filters tells by how much each merging of two groups raises the variance
    within the groups. Mergings are taken over all layers together in the order of that rise, in units of
    the layer's mean variance of a filter: so the error, each weight counting alike, stays smallest.

    Args:
        weights: latent kernels, each (C_out, ...).
        keep: wanted share of all weights, 0 < keep <= 1. Each layer keeps one filter at least.

    Returns:
        The share of each layer, a multiple of 1 / C_out.

    Raises:
        ValueError: ``keep`` is out of range.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be above 0 and at most 1, not {keep}")
    from scipy.cluster.hierarchy import ward

    sizes = [w[0].numel() for w in weights]
    steps: list[tuple[float, int, int]] = []
    for layer, weight in enumerate(weights):
        filters = weight.detach().flatten(1).double().cpu().numpy()
        if len(filters) < 2:
            continue
        rise = ward(filters)[:, 2] ** 2 / 2  # Ward's distance squared is twice the rise of the sum of squares
        total = max(float(rise.sum()), np.finfo(float).tiny)
        steps += [(len(filters) * float(r) / total, layer, i) for i, r in enumerate(rise)]
    kept = [len(w) for w in weights]
    left = sum(w.numel() for w in weights)
    wanted = keep * left
    for _, layer, _ in sorted(steps):
        if left - sizes[layer] / 2 < wanted:  # rounded to the nearest whole filter
            break
        kept[layer] -= 1
        left -= sizes[layer]
    return [k / len(w) for k, w in zip(kept, weights, strict=True)]


class _Pull(Function):
    """X -> (1 - gamma) X + gamma X̄. The map is symmetric: it takes the gradient as it takes the kernel."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, groups: Tensor, shares: Tensor, gamma: float, centers: Tensor) -> Tensor:
        ctx.save_for_backward(groups, shares)
        ctx.gamma = gamma
        mean = _spread(centers, groups, weight)
        return mean if gamma == 1 else torch.lerp(weight, mean, gamma, out=mean)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        groups, shares = ctx.saved_tensors
        mean = _spread(group_centers(grad, groups, shares), groups, grad)
        pulled = mean if ctx.gamma == 1 else mean.lerp_(grad, 1 - ctx.gamma)
        return pulled, None, None, None, None


def pull(weight: Tensor, groups: Tensor, shares: Tensor, gamma: float, centers: Tensor) -> Tensor:
    """Like ``merge_filters``, for who has ``member_shares(groups)`` and ``group_centers(weight, ...)`` at hand."""
    pulled: Tensor = _Pull.apply(weight, groups, shares, gamma, centers)
    return pulled


def merge_filters(weight: Tensor, groups: Tensor, gamma: float) -> Tensor:
    """Pull the filters to their groups' means: (1 - gamma) X + gamma X̄; at gamma = 1 exactly X̄.

    At gamma = 1 members of a group get the same bits, and so do their gradients, the mean of the members'.

    Args:
        weight: X, (C_out, ...), floating point.
        groups: int64 (C_out,), from 0 with no number left out.
        gamma: strength of the pull, 0 to 1.

    Returns:
        A tensor with the shape and dtype of ``weight``.
    """
    if gamma == 0:
        return weight
    shares = member_shares(groups, weight.dtype)
    return pull(weight, groups, shares, gamma, group_centers(weight, groups, shares))


def group_mean(weight: Tensor, groups: Tensor) -> Tensor:
    """Return the mean of each filter's group, X̄, in the filter's place: ``merge_filters`` at gamma = 1."""
    return merge_filters(weight, groups, 1.0)


def member_shares(groups: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return one over the number of members of each group, (G,)."""
    return torch.bincount(groups).to(dtype).reciprocal()


def group_centers(weight: Tensor, groups: Tensor, shares: Tensor) -> Tensor:
    """Return the mean X̄ of each group, (G, n), without gradient; ``shares`` from ``member_shares``."""
    x = weight.detach().reshape(len(groups), -1)
    return x.new_zeros(len(shares), x.shape[1]).index_add_(0, groups, x).mul_(shares[:, None])


def _spread(centers: Tensor, groups: Tensor, like: Tensor) -> Tensor:
    return centers.index_select(0, groups).view(like.shape)


class _SquaredDistance(Function):
    """||X_i - X̄||^2 of each filter. X̄ counts as a constant: see ``pruning_loss``.

    The differences are made again for the gradient: kept over the step for all layers they would be as much memory
    as the kernels, and taking that anew in each step costs more than the subtraction.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, groups: Tensor, centers: Tensor) -> Tensor:
        ctx.save_for_backward(weight, groups, centers)
        distance = _spread(centers, groups, weight).sub_(weight)
        norms: Tensor = torch.linalg.vector_norm(distance.flatten(1), dim=1)
        return norms.square_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, groups, centers = ctx.saved_tensors
        distance = _spread(centers, groups, weight).sub_(weight)
        return distance.mul_((-2 * grad).view(-1, *[1] * (weight.dim() - 1))), None, None


def squared_distance(weight: Tensor, groups: Tensor, centers: Tensor) -> Tensor:
    """Return ||X_i - X̄||^2 of each filter, (C_out,); ``centers`` from ``group_centers``, taken as constant."""
    squares: Tensor = _SquaredDistance.apply(weight, groups, centers)
    return squares


def pruning_sum(squares: Tensor, sigma: Tensor, n: Tensor | int, nu: float) -> Tensor:
    """Return Eq. 3.107 summed over filters with one sigma each, which may be those of many layers in a row.

    Args:
        squares: ``squared_distance`` of each filter, (F,).
        sigma: spread of each filter's group, (F,), positive.
        n: elements of a filter, or (F,).
        nu: variance of the error.
    """
    variance = sigma.square()
    loss: Tensor = (squares + nu * (squares / variance + n * variance.log())).sum()
    return loss


def pruning_loss(weight: Tensor, groups: Tensor, sigma: Tensor, nu: float) -> Tensor:
    """Bayesian pruning loss of one layer, Eq. 3.107 summed over the filters.

    sum_i { ||X_i - X̄||^2 + nu (X_i - X̄)^T Psi^-1 (X_i - X̄) + nu log det Psi }, with X̄ and Psi those of the
    filter's group. Psi is diagonal, its entries sigma^2. The gradients are those of this sum.

    Args:
        weight: latent kernel X, (C_out, ...); a filter has n elements.
        groups: int64 (C_out,), from 0 to G - 1.
        sigma: positive spreads, (G,): one for all n elements of a group, or (G, ...) with n elements each.
        nu: variance of the error, in squared units of the weights.

    Returns:
        A scalar with the dtype of ``weight``.

    Raises:
        ValueError: ``sigma`` has another shape.
    """
    # The means count as constants: the distances of a group add up to 0, so nothing of the gradient is lost.
    centers = group_centers(weight, groups, member_shares(groups, weight.dtype))
    own = sigma.index_select(0, groups)
    if sigma.dim() == 1:
        return pruning_sum(squared_distance(weight, groups, centers), own, weight[0].numel(), nu)
    if sigma[0].numel() != weight[0].numel():
        raise ValueError(
            f"sigma is {tuple(sigma.shape)}: it must be (groups,), or (groups, ...) with the "
            f"{weight[0].numel()} elements of a filter"
        )
    variance = own.square().view_as(weight)
    squares = (weight - _spread(centers, groups, weight)).square()
    return (squares + nu * (squares / variance + variance.log())).sum()


def _coordinates(filters: Any) -> Any:
    """Return the filters in an orthonormal basis of what they span: same distances, C_out numbers a filter."""
    if filters.shape[1] <= filters.shape[0]:
        return filters
    triangle: Any = np.linalg.qr(filters.T, mode="r")
    return triangle.T


def _in_order(labels: Any) -> Any:
    """Number labels anew by first appearance."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]
