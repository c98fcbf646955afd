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


class _GroupMean(Function):
    """X -> X̄_group. The map is symmetric: the gradient of a filter is the mean over its group's members."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, groups: Tensor) -> Tensor:
        ctx.save_for_backward(groups)
        return _means(weight, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (groups,) = ctx.saved_tensors
        return _means(grad, groups), None


def group_mean(weight: Tensor, groups: Tensor) -> Tensor:
    """Return the mean of each filter's group, X̄, in the filter's place.

    Members of a group get the same bits, in the forward pass and in their gradients.

    Args:
        weight: (C_out, ...), floating point.
        groups: int64 (C_out,), from 0.

    Returns:
        A tensor with the shape and dtype of ``weight``.
    """
    mean: Tensor = _GroupMean.apply(weight, groups)
    return mean


def merge_filters(weight: Tensor, groups: Tensor, gamma: float) -> Tensor:
    """Pull the filters to their groups' means: (1 - gamma) X + gamma X̄; at gamma = 1 exactly X̄.

    Args:
        weight: X, (C_out, ...).
        groups: int64 (C_out,), from 0.
        gamma: strength of the pull, 0 to 1.
    """
    if gamma == 0:
        return weight
    mean = group_mean(weight, groups)
    return mean if gamma == 1 else torch.lerp(weight, mean, gamma)


class _PruningLoss(Function):
    """Eq. 3.107. The gradients are by-products of the loss, so both are made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, groups: Tensor, sigma: Tensor, nu: float) -> Tensor:
        x = weight.flatten(1)
        n = x.shape[1]
        scalar = sigma.dim() == 1
        spread = sigma[:, None] if scalar else sigma.flatten(1)
        members = _members(groups, len(sigma), x.dtype)[:, None]
        distance = x - _means(x, groups)
        squares = distance.square()
        if scalar:
            squares = squares.sum(1, keepdim=True)
        within = torch.zeros_like(spread).index_add_(0, groups, squares)  # sum over a group's members
        precision = nu / spread.square()
        times = n if scalar else 1  # entries of Psi's diagonal that share one sigma
        log_det = times * (members * spread.square().log()).sum()
        loss = within.sum() + (precision * within).sum() + nu * log_det
        grad_x = distance * (2 * (1 + precision))[groups]
        grad_sigma = 2 * (nu * times * members - precision * within) / spread
        ctx.save_for_backward(grad_x.view_as(weight), grad_sigma.view_as(sigma))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
        grad_x, grad_sigma = ctx.saved_tensors
        return grad * grad_x, None, grad * grad_sigma, None


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
    if sigma.dim() != 1 and sigma[0].numel() != weight[0].numel():
        raise ValueError(
            f"sigma is {tuple(sigma.shape)}: it must be (groups,), or (groups, ...) with the "
            f"{weight[0].numel()} elements of a filter"
        )
    loss: Tensor = _PruningLoss.apply(weight, groups, sigma, nu)
    return loss


def _means(x: Tensor, groups: Tensor) -> Tensor:
    # Room for as many groups as filters: their true number would have to be read from the device.
    flat = x.reshape(len(groups), -1)
    sums = torch.zeros_like(flat).index_add_(0, groups, flat)
    count = _members(groups, len(groups), flat.dtype)
    return (sums.index_select(0, groups) / count[groups, None]).view_as(x)


def _members(groups: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    ones = torch.ones(len(groups), dtype=dtype, device=groups.device)
    return ones.new_zeros(length).index_add_(0, groups, ones)


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
