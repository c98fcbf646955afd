"""Training and test sets, their order, and their loaders, whatever the samples are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bonn_plugin.errors import DataError
from bonn_plugin.sampling import ALONE, Corrupt, Drawn, Share, StepSampler

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


def train_loader(
    splits: Splits,
    batch_size: int,
    seed: int,
    workers: int,
    pin: bool = False,
    collate: Collate | None = None,
    share: Share = ALONE,
    max_corrupt: int = 0,
) -> tuple[DataLoader[Any], StepSampler]:
    """Return the loader of training batches and the sampler that orders them.

    A batch is (B, C, H, W), (B,), or what ``collate`` makes of a list of samples.

    Args:
        splits: the data.
        batch_size: samples a step, over all processes and micro-batches.
        seed: of order and augmentation.
        workers: loader processes.
        pin: put batches into memory that a GPU can read.
        collate: makes a batch of samples.
        share: which part of each batch is loaded.
        max_corrupt: how many samples that can't be read are skipped.
    """
    sampler = StepSampler(splits.train, seed, batch_size, share)
    data = Drawn(splits.train, Corrupt(len(splits.train), max_corrupt))
    return _Loader(data, batch_sampler=sampler, num_workers=workers, pin_memory=pin, collate_fn=collate), sampler


def evaluation_loader(
    splits: Splits,
    batch_size: int,
    workers: int,
    pin: bool = False,
    collate: Collate | None = None,
    share: Share = ALONE,
) -> DataLoader[Any]:
    """Return the loader of all test samples in order; of several processes each has its own, and no two the same."""
    own = range(share.rank, len(splits.test), share.ranks) if share.ranks > 1 else None
    size = max(1, batch_size // share.ranks)
    data = cast(Dataset[Any], splits.test)
    return _Loader(data, size, sampler=own, num_workers=workers, pin_memory=pin, collate_fn=collate)


class _Loader(DataLoader[Any]):
    """A loader whose workers' mistakes are one line too: torch puts their traceback into the message."""

    def __iter__(self) -> Any:
        try:
            yield from super().__iter__()
        except DataError as error:
            last = str(error).strip().splitlines()[-1]
            raise DataError(last.removeprefix(f"{DataError.__module__}.{DataError.__qualname__}: ")) from None
