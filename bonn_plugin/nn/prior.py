"""The learned parameters of the kernel prior (BONN, Eq. 6 and 9)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn


class BimodalPrior(nn.Module):
    """Mode mu and spread sigma of each filter of one layer, estimated from the weights (Algorithm 1, line 1).

    sigma is learned as its logarithm and kept above ``floor``: log sigma^2 is unbounded below.

    Args:
        weight: latent kernel, (C_out, ...); mu_i = mean |X_i|, sigma_i = standard deviation of |X_i|.
        floor: smallest sigma, in units of the weights.
    """

    parameter_roles: ClassVar[dict[str, str]] = {"mu": "mu", "log_sigma": "sigma"}

    started: Tensor

    def __init__(self, weight: Tensor, floor: float) -> None:
        super().__init__()
        self.floor = floor
        self.mu = nn.Parameter(weight.new_zeros(weight.shape[0]))
        self.log_sigma = nn.Parameter(weight.new_zeros(weight.shape[0]))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self._estimate(weight)

    def start(self, weight: Tensor) -> None:
        """Estimate anew when the loss begins: the weights may have trained without it. Later calls do nothing."""
        if not bool(self.started):
            self._estimate(weight)
            self.started.fill_(True)

    @torch.no_grad()
    def _estimate(self, weight: Tensor) -> None:
        magnitude = weight.detach().abs().flatten(1)
        self.mu.copy_(magnitude.mean(1))
        self.log_sigma.copy_(magnitude.std(1, unbiased=False).clamp(min=self.floor).log())

    @property
    def sigma(self) -> Tensor:
        """Spread of each filter, (C_out,), at least ``floor``."""
        return self.log_sigma.exp().clamp(min=self.floor)

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        return f"{self.mu.numel()}, floor={self.floor:g}"


__all__ = ["BimodalPrior"]
