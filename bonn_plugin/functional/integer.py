"""Affine quantisation to 8 bits, sums of integers that are exact in floating point, and packed 4-bit integers."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 255
"""Activations take the integers 0 to 255."""
SMALLEST_SCALE = torch.finfo(torch.float32).eps
"""Smallest scale that is chosen at run time, as in PyTorch's ``choose_qparams``."""
_LARGEST_PRODUCT = LEVELS * 128
_EXACT_IN_FLOAT32 = 2**24


def quantize_affine(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return q - z with q = clamp(round(x / scale) + z, 0, 255): whole numbers as float32, in the shape of ``x``.

    Rounds half to even and multiplies by the reciprocal in float32, as PyTorch's ``quantize_per_tensor`` does.

    Args:
        x: floating point.
        scale: a positive scalar.
        zero_point: z, a scalar, the integer that stands for 0.

    >>> quantize_affine(torch.tensor([-1.0, 0.0, 0.26, 900.0]), torch.tensor(0.1), torch.tensor(3)).tolist()
    [-3.0, 0.0, 3.0, 252.0]
    """
    reciprocal = (1.0 / scale.double()).float()
    z = zero_point.float()
    return torch.clamp(torch.round(x.float() * reciprocal) + z, 0, LEVELS) - z


def affine_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale, float32, and the zero point, int64, that cover the range of ``x`` and 0, both scalars."""
    low, high = torch.aminmax(x.detach().float())
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / float(LEVELS)).clamp(min=SMALLEST_SCALE)
    zero_point = torch.clamp(-torch.round(low / scale).to(torch.int64), 0, LEVELS)
    return scale, zero_point


def sum_dtype(terms: int) -> torch.dtype:
    """Return the floating-point dtype in which a sum of ``terms`` products of 8-bit integers is exact.

    A product is at most 255 * 128, and float32 holds every whole number up to 2^24.

    >>> sum_dtype(514), sum_dtype(515)
    (torch.float32, torch.float64)
    """
    return torch.float32 if terms * _LARGEST_PRODUCT <= _EXACT_IN_FLOAT32 else torch.float64


def pack_int4(values: Tensor) -> Tensor:
    """Pack integers from -8 to 7, (rows, n), two a byte: uint8 (rows, ceil(n / 2)), the first in the low half.

    >>> pack_int4(torch.tensor([[1, -1, 7]])).tolist()
    [[241, 7]]
    """
    nibbles = values.to(torch.int16) & 15
    if nibbles.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).to(torch.uint8)


def unpack_int4(packed: Tensor, n: int) -> Tensor:
    """Undo ``pack_int4`` for rows of ``n``: int8 (rows, n).

    >>> unpack_int4(torch.tensor([[241, 7]], dtype=torch.uint8), 3).tolist()
    [[1, -1, 7]]
    """
    halves = torch.stack([packed & 15, packed >> 4], 2).flatten(1)[:, :n].to(torch.int8)
    return torch.where(halves > 7, halves - 16, halves)


__all__ = ["LEVELS", "affine_of", "pack_int4", "quantize_affine", "sum_dtype", "unpack_int4"]
