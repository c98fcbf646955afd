"""Training and test sets, their order, and their loaders, whatever the samples are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from bonn_plugin.errors import DataError

Collate = Callable[[list[Any]], Any]


class SizedDataset(Protocol):
    """A data set with a length, of (image (C, H, W) float32, its label), the label as the task has it."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Tensor, Any]: ...


@dataclass(frozen=True)
class Splits:
    """Training set, test set, and the number of classes."""

    train: SizedDataset
    test: SizedDataset
    classes: int


class EpochSampler(Sampler[int]):
    """A new order each epoch that depends on seed and epoch alone, so that a resumed run repeats it."""

    def __init__(self, data: Sized, seed: int) -> None:
        self.data = data
        self.seed = seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        yield from torch.randperm(len(self.data), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.data)


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of one epoch's order, augmentation and dropout."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint32)[0])


def train_loader(
    splits: Splits, batch_size: int, seed: int, workers: int, pin: bool = False, collate: Collate | None = None
) -> tuple[DataLoader[Any], EpochSampler]:
    """Return the loader of training batches and the sampler whose ``epoch`` orders them.

    A batch is (B, C, H, W), (B,), or what ``collate`` makes of a list of samples.
    """
    sampler = EpochSampler(splits.train, seed)
    loader = _Loader(
        cast(Dataset[Any], splits.train),
        batch_size,
        sampler=sampler,
        num_workers=workers,
        drop_last=True,
        pin_memory=pin,
        collate_fn=collate,
    )
    return loader, sampler


def evaluation_loader(
    splits: Splits, batch_size: int, workers: int, pin: bool = False, collate: Collate | None = None
) -> DataLoader[Any]:
    """Return the loader of all test samples in order; see ``train_loader``."""
    data = cast(Dataset[Any], splits.test)
    return _Loader(data, batch_size, num_workers=workers, pin_memory=pin, collate_fn=collate)


class _Loader(DataLoader[Any]):
    """A loader whose workers' mistakes are one line too: torch puts their traceback into the message."""

    def __iter__(self) -> Any:
        try:
            yield from super().__iter__()
        except DataError as error:
            last = str(error).strip().splitlines()[-1]
            raise DataError(last.removeprefix(f"{DataError.__module__}.{DataError.__qualname__}: ")) from None
