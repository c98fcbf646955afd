"""The figures of a run's epochs: accuracy (BONN, Fig. 6), losses, learning rate, the two modes, merging."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bonn_plugin.report.charts import Axis, Chart, Line, Pattern, Points, line_chart, linear_axis
from bonn_plugin.report.figures import Figure, Run, Section, numbers
from bonn_plugin.report.history import EpochRecord, MergeCourse, merge_courses

VALLEY_CAPTION = (
    "Two modes: the density of the latent weights near 0 over that at their mean magnitude; 1.36 for a normal "
    "distribution, 0 for two clear modes."
)


def training_section(run: Run, other: Run | None = None) -> Section:
    """Return the figures of the epochs of ``run``, and the measurements of ``other`` beside its own."""
    missing = [
        f"There are no metrics of training in {one.name}; bonn compress records them."
        for one in (run, other)
        if one and not one.history
    ]
    figures = [_accuracy(run, other), _losses(run.history), _rest(run.history)]
    return Section("Training", tuple(f for f in figures if f), missing=tuple(missing))


def merging_section(history: Sequence[EpochRecord]) -> Section | None:
    """Return how the filters of each layer came together; None where none were merged."""
    figures = tuple(_merging(name, merged) for name, merged in merge_courses(history).items())
    return Section("Merging filters", figures) if figures else None


def _accuracy(run: Run, other: Run | None) -> Figure | None:
    lines: dict[str, list[Line]] = {}
    columns: dict[str, Points] = {}
    looks: tuple[tuple[Run | None, int, Pattern], ...] = ((run, 1, ""), (other, 2, "dashed"))
    for one, tone, pattern in looks:
        for key, points in _courses(one.history, [r.scores for r in one.history]).items() if one else ():
            on, _, measured = key.partition("_")
            if measured == "loss":  # stands with the losses
                continue
            name = f"{one.name}, {on}" if one and other else on
            lines.setdefault(measured, []).append(Line(name, points, tone, "dotted" if on == "train" else pattern))
            columns[f"{name}, {_called(measured)}"] = points
    charts = _drawn(line_chart(_called(key), _unit(key), found) for key, found in lines.items())
    if not charts:
        return None
    trained = any(line.pattern == "dotted" for found in lines.values() for line in found)
    caption = "" if trained else "On the test set. On the training set nothing is measured."
    kind = "Mean average precision" if any(key.startswith("map") for key in lines) else "Accuracy"
    title = f"{kind} over the epochs (as Fig. 6 of BONN)"
    return Figure(title, caption, charts, numbers(title, columns), "wide")


def _losses(history: Sequence[EpochRecord]) -> Figure | None:
    scores = _courses(history, [record.scores for record in history])
    losses = _courses(history, [record.loss for record in history])
    losses |= {f"{on}: loss": scores[f"{on}_loss"] for on in ("train", "test") if f"{on}_loss" in scores}
    charts = _drawn(line_chart(name, "", [Line(name, points)], _epochs(history)) for name, points in losses.items())
    caption = "Mean over the steps of each epoch, as added up to the whole loss. Every panel has a scale of its own."
    return Figure("Losses", caption, charts, numbers("Losses", losses)) if charts else None


def _rest(history: Sequence[EpochRecord]) -> Figure | None:
    valleys = [(r.epoch, r.valley) for r in history if r.valley]
    both = {
        "mean of the layers": [(epoch, valley.mean) for epoch, valley in valleys],
        "highest layer": [(epoch, valley.max) for epoch, valley in valleys],
    }
    rates = {"Learning rate": [(r.epoch, r.lr) for r in history if r.lr is not None]}
    x = _epochs(history) if history else None
    told = _courses(history, [record.measures for record in history])
    charts = _drawn(
        [
            *(line_chart(name, "", [Line(name, points)], x) for name, points in rates.items()),
            line_chart(
                "Two modes",
                "valley",
                [Line(n, p, i, "dashed" if i == 2 else "") for i, (n, p) in enumerate(both.items(), 1)],
            ),
            *(line_chart(name, "", [Line(name, points)], x) for name, points in told.items()),
        ]
    )
    if not charts:
        return None
    title = "Learning rate and modes" if valleys else "Learning rate"
    caption = "The largest learning rate of an epoch's last step. " + (VALLEY_CAPTION if valleys else "")
    columns = {**rates, **({f"valley, {n}": p for n, p in both.items()} if valleys else {}), **told}
    return Figure(title, caption.strip(), charts, numbers(title, columns))


def _merging(name: str, merged: MergeCourse) -> Figure:
    gamma = list(zip(merged.epochs, merged.gammas, strict=True))
    distances = {layer: list(zip(merged.epochs, d, strict=True)) for layer, d in merged.distances.items()}
    x = linear_axis("epoch", merged.epochs, whole=True)
    y = linear_axis("distance", [0, 1], ticks=2)
    charts = _drawn(
        line_chart(layer, "", [Line("gamma, the pull", gamma, 2, "dashed"), Line("distance", points)], x, y)
        for layer, points in distances.items()
    )
    title = f"Distance of the filters to their group's mean, {name}"
    caption = "Of the filters as they are binarised, over their norm: at 0 the filters of each group are equal."
    return Figure(title, caption, charts, numbers(title, {"gamma": gamma, **distances}), "small")


def _epochs(history: Sequence[EpochRecord]) -> Axis:
    return linear_axis("epoch", [record.epoch for record in history], whole=True)


def _drawn(charts: Iterable[Chart | None]) -> tuple[Chart, ...]:
    return tuple(chart for chart in charts if chart)


def _called(measured: str) -> str:
    """Return how a measurement is called: top-1 of "top1", mAP50 of "map50"."""
    if measured.startswith("top"):
        return f"top-{measured.removeprefix('top')}"
    return f"mAP{measured.removeprefix('map')}" if measured.startswith("map") else measured.replace("_", " ")


def _unit(measured: str) -> str:
    return "in %" if measured.startswith("top") else "from 0 to 1" if measured.startswith("map") else "value"


def _courses(history: Sequence[EpochRecord], told: Sequence[Mapping[str, float]]) -> dict[str, Points]:
    """Return the points (epoch, value) of each name that any epoch tells."""
    found: dict[str, list[tuple[float, float]]] = {}
    for record, values in zip(history, told, strict=True):
        for name, value in values.items():
            found.setdefault(name, []).append((record.epoch, value))
    return dict(found)
