"""ReActNet's activation: a PReLU whose kink is learned in both directions (ECCV 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bonn_plugin.nn.storage import Role, StoredTensor, register_replacement

FIRST_SLOPE = 0.25
"""Slope of negative inputs where no PReLU gives another, as in ``torch.nn.PReLU``."""


@register_replacement("rprelu")
class RPReLU(nn.Module):
    """x - gamma + zeta where x > gamma, beta (x - gamma) + zeta elsewhere; each (C,), one number a channel.

    Parameters: ``weight`` beta, ``shift_in`` gamma, ``shift_out`` zeta; gamma and zeta begin at 0.

    Args:
        channels: C.
        original_slopes: slopes that the activation has which this one replaces: C or 1 of a PReLU, else 0. The
            rest was added.

    Raises:
        ValueError: no channels.
    """

    kind: str

    def __init__(self, channels: int, original_slopes: int = 0) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"{channels} channels")
        self.original_slopes = original_slopes
        self.weight = nn.Parameter(torch.full((channels,), FIRST_SLOPE))
        self.shift_in = nn.Parameter(torch.zeros(channels))
        self.shift_out = nn.Parameter(torch.zeros(channels))

    @classmethod
    def like(cls, activation: nn.Module, channels: int) -> RPReLU:
        """Return one in the place of ``activation``: with the slopes of a PReLU, with 0.25 in that of any other."""
        slopes = activation.weight if isinstance(activation, nn.PReLU) else None
        made = cls(channels, 0 if slopes is None else slopes.numel())
        if slopes is not None:
            with torch.no_grad():
                made.weight.copy_(slopes.expand(channels))
            made.to(slopes)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        shifted = x - self.shift_in.to(x.dtype)[:, None, None]
        bent = nn.functional.prelu(shifted, self.weight.to(x.dtype))
        return bent + self.shift_out.to(x.dtype)[:, None, None]

    def stored_tensors(self) -> Mapping[str, StoredTensor]:
        """Declare the slopes, as many of them original as the replaced activation had, and the shifts."""
        n = self.weight.numel()
        bits = self.weight.element_size() * 8
        return {
            "weight": StoredTensor(self.weight, Role.REAL_WEIGHT, n, bits, self.original_slopes),
            "shift_in": StoredTensor.real(self.shift_in, Role.THRESHOLD, added=True),
            "shift_out": StoredTensor.real(self.shift_out, Role.THRESHOLD, added=True),
        }

    def spec(self) -> dict[str, Any]:
        """Return the JSON-ready arguments of ``from_spec``."""
        return {"channels": self.weight.numel(), "original_slopes": self.original_slopes}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> RPReLU:
        """Build it. Raises ValueError on a spec that makes no sense."""
        channels, slopes = spec.get("channels"), spec.get("original_slopes")
        if type(channels) is not int or type(slopes) is not int or not 0 <= slopes <= channels:
            raise ValueError(f"not the numbers of an RPReLU: {channels!r}, {slopes!r}")
        return cls(channels, slopes)

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        return f"{self.weight.numel()}"


__all__ = ["RPReLU"]
