"""Where a sign changes: a threshold per channel that decides as torch does, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = torch.finfo(torch.float32).tiny
LARGEST = torch.finfo(torch.float32).max
_LAST = 0x7F7FFFFF
"""Bits of the largest float32: the floats from -LARGEST to LARGEST are numbered from -_LAST to _LAST."""
_WIDTH = 16
"""Torch's kernels may round the rest of a row otherwise than whole vectors: whole vectors are asked."""


@dataclass(frozen=True)
class Cut:
    """The sign of channel c is +1 where x > above[c], or where x <= above[c] if falling[c].

    The engine compares strictly and treats subnormal numbers as zero, so ``above`` is never subnormal.

    Attributes:
        above: float32 (C,).
        falling: bool (C,).
    """

    above: Tensor
    falling: Tensor

    @classmethod
    def at(cls, threshold: Tensor) -> Cut:
        """Return the cut of x >= threshold, (C,).

        >>> Cut.at(torch.tensor([0.0, 1.0])).above.tolist()
        [-1.1754943508222875e-38, 0.9999999403953552]
        """
        below = torch.nextafter(threshold, torch.tensor(-torch.inf)).clamp(-LARGEST, LARGEST)
        return cls(_normal(below, threshold > 0), torch.zeros_like(threshold, dtype=torch.bool))

    @classmethod
    def through(cls, norm: Callable[[Tensor], Tensor], threshold: Tensor) -> Cut:
        """Return the cut of norm(x) >= threshold in terms of x.

        A batch norm rounds, but in every channel it rises or falls throughout; so the last float before the
        change of sign is found by halving, with torch's own arithmetic.

        Args:
            norm: (1, C, 1, n) to the same shape, each channel monotonic.
            threshold: (C,).
        """
        channels = len(threshold)

        def normed(number: Tensor) -> Tensor:
            x = _float(number)[None, :, None, None].expand(1, channels, 1, _WIDTH).contiguous()
            return norm(x)[0, :, 0, 0]

        def positive(number: Tensor) -> Tensor:
            return normed(number) - threshold >= 0

        low = torch.full((channels,), -_LAST, dtype=torch.long)
        high = -low
        falling = normed(low) > normed(high)
        constant = positive(low) == positive(high)
        always = constant & positive(low)
        while bool((high - low > 1).any()):
            middle = (low + high).div(2, rounding_mode="floor")
            before = positive(middle) == falling  # the sign is still that of the low end
            low, high = torch.where(before, middle, low), torch.where(before, high, middle)
        above = _normal(_float(low), low >= 0)
        above = torch.where(constant, torch.where(always == falling, LARGEST, -LARGEST), above)
        return cls(above, falling)

    def joined(self, other: Cut) -> Cut:
        """Return the cut of these channels and then those of ``other``."""
        return Cut(torch.cat([self.above, other.above]), torch.cat([self.falling, other.falling]))


def _float(number: Tensor) -> Tensor:
    magnitude = number.abs().to(torch.int32).view(torch.float32)
    return torch.where(number < 0, -magnitude, magnitude)


def _normal(below: Tensor, zero_is_below: Tensor) -> Tensor:
    """Move subnormal cuts: to 0 where 0 lies on the low side, else past it."""
    subnormal = below.abs() < SMALLEST
    return torch.where(subnormal, torch.where(zero_is_below, 0.0, -SMALLEST), below)


__all__ = ["Cut"]
