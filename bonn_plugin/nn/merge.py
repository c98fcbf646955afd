"""What pulls the filters of a layer together while it trains (BONN, IJCV 2022, section on Bayesian pruning)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from bonn_plugin.functional import group_mean
from bonn_plugin.functional.grouping import group_centers, member_shares, pruning_sum, pull, squared_distance


class FilterMerge(nn.Module):
    """Groups of a layer's filters, the strength of their pull, and the spread of each group.

    Until ``start`` it changes nothing. Psi of a group is sigma^2 times the identity, as Eq. 9 has it of the
    kernel prior; sigma is learned as its logarithm and kept above ``floor``: log det Psi is unbounded below.

    Args:
        filters: C_out of the layer.
        most_groups: the most groups there can be.
        floor: smallest sigma, in units of the weights.
    """

    parameter_roles: ClassVar[dict[str, str]] = {"log_sigma": "group_sigma"}

    groups: Tensor
    kept: Tensor
    shares: Tensor

    def __init__(self, filters: int, most_groups: int, floor: float) -> None:
        super().__init__()
        self.floor = floor
        self.gamma = 0.0
        self.zeroed = False
        self.log_sigma = nn.Parameter(torch.zeros(most_groups))
        # Not in the model's state: a later run that starts from these weights finds its own groups.
        self.register_buffer("groups", torch.arange(filters), persistent=False)
        self.register_buffer("kept", torch.ones(filters, dtype=torch.bool), persistent=False)
        self.register_buffer("shares", torch.ones(filters), persistent=False)
        self._centers: Tensor | None = None

    def set_groups(self, groups: Tensor) -> None:
        """Take the group of each filter, int64 (C_out,); the first of each group is the one that stands for it."""
        self.groups = groups.to(self.groups)
        self.shares = member_shares(self.groups, self.shares.dtype)
        places = torch.arange(len(groups), device=self.groups.device)
        first = torch.full_like(places, len(groups)).scatter_reduce_(0, self.groups, places, "amin")
        self.kept = first[self.groups] == places

    @torch.no_grad()
    def start(self, weight: Tensor, groups: Tensor) -> None:
        """Begin with these groups; sigma starts as the standard deviation within each group."""
        self.set_groups(groups)
        flat = weight.detach().flatten(1)
        squares = (flat - group_mean(flat, self.groups)).square().mean(1)
        members = torch.bincount(self.groups, minlength=len(self.log_sigma)).clamp(min=1)
        variance = torch.zeros_like(self.log_sigma).index_add_(0, self.groups, squares) / members
        self.log_sigma.copy_(variance.sqrt().clamp(min=self.floor).log())

    def forward(self, weight: Tensor) -> Tensor:
        """Return (1 - gamma) X + gamma X̄ for a kernel X, (C_out, ...)."""
        if self.gamma == 0:
            return weight
        centers = group_centers(weight, self.groups, self.shares)
        self._centers = centers if self.training and self.gamma < 1 else None
        return pull(weight, self.groups, self.shares, self.gamma, centers)

    def gate(self, output: Tensor) -> Tensor:
        """Set the outputs (B, C_out, H, W) of all but each group's first filter to zero, once ``zeroed`` is on."""
        return output * self.kept.to(output.dtype)[:, None, None] if self.zeroed else output

    def squared_distance(self, weight: Tensor) -> Tensor:
        """Return ||X_i - X̄||^2 of each filter of the layer's latent kernel, (C_out,), once a forward pass."""
        centers, self._centers = self._centers, None
        if centers is None:
            centers = group_centers(weight, self.groups, self.shares)
        return squared_distance(weight, self.groups, centers)

    @torch.no_grad()
    def settle(self, weight: Tensor) -> None:
        """Make every filter the mean of its group, in place."""
        weight.copy_(group_mean(weight, self.groups))

    @torch.no_grad()
    def distance(self, weight: Tensor) -> float:
        """Return how far the filters are from their groups' means: ||X - X̄|| / ||X||."""
        x = weight.detach()
        return float((x - group_mean(x, self.groups)).norm() / x.norm().clamp(min=torch.finfo(x.dtype).tiny))

    @property
    def group_count(self) -> int:
        """Number of groups; C_out before the start."""
        return len(self.shares)

    @property
    def sigma(self) -> Tensor:
        """Spread of each group, at least ``floor``; entries beyond ``group_count`` have no meaning."""
        return self.log_sigma.exp().clamp(min=self.floor)

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        return f"{len(self.groups)} filters, {self.group_count} groups, gamma={self.gamma:g}, zeroed={self.zeroed}"


def model_pruning_loss(merges: Sequence[FilterMerge], weights: Sequence[Tensor], nu: float) -> Tensor:
    """Return the sum over layers of ``functional.pruning_loss``, a scalar.

    What there is one number a filter of is done for all layers together: a layer's own dozen small
    operations would cost more than its distances. The layers have one ``floor`` in common.
    """
    squares = [merge.squared_distance(weight) for merge, weight in zip(merges, weights, strict=True)]
    sizes = [s.new_full(s.shape, weight[0].numel()) for s, weight in zip(squares, weights, strict=True)]
    sigma = torch.cat([merge.log_sigma for merge in merges]).exp().clamp(min=merges[0].floor)
    places, offset = [], 0
    for merge in merges:
        places.append(merge.groups + offset)
        offset += len(merge.log_sigma)
    return pruning_sum(torch.cat(squares), sigma.index_select(0, torch.cat(places)), torch.cat(sizes), nu)


__all__ = ["FilterMerge", "model_pruning_loss"]
