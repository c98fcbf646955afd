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
    merged = [(r["epoch"], r["filter_merge"]) for r in records if "filter_merge" in r]
    if not merged:
        return []
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BonnError("plots need matplotlib: pip install 'bonn_plugin[plots]'") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    epochs = [epoch for epoch, _ in merged]
    layers = list(merged[0][1]["within_group_distance"])
    for name in layers:
        # of the filters that are binarised: (1 - gamma) X + gamma X̄ lies (1 - gamma) as far from X̄ as X does
        distances = [(1 - m["gamma"]) * m["within_group_distance"][name] for _, m in merged]
        axes.plot(epochs, distances, label=name, linewidth=1)
    axes.plot(epochs, [m["gamma"] for _, m in merged], "k--", label="gamma")
    axes.set(xlabel="epoch", ylabel="distance to the group mean / norm", ylim=(0, 1.05))
    axes.legend(fontsize=6, ncols=1 + len(layers) // 20, loc="center left", bbox_to_anchor=(1, 0.5))
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
