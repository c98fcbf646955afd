"""Which samples a step sees, on which process, and the random numbers of each.

All of it is a function of seed, epoch and place: nothing depends on what was drawn before, on the number of
loader workers or on the number of processes. So a run can go on from any step, on another number of processes too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from bonn_plugin.errors import DataError


@dataclass(frozen=True)
class Share:
    """Which part of each batch falls to this process.

    Attributes:
        rank: this process, from 0.
        ranks: processes.
        parts: micro-batches that a process takes one after the other in a step.
    """

    rank: int = 0
    ranks: int = 1
    parts: int = 1

    @property
    def pieces(self) -> int:
        """Pieces that a batch is cut into."""
        return self.ranks * self.parts


@dataclass(frozen=True)
class Draw:
    """A sample, and the seed of its augmentation."""

    index: int
    seed: int


ALONE = Share()
"""All of each batch."""


class EpochSampler(Sampler[int]):
    """A new order each epoch that depends on seed and epoch alone, so that a resumed run repeats it."""

    def __init__(self, data: Sized, seed: int) -> None:
        self.data = data
        self.seed = seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        yield from self.drawn()[0].tolist()

    def __len__(self) -> int:
        return len(self.data)

    def drawn(self) -> tuple[Tensor, Tensor]:
        """Return the epoch's order and a seed for each place in it, int64 (N,) each."""
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        order = torch.randperm(len(self.data), generator=generator)
        return order, torch.randint(2**62, (len(order),), generator=generator)


class StepSampler(Sampler[list[Draw]]):
    """The micro-batches of one process, from a step of an epoch on; the last, smaller batch is dropped.

    The samples of a step are those of one process with the same ``batch_size``, cut into equal pieces.

    Args:
        data: the training set.
        seed: of the order.
        batch_size: samples a step over all processes; a multiple of ``share.pieces``.
        share: which pieces are this process's.

    Attributes:
        epoch: whose order it is.
        start: the first step to yield.
    """

    def __init__(self, data: Sized, seed: int, batch_size: int, share: Share = ALONE) -> None:
        if batch_size % share.pieces:
            raise ValueError(f"a batch of {batch_size} can't be cut into {share.pieces} equal pieces")
        self.order = EpochSampler(data, seed)
        self.batch_size = batch_size
        self.share = share
        self.epoch = 0
        self.start = 0

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.order) // self.batch_size

    def __len__(self) -> int:
        return (self.steps - self.start) * self.share.parts

    def __iter__(self) -> Iterator[list[Draw]]:
        self.order.epoch = self.epoch
        order, seeds = self.order.drawn()
        size = self.batch_size // self.share.pieces
        for step in range(self.start, self.steps):
            for part in range(self.share.parts):
                first = step * self.batch_size + (part * self.share.ranks + self.share.rank) * size
                piece = slice(first, first + size)
                yield [Draw(*draw) for draw in zip(order[piece].tolist(), seeds[piece].tolist(), strict=True)]

    def samples(self, epoch: int, step: int) -> list[int]:
        """Return the indices of a step's samples, over all processes."""
        self.order.epoch = epoch
        order = self.order.drawn()[0]
        return [int(i) for i in order[step * self.batch_size : (step + 1) * self.batch_size]]


class Corrupt:
    """Training samples that can't be read: how many there may be, and which were met.

    Args:
        samples: size of the training set.
        limit: how many may be skipped.
    """

    def __init__(self, samples: int, limit: int) -> None:
        self.limit = limit
        self.met = torch.zeros(samples, dtype=torch.uint8)
        self.met.share_memory_()  # type: ignore[no-untyped-call]  # loader processes write into it

    def add(self, index: int, error: DataError) -> None:
        """Note a sample.

        Raises:
            DataError: there are more than the limit.
        """
        self.met[index] = 1
        if len(self.indices) > self.limit:
            allowed = f"; more than max_corrupt: {self.limit} can't be read" if self.limit else ""
            raise DataError(f"{error}{allowed}") from error

    @property
    def indices(self) -> list[int]:
        """Samples that could not be read."""
        return [int(i) for i in self.met.nonzero().flatten()]


class Drawn(Dataset[Any]):
    """A data set that takes a ``Draw``: the augmentation's numbers follow from the draw's seed.

    A sample that can't be read is skipped: the next one that can takes its place, so that batches keep their size.
    """

    def __init__(self, data: Any, corrupt: Corrupt) -> None:
        self.data = data
        self.corrupt = corrupt

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, draw: Draw) -> Any:
        index = draw.index
        while True:
            before = torch.default_generator.get_state()
            torch.default_generator.manual_seed(draw.seed)
            try:
                return self.data[index]
            except DataError as error:
                self.corrupt.add(index, error)
                index = (index + 1) % len(self.data)
            finally:
                torch.default_generator.set_state(before)


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of one epoch's order and augmentation."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint32)[0])


def seed_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed every generator of the process for one step: Python's, numpy's, torch's, and those of its GPUs."""
    drawn = int(np.random.SeedSequence([seed, epoch, step, rank]).generate_state(1, np.uint32)[0])
    random.seed(drawn)
    np.random.seed(drawn)
    torch.manual_seed(drawn)
