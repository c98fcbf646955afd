"""Accuracy over bits and over OPs, with the Pareto fronts. matplotlib is an extra: ``bonn_plugin[plots]``."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bonn_plugin.compare.comparison import COSTS, Comparison
from bonn_plugin.errors import BonnError
from bonn_plugin.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg")
FRONT, DOMINATED = "#0072B2", "#D55E00"
"""Blue and vermilion of Okabe and Ito, which all kinds of colour vision tell apart; the markers differ too."""
AXES = {"bits": "bits stored", "ops": "OPs for one image"}
LOG_FROM = 8.0
"""Costs that differ by this factor are drawn on a logarithmic axis."""
PLACES = tuple(
    (distance * x, distance * y, across, up)
    for distance in (6, 14, 24, 36, 50)
    for x, y, across, up in (
        (1.2, 0, "left", "center"),
        (0.8, -0.8, "left", "top"),
        (-0.8, 0.8, "right", "bottom"),
        (0.8, 0.8, "left", "bottom"),
        (-1.2, 0, "right", "center"),
        (-0.8, -0.8, "right", "top"),
        (0, -1.2, "center", "top"),
        (0, 1.2, "center", "bottom"),
    )
)
"""Where a label may stand, the best first: points to the right and up, and how it is aligned."""


def check_plot(place: Path) -> None:
    """Raise BonnError where ``write_plot`` can't write ``place``: its ending, or matplotlib is missing."""
    if place.suffix.lower() not in ENDINGS:
        raise BonnError(f"--plot {place}: unknown ending {place.suffix!r}: .png or .svg")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BonnError("--plot needs matplotlib: pip install 'bonn_plugin[plots]'") from None


def write_plot(comparison: Comparison, place: Path) -> None:
    """Draw accuracy over bits and over OPs into a PNG or SVG file.

    Raises:
        BonnError: the ending is unknown, matplotlib is missing, no run was measured, or the file can't be written.
    """
    check_plot(place)
    if all(run.headline is None for run in comparison.runs):
        raise BonnError(f"--plot {place}: no run's accuracy was measured")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.8), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(COSTS), sharey=True)
    for axes, cost in zip(panels, COSTS, strict=True):
        _draw(axes, comparison, cost)
    panels[0].set_ylabel("top-1, %" if comparison.task == "classification" else "mAP")
    handles = {text: handle for axes in panels for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9
    )
    if comparison.warnings:
        shown = [textwrap.shorten(f"warning: {text}", 150, placeholder=" ...") for text in comparison.warnings]
        figure.supxlabel("\n".join(shown), fontsize=7, color="0.3", parse_math=False)
    canvas.draw()  # type: ignore[no-untyped-call]  # labels keep clear of what is drawn, so that must have its place
    figure.set_layout_engine("none")
    for axes, cost in zip(panels, COSTS, strict=True):
        _label(figure, axes, _points(comparison, cost), comparison.fronts[cost])
    picture = io.BytesIO()
    figure.savefig(picture, format=place.suffix.lower().removeprefix("."), dpi=150)
    write_file(place, picture.getvalue())


def _points(comparison: Comparison, cost: str) -> list[tuple[str, float, float]]:
    found = [(run.label, float(getattr(run, cost)), run.headline) for run in comparison.runs]
    return [(label, x, y) for label, x, y in found if y is not None]


def _draw(axes: Axes, comparison: Comparison, cost: str) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    points = _points(comparison, cost)
    front = sorted({(x, y) for label, x, y in points if label in comparison.fronts[cost]})
    other = [(x, y) for label, x, y in points if label not in comparison.fronts[cost]]
    costs = [x for _, x, _ in points]
    if max(costs) >= LOG_FROM * min(costs) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.margins(0.14)
    axes.scatter([x for x, _ in front], [y for _, y in front], s=42, color=FRONT, zorder=3, label="on the front")
    if other:
        axes.scatter(
            [x for x, _ in other],
            [y for _, y in other],
            s=42,
            marker="s",
            facecolors="none",
            edgecolors=DOMINATED,
            linewidths=1.4,
            zorder=3,
            label="dominated",
        )
    axes.autoscale_view()
    right = axes.get_xlim()[1]  # what is reached with this much or less: beyond the last point nothing more
    xs, ys = [*(x for x, _ in front), right], [*(y for _, y in front), front[-1][1]]
    axes.set_autoscale_on(False)
    axes.step(xs, ys, where="post", color=FRONT, linewidth=1.2, zorder=2, label="Pareto front")
    axes.set_xlabel(AXES[cost])
    axes.grid(color="0.92", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _label(figure: Figure, axes: Axes, points: Sequence[tuple[str, float, float]], front: Sequence[str]) -> None:
    """Write the labels beside their points, each where it covers least and no other point is nearer."""
    from matplotlib.transforms import Bbox

    renderer: Any = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    pixel = figure.dpi / 72
    at = {(x, y): tuple(axes.transData.transform((x, y))) for _, x, y in points}
    taken = [Bbox.from_bounds(x - 4 * pixel, y - 4 * pixel, 8 * pixel, 8 * pixel) for x, y in at.values()]
    taken += [Bbox.from_extents(*corners) for corners in _steps(axes, {at[x, y] for n, x, y in points if n in front})]
    for name, x, y in points:
        color = FRONT if name in front else DOMINATED
        own, others = at[x, y], [place for place in at.values() if place != at[x, y]]
        best: tuple[float, Any, Any] | None = None
        for dx, dy, across, up in PLACES:
            text = axes.annotate(
                name,
                (x, y),
                (dx, dy),
                textcoords="offset points",
                ha=across,
                va=up,
                fontsize=8,
                color=color,
                annotation_clip=False,
                parse_math=False,  # a folder's name may hold a $
            )
            box = text.get_window_extent(renderer)
            area = box.width * box.height
            cost = sum(_overlap(box, other) for other in taken) + 10 * (area - _overlap(box, figure.bbox))
            if any(_distance(box, other) <= _distance(box, own) for other in others):
                cost += area / 2
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, text, box)
            else:
                text.remove()
            if cost == 0:
                break
        assert best is not None
        taken.append(best[2])


def _steps(axes: Axes, front: set[tuple[float, ...]]) -> Iterator[tuple[float, float, float, float]]:
    """Yield the lines of the front as thin boxes in pixels; so are its points."""
    points = sorted(front)
    for (x, y), after in zip(points, [*points[1:], (axes.bbox.x1, points[-1][1])], strict=True):
        yield x, y - 1, after[0], y + 1
        yield after[0] - 1, y, after[0] + 1, after[1]


def _distance(box: Any, point: Sequence[float]) -> float:
    """Return the distance of a point from a box, in pixels."""
    across = max(box.x0 - point[0], 0.0, point[0] - box.x1)
    up = max(box.y0 - point[1], 0.0, point[1] - box.y1)
    return float(math.hypot(across, up))


def _overlap(one: Any, other: Any) -> float:
    """Return the area that two boxes share, in square pixels."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(max(0.0, width) * max(0.0, height))


__all__ = ["check_plot", "write_plot"]
