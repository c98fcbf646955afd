"""What the page is made of: figures with the numbers that they show, in sections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bonn_plugin.report.charts import Chart, Curve, Points, words
from bonn_plugin.report.history import EpochRecord
from bonn_plugin.report.tables import Table


@dataclass(frozen=True)
class Figure:
    """Charts that belong together.

    Attributes:
        title: its heading.
        caption: how to read it.
        charts: at least one.
        data: the numbers that it shows.
        size: ``wide``, ``panel`` or ``small``, each smaller than the one before.
        remark: what stands beside the heading of a figure that is folded; empty for one that is not.
        opened: whether a folded one is open at first.
    """

    title: str
    caption: str
    charts: tuple[Chart, ...]
    data: Table
    size: str = "panel"
    remark: str = ""
    opened: bool = False

    @property
    def legend(self) -> tuple[Curve, ...]:
        """The looks of the curves, where they are those of every chart."""
        looks = [[(c.name, c.tone, c.pattern) for c in chart.legend] for chart in self.charts]
        return self.charts[0].legend if len(looks) > 1 and all(look == looks[0] for look in looks) else ()


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        figures: what there is to show.
        folded_title: heading of the figures that are folded.
        caption: how to read those.
        missing: what is not there, and what would record it.
    """

    title: str
    figures: tuple[Figure, ...] = ()
    folded_title: str = ""
    caption: str = ""
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """A run's name on the page and its epochs; none of a checkpoint that came without."""

    name: str
    history: tuple[EpochRecord, ...]


def numbers(title: str, columns: Mapping[str, Points]) -> Table:
    """Return the table of several lines, with a row for each epoch that any of them has."""
    values = {name: dict(points) for name, points in columns.items()}
    epochs = sorted({x for points in values.values() for x in points})
    rows = (
        (words(epoch), *(words(points[epoch]) if epoch in points else "" for points in values.values()))
        for epoch in epochs
    )
    return Table(title, ("epoch", *values), tuple(rows))
