"""Pictures of a run, from its metrics. matplotlib is an extra: ``pip install bonn_plugin[plots]``."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from bonn_plugin.errors import BonnError
from bonn_plugin.files import write_file

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
    records = _read(metrics)
    # (epoch, gamma, distances by layer) of each filter_merge of the recipe
    runs: dict[str, list[tuple[int, float, dict[str, float]]]] = {}
    for r in records:
        for name in (n for n in r if n.partition(".")[0] == "filter_merge"):
            runs.setdefault(name, []).append((r["epoch"], r[name]["gamma"], r[name]["within_group_distance"]))
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
    for name, points in runs.items():
        epochs = [epoch for epoch, _, _ in points]
        layers = list(points[0][2])
        for i, layer in enumerate(layers):
            # of the filters that are binarised: (1 - gamma) X + gamma X̄ lies (1 - gamma) as far from X̄ as X does
            distances = [(1 - gamma) * of[layer] for _, gamma, of in points]
            color = colormaps["viridis"](i / max(1, len(layers) - 1))
            axes.plot(epochs, distances, ".-", label=layer, linewidth=1, color=color)
        axes.plot(epochs, [gamma for _, gamma, _ in points], "k--", label=f"gamma of {name}")
    axes.set(xlabel="epoch", ylabel="distance to the group mean / norm", ylim=(0, 1.05))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    lines = len(axes.get_lines())
    axes.legend(fontsize=6, ncols=1 + lines // 24, loc="center left", bbox_to_anchor=(1, 0.5))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    target = folder / DISTANCE_PLOT
    write_file(target, picture.getvalue())
    return [target]


def _read(metrics: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise BonnError(f"{metrics}: can't be read: {error.strerror}; bonn compress writes it") from None
    except ValueError:
        raise BonnError(f"{metrics}: not the metrics of a run, or damaged") from None
