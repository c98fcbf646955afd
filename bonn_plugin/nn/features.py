"""The penultimate features, their class centres and spreads (BONN, Eq. 8)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from bonn_plugin.collective import gather_rows
from bonn_plugin.functional import feature_loss, update_centers


class FeatureTap:
    """Keeps the input of a module, (B, D), of the last forward pass in training mode."""

    def __init__(self, module: nn.Module) -> None:
        self._features: Tensor | None = None
        self._handle = module.register_forward_pre_hook(self._hook)

    def _hook(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if module.training:
            self._features = args[0]

    def take(self) -> Tensor | None:
        """Return the features once, None when there was no forward pass since."""
        features, self._features = self._features, None
        return features

    def remove(self) -> None:
        """Take the hook away."""
        self._handle.remove()


class FeatureClusters(nn.Module):
    """Class centres c_m and spreads sigma_m of the Bayesian feature loss.

    They start as means and standard deviations per class, gathered by ``gather``; then the centres move
    by the centre-loss rule and the spreads, learned as logarithms, by gradient.

    Args:
        classes: M.
        features: D.
        floor: smallest spread, in units of the features.
    """

    parameter_roles: ClassVar[dict[str, str]] = {"log_sigma": "feature_sigma"}
    centers: Tensor
    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, classes: int, features: int, floor: float = 1e-2) -> None:
        super().__init__()
        self.floor = floor
        self.log_sigma = nn.Parameter(torch.zeros(classes, features))
        self.register_buffer("centers", torch.zeros(classes, features))
        self.register_buffer("count", torch.zeros(classes))
        self.register_buffer("mean", torch.zeros(classes, features))
        self.register_buffer("squares", torch.zeros(classes, features))

    @torch.no_grad()
    def gather(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch, (B, D) and (B,), of all processes to the statistics of its classes (Chan et al.'s update)."""
        x, labels = gather_rows(features.to(self.mean.dtype)), gather_rows(labels)
        count = torch.zeros_like(self.count).index_add_(0, labels, torch.ones_like(x[:, 0]))
        mean = torch.zeros_like(self.mean).index_add_(0, labels, x) / count.clamp(min=1)[:, None]
        squares = torch.zeros_like(self.squares).index_add_(0, labels, (x - mean[labels]).square())
        total = self.count + count
        share = (count / total.clamp(min=1))[:, None]
        delta = mean - self.mean
        self.squares += squares + delta.square() * self.count[:, None] * share
        self.mean += delta * share
        self.count.copy_(total)

    @torch.no_grad()
    def start(self) -> None:
        """Set centres and spreads from what was gathered.

        A class without a sample keeps a centre at the mean of all and the mean spread.
        """
        seen = self.count > 0
        sigma = (self.squares / self.count.clamp(min=1)[:, None]).sqrt()
        centers, sigma = self.mean.clone(), sigma
        if not bool(seen.all()):
            centers[~seen] = self.mean[seen].mean(0)
            sigma[~seen] = sigma[seen].mean(0)
        self.centers.copy_(centers)
        self.log_sigma.copy_(sigma.clamp(min=self.floor).log())

    @property
    def sigma(self) -> Tensor:
        """Spread per class and feature, (M, D), at least ``floor``."""
        return self.log_sigma.exp().clamp(min=self.floor)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return ``functional.feature_loss`` with these centres and spreads."""
        return feature_loss(features.to(self.centers.dtype), labels, self.centers, self.sigma)

    @torch.no_grad()
    def move_centers(self, features: Tensor, labels: Tensor, rate: float) -> None:
        """Apply the centre-loss rule to the centres, with the features of all processes."""
        self.centers.copy_(update_centers(self.centers, gather_rows(features), gather_rows(labels), rate))
