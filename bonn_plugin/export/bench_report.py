"""What ``bonn bench`` prints and writes: tables for a terminal and as Markdown, JSON, and a bar chart."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from bonn_plugin.export.bench import BITS, Bench
from bonn_plugin.export.engine import INSTALL
from bonn_plugin.files import write_file
from bonn_plugin.report.tables import Table


def to_terminal(bench: Bench) -> RenderableType:
    """Return the tables for ``rich.console.Console.print``."""
    parts: list[RenderableType] = [Text(_headline(bench))]
    for table in tables(bench):
        drawn = RichTable(title=table.title, title_justify="left")
        for head in table.head:
            left = head.startswith("<")
            drawn.add_column(head.removeprefix("<"), justify="left" if left else "right", no_wrap=left)
        for row in table.rows:
            drawn.add_row(*row)
        parts.append(drawn)
    return Group(*parts, *map(Text, [*bench.notes, *summary(bench)]))


def to_markdown(bench: Bench) -> str:
    """Return the tables as Markdown."""
    lines = ["# Speed", "", _headline(bench), ""]
    for table in tables(bench):
        head = [h.removeprefix("<") for h in table.head]
        rule = ["---" if h.startswith("<") else "--:" for h in table.head]
        lines += [f"## {table.title}", "", *(_line(cells) for cells in (head, rule, *map(list, table.rows))), ""]
    return "\n".join([*lines, *(f"{note}\n" for note in [*bench.notes, *summary(bench)])])


def summary(bench: Bench) -> list[str]:
    """Return a line for each number of threads: how many times faster the 1-bit export is than each rival."""
    lines = []
    for threads in sorted({s.threads for s in bench.speeds}):
        own = bench.speed(BITS, threads)
        if own is None:
            continue
        rivals = [s for s in bench.speeds if s.threads == threads and s.engine != BITS]
        times = ", ".join(f"{s.latency_ms / own.latency_ms:.1f} times {s.engine}" for s in rivals)
        lines.append(
            f"{bench.network} with {threads} thread{'s' if threads > 1 else ''}, batch 1, on {bench.cpu}: "
            f"{own.latency_ms:.3f} ms an image in 1 bit, the speed of {times}"
        )
    return lines


def write_bench(folder: Path, bench: Bench) -> list[str]:
    """Write bench.json, bench.md and, where matplotlib is installed, bench.png; return lines that say so."""
    write_file(folder / "bench.json", (bench.model_dump_json(indent=1) + "\n").encode())
    write_file(folder / "bench.md", to_markdown(bench).encode())
    chart = draw_chart(bench)
    if chart is None:
        return [f"{folder}/bench.json and bench.md; the chart needs matplotlib: {INSTALL}"]
    write_file(folder / "bench.png", chart)
    return [f"{folder}/bench.json, bench.md and bench.png"]


def tables(bench: Bench) -> list[Table]:
    """Return speed, layers, files and memory as tables."""
    rows = []
    for s in bench.speeds:
        own = bench.speed(BITS, s.threads)
        ratio = f"{s.latency_ms / own.latency_ms:.2f}" if own else ""
        faster = f"{own.images_per_second / s.images_per_second:.2f}" if own else ""
        rows.append(
            (
                s.engine,
                str(s.threads),
                f"{s.latency_ms:.3f}",
                f"{s.latency_p95_ms:.3f}",
                ratio,
                f"{s.images_per_second:.1f}",
                faster,
            )
        )
    batch = bench.speeds[0].batch if bench.speeds else 1
    found = [
        Table(
            f"Speed: latency at batch 1 in ms, throughput at batch {batch}; {bench.cpu}",
            (
                "<engine",
                "threads",
                "ms",
                "p95",
                "of 1-bit",
                f"images/s at {batch}",
                "1-bit more by",
            ),
            tuple(rows),
        ),
        Table(
            "Binarised convolutions, 1 thread, batch 1: the sign included, against OpenVINO fp32",
            ("<layer", "weight", "1-bit ms", "fp32 ms", "faster by", "<kernel"),
            tuple(
                (
                    row.name,
                    "x".join(map(str, row.shape)),
                    f"{row.bits_ms:.3f}",
                    f"{row.float_ms:.3f}",
                    f"{row.float_ms / row.bits_ms:.1f}" if row.bits_ms and row.float_ms else "",
                    row.runs_as,
                )
                for row in bench.layers
            ),
        ),
        Table("Bytes on disk", ("<file", "bytes"), tuple((name, f"{size:,}") for name, size in bench.files.items())),
    ]
    if bench.memory:
        found.append(
            Table(
                "Memory of a process with this engine alone, 1 thread, batch 1, MB",
                ("<engine", "peak", "after the imports", "peak beyond the imports"),
                tuple(
                    (m.engine, f"{m.peak / 1e6:.1f}", f"{m.imports / 1e6:.1f}", f"{(m.peak - m.imports) / 1e6:.1f}")
                    for m in bench.memory
                ),
            )
        )
    return found


def draw_chart(bench: Bench) -> bytes | None:
    """Return a bar chart of the latencies as PNG; None where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    threads = sorted({s.threads for s in bench.speeds})
    figure = Figure(figsize=(4.5 * len(threads), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, n in zip(figure.subplots(1, len(threads), squeeze=False)[0], threads, strict=True):
        speeds = [s for s in bench.speeds if s.threads == n]
        names = [s.engine for s in speeds]
        colors = ["tab:blue" if name == BITS else "tab:gray" for name in names]
        bars = axes.barh(names, [s.latency_ms for s in speeds], color=colors)
        axes.bar_label(bars, [f"{s.latency_ms:.2f}" for s in speeds], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel("ms an image, batch 1")
        axes.set_title(f"{n} thread{'s' if n > 1 else ''}")
    figure.suptitle(f"{bench.network}, {' x '.join(map(str, bench.input_shape[1:]))}\n{bench.cpu}", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _headline(bench: Bench) -> str:
    versions = ", ".join(f"{name} {text.split('-')[0]}" for name, text in bench.versions.items())
    return f"{bench.network}, input {' x '.join(map(str, bench.input_shape))}, {bench.cpu}, {versions}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


__all__ = ["draw_chart", "summary", "tables", "to_markdown", "to_terminal", "write_bench"]
