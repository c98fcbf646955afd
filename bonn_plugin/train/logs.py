"""What a run writes of its epochs: metrics, timm's summary, event files, distributions of the latent weights.

All of it follows the training state: a run that is killed and resumed ends with each epoch there exactly once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bonn_plugin.errors import BonnError, CheckpointError
from bonn_plugin.files import write_file
from bonn_plugin.nn.distribution_log import BINS, REACH, weight_distributions
from bonn_plugin.report.distributions import DISTRIBUTIONS
from bonn_plugin.train.board import Board, need_tensorboard
from bonn_plugin.train.summary import summary_csv, summary_row

METRICS = Path("training") / "metrics.jsonl"
SUMMARY = "summary.csv"
EVENTS = "tensorboard"


@dataclass(frozen=True)
class LogOptions:
    """What is written besides metrics.jsonl and summary.csv.

    Attributes:
        tensorboard: event files in ``tensorboard``.
        distributions_every: epochs between two lines of distributions.jsonl; None for no such file.

    Raises:
        BonnError: the number of epochs is not positive, or the package tensorboard is missing.
    """

    tensorboard: bool = False
    distributions_every: int | None = None

    def __post_init__(self) -> None:
        if self.distributions_every is not None and self.distributions_every < 1:
            raise BonnError(f"distributions_every is {self.distributions_every}: it must be 1 or more")
        if self.tensorboard:
            need_tensorboard()


class Logs:
    """The files of one run that one process writes.

    Args:
        folder: the run's.
        options: what to write.
        epochs: of the whole run; the last one's distributions are logged whatever the interval.
    """

    def __init__(self, folder: Path, options: LogOptions, epochs: int) -> None:
        self.folder = folder
        self.options = options
        self.epochs = epochs
        self._moments: dict[int, str] = {}
        self._board: Board | None = None
        self._written = -1
        self._on_board = 0

    def begin(self, records: Sequence[Mapping[str, Any]], trained: int, *, resume: bool) -> None:
        """Bring all files to what the training state knows: cut off what came after it, add what is missing.

        Args:
            records: of the measured epochs.
            trained: epochs that are trained; the last one may not be measured yet.
            resume: whether the run goes on; else what an earlier one left is taken away.

        Raises:
            CheckpointError: distributions.jsonl is damaged, or a file can't be written.
        """
        place = self.folder / DISTRIBUTIONS
        if not resume:
            place.unlink(missing_ok=True)
        elif place.exists():
            found = _read_moments(place)
            self._moments = {epoch: line for epoch, line in found.items() if epoch <= trained}
            if len(self._moments) < len(found):
                self._write_moments()
        if self.options.tensorboard:
            self._board = Board(self.folder / EVENTS)
            for epoch, line in self._moments.items():
                self._board.histograms(json.loads(line), _ended(records, epoch))
        if resume:
            self.write(records)

    def moment(self, epoch: int, model: nn.Module) -> None:
        """Log the latent weights as they are after ``epoch`` finished epochs, if that is due and not done yet."""
        every = self.options.distributions_every
        if every is None or epoch in self._moments or (epoch % every and epoch != self.epochs):
            return
        layers = {name: vars(layer) for name, layer in weight_distributions(model).items()}
        moment = {"epoch": epoch, "bins": [-REACH, REACH, BINS], "layers": layers}
        self._moments[epoch] = json.dumps(moment) + "\n"
        self._write_moments()
        if self._board is not None:
            self._board.histograms(moment, time.time())

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write the records of all measured epochs, where there are more than at the last call."""
        if len(records) == self._written:
            return
        write_file(self.folder / METRICS, "".join(json.dumps(record) + "\n" for record in records).encode())
        if records:
            write_file(self.folder / SUMMARY, summary_csv(records).encode())
        else:
            (self.folder / SUMMARY).unlink(missing_ok=True)
        self._written = len(records)
        if self._board is not None:
            for record in records[self._on_board :]:
                self._board.scalars(summary_row(record), _ended(records, record["epoch"]))
            self._board.flush()
            self._on_board = len(records)

    def close(self) -> None:
        """End the event file."""
        if self._board is not None:
            self._board.close()
            self._board = None

    def _write_moments(self) -> None:
        write_file(self.folder / DISTRIBUTIONS, "".join(self._moments.values()).encode())


def _ended(records: Sequence[Mapping[str, Any]], epoch: int) -> float:
    """Return about when an epoch ended, in seconds since 1970, by what the later ones took."""
    later: float = sum(record["seconds"] for record in records[epoch:])
    return time.time() - later


def _read_moments(place: Path) -> dict[int, str]:
    """Return the lines of distributions.jsonl by epoch."""
    try:
        lines = place.read_text(encoding="utf-8").splitlines(keepends=True)
        return {int(json.loads(line)["epoch"]): line for line in lines}
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{place}: not what a run has logged, or damaged: move it away") from None


__all__ = ["DISTRIBUTIONS", "EVENTS", "METRICS", "SUMMARY", "LogOptions", "Logs"]
