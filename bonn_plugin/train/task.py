"""What a task is to the runner: batches, a loss, measurements, and the proof that a checkpoint does the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bonn_plugin.data.splits import Collate, Splits, train_loader
from bonn_plugin.errors import BonnError
from bonn_plugin.recipe import Recipe
from bonn_plugin.report import Accuracy, Precision
from bonn_plugin.sampling import Share, StepSampler


@dataclass(frozen=True)
class Step:
    """What the task makes of one batch.

    Attributes:
        losses: scalars by name, to be added up.
        labels: class indices, (B,), where each image has one.
        images: what the network was given, (B, C, H, W).
        outputs: its logits, (B, classes), where it makes such.
    """

    losses: Mapping[str, Tensor]
    labels: Tensor | None = None
    images: Tensor | None = None
    outputs: Tensor | None = None


Scores = Mapping[str, float]
"""Measurements on the test set by name, as they stand in the metrics: ``test_loss``, ``test_top1`` in percent."""


class Task(Protocol):
    """One kind of training, on the recipe's data.

    Attributes:
        loader: this process's training batches, micro-batch by micro-batch.
        sampler: its ``epoch`` orders them, its ``start`` is the first step.
        sizes: training and test samples.
        image_shape: (C, H, W) of a test image.
        headline: the measurement that an epoch's line shows, and its unit.
    """

    loader: DataLoader[Any]
    sampler: StepSampler
    sizes: tuple[int, int]
    image_shape: tuple[int, int, int]
    headline: tuple[str, str]

    def build(self) -> nn.Module:
        """Return the recipe's network, in full precision, proved to take the data's images.

        Raises:
            ModelError: it can't be made, or does not take them.
        """
        ...

    def step(self, model: nn.Module, batch: Any, device: torch.device) -> Step:
        """Return the losses of a training batch."""
        ...

    def calibration(self) -> Iterator[Tensor]:
        """Yield batches of training images, (B, C, H, W), the same ones at each call."""
        ...

    def measure(self, model: nn.Module, device: torch.device) -> Scores:
        """Return the measurements of a model, which is put into eval mode, on the whole test set.

        Where several processes train together, each measures its share, and all return the measurements of the whole.
        """
        ...

    def describe(self, scores: Scores) -> str:
        """Return the measurements in words, such as "top-1 91.20 %, top-5 99.80 %"."""
        ...

    def compare(
        self, trained: nn.Module, converted: nn.Module, packed: nn.Module, *, exact: bool
    ) -> Accuracy | Precision:
        """Return the measurements of the trained network and of the checkpoint read back.

        Args:
            trained: the network in eval mode, on the CPU.
            converted: what was saved.
            packed: what was read back.
            exact: whether the conversion claims to leave the outputs as they are.

        Raises:
            TrainingError: the checkpoint computes something else than what was saved, or than what was trained
                although the conversion is exact.
        """
        ...


def training_batches(
    recipe: Recipe, splits: Splits, share: Share, *, pin: bool = False, collate: Collate | None = None
) -> tuple[DataLoader[Any], StepSampler]:
    """Return the loader of a process's share of the recipe's training batches, and the sampler that orders them."""
    training, data = recipe.training, recipe.data
    return train_loader(
        splits, training.batch_size, training.seed, data.workers, pin, collate, share, data.corrupt_allowed
    )


@contextmanager
def placed(recipe: Recipe, *path: str | int) -> Iterator[None]:
    """Put the place in the recipe before the message of an error."""
    try:
        yield
    except BonnError as error:
        raise type(error)(str(recipe.source.problem(path, str(error)))) from error
