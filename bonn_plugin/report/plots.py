"""Pictures of a run, from its metrics. matplotlib is an extra: ``pip install bonn_plugin[plots]``."""

from __future__ import annotations

import io
from pathlib import Path

from bonn_plugin.errors import BonnError
from bonn_plugin.files import write_file
from bonn_plugin.report.history import merge_courses, read_history

DISTANCE_PLOT = "within_group_distance.png"


def write_plots(metrics: Path, folder: Path) -> list[Path]:
    """Draw what there is to draw of a run, as PNG files in ``folder``.

    Args:
        metrics: the run's metrics.jsonl, one record an epoch.
        folder: where the pictures go.

    Returns:
        The files written; none where no filters were merged.

    Raises:
        BonnError: matplotlib is not installed, or the metrics can't be read.
    """
    runs = merge_courses(read_history(metrics))
    if not runs:
        return []
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise BonnError("plots need matplotlib: pip install 'bonn_plugin[plots]'") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, course in runs.items():
        for i, (layer, distances) in enumerate(course.distances.items()):
            color = colormaps["viridis"](i / max(1, len(course.distances) - 1))
            axes.plot(course.epochs, distances, ".-", label=layer, linewidth=1, color=color)
        axes.plot(course.epochs, course.gammas, "k--", label=f"gamma of {name}")
    axes.set(xlabel="epoch", ylabel="distance to the group mean / norm", ylim=(0, 1.05))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    lines = len(axes.get_lines())
    axes.legend(fontsize=6, ncols=1 + lines // 24, loc="center left", bbox_to_anchor=(1, 0.5))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    target = folder / DISTANCE_PLOT
    write_file(target, picture.getvalue())
    return [target]
