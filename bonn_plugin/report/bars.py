"""Bars of each layer: its bits before and after, and its share of the operations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bonn_plugin.nn.operations import BINARY_PER_REAL, Macs
from bonn_plugin.report.model import LayerRow, Report


@dataclass(frozen=True)
class Bar:
    """One piece of a bar: where it begins and how long it is, in percent, and its colour, from 1."""

    start: float
    width: float
    tone: int


@dataclass(frozen=True)
class BarRow:
    """A layer: its pieces from back to front, and its numbers as text."""

    name: str
    bars: tuple[Bar, ...]
    cells: tuple[str, ...]


@dataclass(frozen=True)
class BarTable:
    """A table with a bar in each row.

    Attributes:
        title: its heading.
        caption: how to read it.
        legend: (tone, what it is).
        head: headings of name, bar and numbers.
        rows: one a layer.
        grid: places of vertical lines, in percent.
    """

    title: str
    caption: str
    legend: tuple[tuple[int, str], ...]
    head: tuple[str, ...]
    rows: tuple[BarRow, ...]
    grid: tuple[float, ...]


def layer_bars(report: Report) -> tuple[BarTable, ...]:
    """Return the bars of all layers that compute; what the others need is one row."""
    computing = [row for row in report.layers if row.binary_macs or row.real_macs]
    others = [row for row in report.layers if not (row.binary_macs or row.real_macs)]
    return tuple(table for table in (_bits(computing, others), _operations(computing)) if table.rows)


def _bits(rows: list[LayerRow], others: list[LayerRow]) -> BarTable:
    counted = [(row.name, row.original_bits, row.needed_bits) for row in rows]
    if others:
        rest = (sum(row.original_bits for row in others), sum(row.needed_bits for row in others))
        counted.append((f"the other {len(others)} modules (norms and so on)", *rest))
    sizes = [bits for _, *both in counted for bits in both if bits]
    low = math.ceil(math.log10(min(sizes, default=1))) - 1
    high = max(low + 1, math.ceil(math.log10(max(sizes, default=1))))

    def length(bits: int) -> float:
        return round(100 * (math.log10(bits) - low) / (high - low), 2) if bits else 0.0

    def row(name: str, before: int, now: int) -> BarRow:
        bars = (Bar(0, length(before), 4), Bar(0, length(now), 1))
        return BarRow(name, bars, (f"{before:,}", f"{now:,}", f"{before / now:.2f}" if before and now else ""))

    return BarTable(
        "Bits of each layer",
        f"On a logarithmic scale from 1e{low} to 1e{high} bits, a line at each power of ten. Numbers that binarisation "
        "added, such as scales, count in what is needed now.",
        ((4, "float32"), (1, "now")),
        ("<layer", "<bits", "float32", "now", "times smaller"),
        tuple(row(*one) for one in counted),
        tuple(round(100 * i / (high - low), 2) for i in range(high - low + 1)),
    )


def _operations(rows: list[LayerRow]) -> BarTable:
    counted = [Macs(row.binary_macs, row.real_macs).ops for row in rows]
    total, largest = sum(counted), max(counted, default=1.0)

    def one(row: LayerRow) -> BarRow:
        binary, real = row.binary_macs / BINARY_PER_REAL, row.real_macs
        first, second = (round(100 * part / largest, 2) for part in (binary, real))
        share = 100 * (binary + real) / total
        cells = (f"{row.binary_macs:,}", f"{row.real_macs:,}", f"{share:.1f} %")
        return BarRow(row.name, (Bar(0, first, 1), Bar(first, second, 3)), cells)

    return BarTable(
        "Operations of each layer",
        f"OPs = BOPs/{BINARY_PER_REAL} + FLOPs for one image, on a linear scale up to the largest layer.",
        ((1, f"BOPs/{BINARY_PER_REAL}"), (3, "FLOPs")),
        ("<layer", "<OPs", "BOPs", "FLOPs", "share of OPs"),
        tuple(one(row) for row in rows),
        (0.0, 50.0, 100.0),
    )
