"""Packing of signs: one bit a weight, least significant bit first (the order of OpenVINO's u1)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


def pack_signs(weight: Tensor) -> Tensor:
    """Pack the signs of a kernel, one bit each: 1 stands for +1 (``weight >= 0``), 0 for -1.

    Args:
        weight: (filters, ...), any floating dtype; n elements a filter.

    Returns:
        uint8 of shape (filters, ceil(n / 8)); bit k of byte j of a row is element 8 j + k of the
        filter, flattened row-major. The last byte is padded with zero bits.

    >>> pack_signs(torch.tensor([[1.0, -1.0, 1.0]]))
    tensor([[5]], dtype=torch.uint8)
    """
    filters = weight.shape[0]
    bits = (weight.detach().reshape(filters, -1) >= 0).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8)).view(filters, -1, 8)
    return (bits << _shifts(bits)).sum(-1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Undo ``pack_signs``.

    Args:
        packed: uint8, (filters, ceil(n / 8)).
        shape: shape of the result; its first entry is ``filters``, the product of the rest is n.
        dtype: dtype of the result.

    Returns:
        A tensor of +1 and -1 with the given shape and dtype.

    Raises:
        ValueError: ``packed`` is not uint8, or its shape does not hold ``shape``.

    >>> unpack_signs(torch.tensor([[5]], dtype=torch.uint8), (1, 3))
    tensor([[ 1., -1.,  1.]])
    """
    n = prod(shape[1:])
    expected = (shape[0], -(-n // 8))
    if packed.dtype != torch.uint8 or tuple(packed.shape) != expected:
        raise ValueError(
            f"packed signs are {packed.dtype} {tuple(packed.shape)}; shape {tuple(shape)} needs torch.uint8 {expected}"
        )
    bits = (packed[..., None] >> _shifts(packed)) & 1
    return bits.view(shape[0], -1)[:, :n].reshape(tuple(shape)).to(dtype).mul_(2).sub_(1)


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
