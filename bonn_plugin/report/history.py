"""What a run noted after each epoch: training/metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bonn_plugin.errors import BonnError


class _Noted(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Valley(_Noted):
    """The measure of two modes over the binarised layers: 1.36 for a normal distribution, 0 for two clear modes."""

    mean: float
    max: float


class MergeNote(_Noted):
    """One ``filter_merge``: its pull, and each layer's ||X - X̄|| / ||X|| before the pull."""

    gamma: float
    within_group_distance: dict[str, float]


class EpochRecord(BaseModel):
    """One epoch.

    Attributes:
        epoch: from 1.
        lr: the largest learning rate of its last step.
        loss: mean of each loss over its steps.
        valley: where something is binarised.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    epoch: int
    lr: float | None = None
    loss: dict[str, float] = Field(default_factory=dict)
    valley: Valley | None = None

    @property
    def scores(self) -> Mapping[str, float]:
        """The measurements by name, such as ``test_top1`` in percent or ``test_map`` from 0 to 1."""
        return {
            name: float(value)
            for name, value in (self.model_extra or {}).items()
            if name.partition("_")[0] in ("test", "train") and isinstance(value, int | float)
        }

    @property
    def measures(self) -> Mapping[str, float]:
        """The single numbers that other modifiers tell, such as ``magnitude_prune: sparsity``."""
        return {
            f"{kind}: {name}": float(value)
            for kind, told in (self.model_extra or {}).items()
            if isinstance(told, dict) and kind.partition(".")[0] != "filter_merge"
            for name, value in told.items()
            if isinstance(value, int | float)
        }

    @property
    def merges(self) -> Mapping[str, MergeNote]:
        """What each ``filter_merge`` of the recipe noted, by its name there."""
        extra = self.model_extra or {}
        names = [name for name in extra if name.partition(".")[0] == "filter_merge"]
        return {name: MergeNote.model_validate(extra[name]) for name in names}


def read_history(metrics: Path) -> tuple[EpochRecord, ...]:
    """Read a run's metrics.jsonl, one record an epoch.

    Raises:
        BonnError: it can't be read, or a line is damaged.
    """
    try:
        lines = metrics.read_bytes().splitlines()
    except OSError as error:
        raise BonnError(f"{metrics}: can't be read: {error.strerror}; bonn compress writes it") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = EpochRecord.model_validate_json(line)
            _ = record.merges
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise BonnError(f"{metrics}:{number}: not the metrics of an epoch, or damaged: {problem}") from None
        records.append(record)
    return tuple(records)


@dataclass(frozen=True)
class MergeCourse:
    """One ``filter_merge`` over the epochs.

    Attributes:
        epochs: when it was noted.
        gammas: its pull then.
        distances: by layer, how far the filters that are binarised lie from their group's mean, over their norm.
    """

    epochs: tuple[int, ...]
    gammas: tuple[float, ...]
    distances: Mapping[str, tuple[float, ...]]


def merge_courses(history: Sequence[EpochRecord]) -> dict[str, MergeCourse]:
    """Return what each ``filter_merge`` of a run did, by its name in the metrics; nothing where none ran."""
    noted: dict[str, list[tuple[int, MergeNote]]] = {}
    for record in history:
        for name, note in record.merges.items():
            noted.setdefault(name, []).append((record.epoch, note))
    return {
        name: MergeCourse(
            tuple(epoch for epoch, _ in notes),
            tuple(note.gamma for _, note in notes),
            {
                # (1 - gamma) X + gamma X̄ lies (1 - gamma) as far from X̄ as X does
                layer: tuple((1 - note.gamma) * note.within_group_distance.get(layer, math.nan) for _, note in notes)
                for layer in notes[0][1].within_group_distance
            },
        )
        for name, notes in noted.items()
    }
