"""The columns of the comparison: which figure, how it is written, and which way is better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bonn_plugin.compare.runs import Run


@dataclass(frozen=True)
class Column:
    """One figure of a run.

    Attributes:
        field: of ``Run``.
        head: heading.
        more_is_better: else less is.
        text: how a value is written.
        relative: a difference is a factor on the first run's value, else it is in the column's own unit.
        signed: how a difference in the column's own unit is written.
    """

    field: str
    head: str
    more_is_better: bool
    text: Callable[[float], str]
    relative: bool = True
    signed: Callable[[float], str] = "{:+.2f}".format

    def of(self, run: Run) -> float | None:
        """Return the figure of ``run``."""
        value: float | None = getattr(run, self.field)
        return value

    def difference(self, value: float, first: float) -> str:
        """Write how ``value`` differs from ``first``."""
        if not self.relative:
            return self.signed(value - first)
        return f"×{value / first:.2f}" if first else "-"


def duration(seconds: float) -> str:
    """Write a time, such as ``42 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


ACCURACY = {
    "classification": (
        Column("top1", "top-1", True, "{:.2f}".format, relative=False),
        Column("top5", "top-5", True, "{:.2f}".format, relative=False),
    ),
    "detection": (
        Column("map", "mAP", True, "{:.3f}".format, relative=False, signed="{:+.3f}".format),
        Column("map50", "mAP50", True, "{:.3f}".format, relative=False, signed="{:+.3f}".format),
        Column("map75", "mAP75", True, "{:.3f}".format, relative=False, signed="{:+.3f}".format),
    ),
}
"""What a task measures on its test set, the headline first."""

SIZE = (
    Column("bits", "bits", False, "{:,.0f}".format),
    Column("rate", "rate", True, "{:.2f}".format),
    Column("file_rate", "file rate", True, "{:.2f}".format),
    Column("ops", "OPs", False, "{:.2e}".format),
)
SPEED = (
    Column("latency_ms", "ms", False, "{:.3f}".format),
    Column("speedup", "vs eager", True, "{:.1f}".format),
    Column("seconds", "training", False, duration),
)


def columns(task: str) -> tuple[Column, ...]:
    """Return the columns of a task, in the order of the tables."""
    return (*ACCURACY[task], *SIZE, *SPEED)


__all__ = ["ACCURACY", "SIZE", "SPEED", "Column", "columns", "duration"]
