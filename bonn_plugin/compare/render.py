"""The comparison as tables, for a terminal and as Markdown, from one description."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from bonn_plugin.compare.columns import ACCURACY, SIZE, SPEED, Column, columns
from bonn_plugin.compare.comparison import COSTS, Comparison, SeedGroup, Setting
from bonn_plugin.compare.runs import Run
from bonn_plugin.report.tables import Table

NONE = "-"
BEST = "*"
"""What stands behind the best figure of a column."""
MEASURED = {"classification": "Accuracy in %", "detection": "COCO's mean average precision"}
WORD = 16
"""Characters of a word that a column of text has room for."""
COST_NAMES = dict(zip(COSTS, ("bits", "OPs"), strict=True))


def to_terminal(comparison: Comparison) -> RenderableType:
    """Return the comparison for ``rich.console.Console.print``."""
    parts: list[RenderableType] = [Text(f"warning: {text}") for text in comparison.warnings]
    for table in tables(comparison):
        drawn = RichTable(title=table.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
        for i, head in enumerate(table.head):
            left = head.startswith("<")  # text may be folded, but not to nothing; a number never
            longest = max(len(word) for row in table.rows for word in row[i].split() or [""])
            drawn.add_column(
                head.removeprefix("<"),
                justify="left" if left else "right",
                overflow="fold",
                no_wrap=not left,
                min_width=min(longest, WORD) if left else None,
            )
        for row in table.rows:
            drawn.add_row(*(Text(cell, style="bold" if cell.endswith(BEST) else "") for cell in row))
        parts.append(drawn)
    return Group(*parts, *map(Text, comparison.notes))


def to_markdown(comparison: Comparison) -> str:
    """Return the comparison as Markdown."""
    lines = ["# Comparison", ""]
    for text in comparison.warnings:
        lines += [f"**Warning:** {text}", ""]
    for table in tables(comparison):
        rule = ["---" if head.startswith("<") else "--:" for head in table.head]
        lines += [f"## {table.title}", "", _line(head.removeprefix("<") for head in table.head), _line(rule)]
        lines += [*(_line(_bold(cell) for cell in row) for row in table.rows), ""]
    lines += [f"- {note}" for note in comparison.notes]
    return "\n".join(lines).rstrip() + "\n"


def tables(comparison: Comparison) -> list[Table]:
    """Return what there is to show."""
    accuracy = ACCURACY[comparison.task]
    runs = comparison.runs
    found = [
        Table(
            f"{MEASURED[comparison.task]}, size and operations (the best marked)",
            ("<run", *(column.head for column in (*accuracy, *SIZE)), "<front"),
            tuple(
                (
                    run.label,
                    *(_value(comparison, run, column) for column in (*accuracy, *SIZE)),
                    " ".join(COST_NAMES[cost] for cost in COSTS if run.label in comparison.fronts[cost]) or NONE,
                )
                for run in runs
            ),
        ),
        Table(
            "Speed in ms (the checkpoint by OpenVINO, one image, one thread) and training",
            ("<run", *(column.head for column in SPEED), "in bits", "seed"),
            tuple(
                (
                    run.label,
                    *(_value(comparison, run, column) for column in SPEED),
                    NONE if run.exported is None else f"{run.exported[0]} of {run.exported[1]}",
                    NONE if run.seed is None else str(run.seed),
                )
                for run in runs
            ),
        ),
        *_differences(comparison),
        Table(
            "Networks and methods",
            ("<run", "<recipe", "<network", "<method"),
            tuple((run.label, run.name, run.network, run.method or NONE) for run in runs),
        ),
    ]
    if comparison.groups:
        found.append(_spreads(comparison))
    if comparison.settings:
        labels = [run.label for run in runs]
        settings = tuple((setting.key, _said(setting, labels)) for setting in comparison.settings)
        found.append(Table("Settings that differ", ("<setting", "<values"), settings))
    return found


def _said(setting: Setting, labels: Sequence[str]) -> str:
    """Return the values of a setting and whose they are, such as ``16 (deep), 10 (others)``."""
    groups: dict[str | None, list[str]] = {}
    for label, value in zip(labels, setting.values, strict=True):
        groups.setdefault(value, []).append(label)
    most = max(groups, key=lambda value: len(groups[value]))
    rest = [(value, ", ".join(whose)) for value, whose in groups.items() if value != most]
    last = "others" if len(groups[most]) > 2 else ", ".join(groups[most])
    return ", ".join(f"{NONE if value is None else value} ({whose})" for value, whose in [*rest, (most, last)])


def _differences(comparison: Comparison) -> list[Table]:
    """Return a table of what was reached and what it costs, and one of speeds; together they are too wide."""
    first, *others = comparison.runs
    found = []
    for part, title in (((*ACCURACY[comparison.task], *SIZE), ""), (SPEED, ", speed and training")):
        shown = [column for column in part if column.of(first) is not None]
        if shown:
            rows = tuple((run.label, *(_difference(column, run, first) for column in shown)) for run in others)
            found.append(Table(f"Differences to {first.label}{title}", ("<run", *(c.head for c in shown)), rows))
    return found


def _spreads(comparison: Comparison) -> Table:
    groups = comparison.groups
    shown = [
        column
        for column in columns(comparison.task)
        if column in ACCURACY[comparison.task] or any(_varies(group, column) for group in groups)
    ]
    return Table(
        "Runs that differ by seed alone: mean ± standard deviation",
        ("<runs", "n", "<seeds", *(column.head for column in shown)),
        tuple(_spread_row(group, shown) for group in groups),
    )


def _varies(group: SeedGroup, column: Column) -> bool:
    spread = group.spreads.get(column.field)
    return spread is not None and spread.deviation > 0


def _spread_row(group: SeedGroup, shown: list[Column]) -> tuple[str, ...]:
    cells: list[str] = []
    for column in shown:
        spread = group.spreads.get(column.field)
        if spread is None:
            cells.append(NONE)
        else:
            cells.append(f"{column.text(spread.mean)} ± {column.text(spread.deviation)}")
    return (", ".join(group.labels), str(len(group.labels)), ", ".join(map(str, group.seeds)), *cells)


def _value(comparison: Comparison, run: Run, column: Column) -> str:
    value = column.of(run)
    if value is None:
        return NONE
    best = run.label in comparison.best.get(column.field, ())
    return f"{column.text(value)}{BEST}" if best else column.text(value)


def _difference(column: Column, run: Run, first: Run) -> str:
    value, reference = column.of(run), column.of(first)
    return NONE if value is None or reference is None else column.difference(value, reference)


def _bold(cell: str) -> str:
    value = cell.removesuffix(BEST)
    return value if value == cell else f"**{value}**"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


__all__ = ["tables", "to_markdown", "to_terminal"]
