"""The few exchanges between processes that train one network; without torch.distributed they do nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def ranks() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows (B, ...) of all processes below each other, without gradient; each must have as many."""
    if ranks() == 1:
        return rows.detach()
    own = rows.detach().contiguous()
    everyone = [torch.empty_like(own) for _ in range(ranks())]
    dist.all_gather(everyone, own)
    return torch.cat(everyone)


@torch.no_grad()
def mean_over_ranks(x: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes, without gradient."""
    if ranks() == 1:
        return x.detach()
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / ranks()


@torch.no_grad()
def most_over_ranks(x: Tensor) -> Tensor:
    """Return the largest of each element over all processes."""
    if ranks() == 1:
        return x.detach()
    most = x.detach().clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most


@torch.no_grad()
def from_first(x: Tensor) -> Tensor:
    """Return what process 0 holds."""
    if ranks() == 1:
        return x
    x = x.detach().clone()
    dist.broadcast(x, 0)
    return x


def gather_objects(own: Any) -> list[Any]:
    """Return what each process gave, in order; tensors must lie on the CPU."""
    if ranks() == 1:
        return [own]
    everyone: list[Any] = [None] * ranks()
    dist.all_gather_object(everyone, own)
    return everyone


class _SumOverRanks(Function):
    """Sum over the processes; so is its gradient, that of the sum of all processes' losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, with gradient."""
    if ranks() == 1:
        return x
    total: Tensor = _SumOverRanks.apply(x)
    return total
