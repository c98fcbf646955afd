"""Event files for TensorBoard, an extra: ``pip install 'bonn_plugin[tensorboard]'``."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bonn_plugin.errors import BonnError
from bonn_plugin.train.summary import Row

QUEUE = 1000
"""Events that may wait for the thread that writes them: with the default of 10, training waits for it."""


def need_tensorboard() -> None:
    """Raise BonnError where the package tensorboard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise BonnError("--tensorboard needs the package tensorboard: pip install 'bonn_plugin[tensorboard]'")


class Board:
    """The event files of one run.

    Steps are finished epochs. Opening it takes earlier event files away, and has a TensorBoard that has read them
    already forget them (``purge_step=0``): a run that is resumed writes its past anew, so that each epoch stands there
    once wherever it was killed. To leave the old files there is not enough: TensorBoard reads files in the order of
    their names, which have the time in whole seconds, and clocks differ.

    Args:
        folder: where the event files go.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer: Any = SummaryWriter(str(folder), max_queue=QUEUE, purge_step=0)

    def scalars(self, row: Row, when: float) -> None:
        """Write an epoch's numbers under the names of their columns; ``when`` in seconds since 1970."""
        for name, value in row.items():
            if name != "epoch":
                self._writer.add_scalar(name, value, int(row["epoch"]), when)

    def histograms(self, moment: Mapping[str, Any], when: float) -> None:
        """Write one line of distributions.jsonl: ``latent_weight/LAYER``, X / mean |X|.

        What lies beyond the range is drawn in one more bin at either end. Sums are those of the bins' centres.
        """
        low, high, bins = moment["bins"]
        width = (high - low) / bins
        limits = [low + width * i for i in range(bins + 2)]
        for name, layer in moment["layers"].items():
            _histogram(self._writer, f"latent_weight/{name}", limits, layer["counts"], moment["epoch"], when)

    def flush(self) -> None:
        """Bring everything to the disk."""
        self._writer.flush()

    def close(self) -> None:
        """End the last file."""
        self._writer.close()


def _histogram(writer: Any, tag: str, limits: Sequence[float], counts: Sequence[int], epoch: int, when: float) -> None:
    width = limits[1] - limits[0]
    centers = [limit - width / 2 for limit in limits]
    filled = [i for i, count in enumerate(counts) if count]
    writer.add_histogram_raw(
        tag,
        min=limits[filled[0]] - width,
        max=limits[filled[-1]],
        num=sum(counts),
        sum=sum(c * n for c, n in zip(centers, counts, strict=True)),
        sum_squares=sum(c * c * n for c, n in zip(centers, counts, strict=True)),
        bucket_limits=limits,
        bucket_counts=counts,
        global_step=epoch,
        walltime=when,
    )


__all__ = ["Board", "need_tensorboard"]
