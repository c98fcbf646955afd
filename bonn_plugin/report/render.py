"""The report's tables, for a terminal and as Markdown, from one description."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from bonn_plugin.report.model import Report
from bonn_plugin.report.tables import summary, tables


def to_markdown(report: Report) -> str:
    """Return the report as Markdown."""
    lines = [f"# {report.name}", "", *summary(report), ""]
    for table in tables(report):
        head = [h.removeprefix("<") for h in table.head]
        rule = ["---" if h.startswith("<") else "--:" for h in table.head]
        lines += [f"## {table.title}", "", _line(head), _line(rule), *map(_line, table.rows), ""]
    return "\n".join([*lines, *(f"{note}\n" for note in report.notes)])


def to_terminal(report: Report, *, details: bool = True) -> RenderableType:
    """Return the report for ``rich.console.Console.print``; without ``details`` no per-layer table."""
    parts: list[RenderableType] = [Text(line) for line in summary(report)]
    for table in tables(report):
        if table.detail and not details:
            continue
        drawn = RichTable(title=table.title, title_justify="left")
        for head in table.head:
            left = head.startswith("<")
            drawn.add_column(head.removeprefix("<"), justify="left" if left else "right", overflow="fold")
        for row in table.rows:
            drawn.add_row(*row)
        parts.append(drawn)
    return Group(*parts, *(Text(note) for note in report.notes))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
