"""The figures of the latent weights: over the epochs (BONN, Fig. 3), of two runs (Fig. 4), their scales (Fig. 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bonn_plugin.errors import BonnError
from bonn_plugin.report.charts import Chart, Line, curve, histogram, line_chart, linear_axis, words
from bonn_plugin.report.distributions import OPTION, Moment
from bonn_plugin.report.figures import Figure, Section, numbers
from bonn_plugin.report.tables import Table

PANELS = 5
"""Histograms of one layer over the epochs."""
BARS = 64
"""Bars of a histogram, at most."""
ROWS = 32
"""Rows of a histogram's table, at most, besides what lies outside."""
COMPARED = (2, 8, 14)
"""Which binarised layers two runs are compared in, counted from 1, as in Fig. 4."""

WEIGHTS_TITLE = "Latent weights and binarised values"
FOLDED_TITLE = "Latent weights over the epochs (as Fig. 3 of BONN), layer by layer"
AXIS = "X / mean |X|"
HISTOGRAMS_CAPTION = (
    "Share of a layer's latent weights X in each bar. The dotted lines stand at plus and minus their mean magnitude: "
    "with two modes the weights gather there. Valley is the density near 0 over the density there: 1.36 for a normal "
    "distribution, 0 for two clear modes."
)


@dataclass(frozen=True)
class Weights:
    """A run's name on the page and what it recorded of its weights."""

    name: str
    moments: tuple[Moment, ...]


def weights_section(weights: Weights | None, other: Weights | None = None, *, binarised: bool = True) -> Section:
    """Return the figures of the latent weights of a run, and of another run beside it.

    Args:
        weights: None where the run has not recorded them.
        other: to compare with.
        binarised: whether the network has binarised weights at all.

    Raises:
        BonnError: the two runs have other layers or bins.
    """
    if weights is None:
        line = f"How the latent weights lie over the epochs was not recorded: bonn compress {OPTION} does it."
        if not binarised:
            line = "No weights are binarised in this network."
        return Section(WEIGHTS_TITLE, missing=(line,))
    compared = _compared(weights, other) if other else ()
    layers = list(weights.moments[-1].layers)
    over_epochs = tuple(_over_epochs(weights.moments, name, opened=name == layers[0]) for name in layers)
    return Section(WEIGHTS_TITLE, (*compared, _scales(weights, other), *over_epochs), FOLDED_TITLE, HISTOGRAMS_CAPTION)


def _over_epochs(moments: Sequence[Moment], name: str, *, opened: bool) -> Figure:
    shown = [moments[i] for i in _spread(len(moments))]
    charts = _histograms([(_when(moment), moment, 1) for moment in shown], name)
    first, last = moments[0], moments[-1]
    remark = f"valley {_valley(first, name)}" + (f" to {_valley(last, name)}" if last is not first else "")
    table = _bins(f"{name}, share of the weights in %", [(_when(moment), moment) for moment in shown], name)
    return Figure(name, "", charts, table, "small", remark, opened)


def _compared(weights: Weights, other: Weights) -> tuple[Figure, ...]:
    own, theirs = weights.moments[-1], other.moments[-1]
    if list(own.layers) != list(theirs.layers):
        odd = next((n for n in [*own.layers, *theirs.layers] if (n in own.layers) != (n in theirs.layers)), None)
        which = f"{odd} is binarised in one of them alone" if odd else "they stand in another order"
        raise BonnError(f"{other.name} has other layers than {weights.name}, they can't be compared: {which}")
    if own.bins != theirs.bins:
        raise BonnError(f"{other.name} has other bins than {weights.name}, they can't be compared: {theirs.bins}")
    names = list(own.layers)
    places = sorted({min(number, len(names)) for number in COMPARED})
    figures = []
    for number in places:
        name = names[number - 1]
        sides = [(f"{one.name}, {_when(one.moments[-1])}", one.moments[-1]) for one in (weights, other)]
        charts = _histograms([(title, moment, tone) for tone, (title, moment) in enumerate(sides, 1)], name)
        table = _bins(f"{name}, two runs, share of the weights in %", sides, name)
        title = f"Two runs: {name}, binarised layer {number} of {len(names)} (as Fig. 4 of BONN)"
        told = "; ".join(f"{side} valley {_valley(moment, name)}" for side, moment in sides)
        figures.append(Figure(title, told, charts, table, "pair"))
    return tuple(figures)


def _scales(weights: Weights, other: Weights | None) -> Figure:
    runs = [one for one in (weights, other) if one]
    layers = list(weights.moments[-1].layers)
    values = [m.layers[n].scale for one in runs for m in one.moments for n in layers]
    x = linear_axis("epoch", [m.epoch for one in runs for m in one.moments], whole=True)
    y = linear_axis("w̄", [0.0, *values], ticks=3)
    lines = {
        name: [
            Line(
                one.name if other else "w̄",
                [(m.epoch, m.layers[name].scale) for m in one.moments],
                tone,
                "dashed" if tone == 2 else "",
            )
            for tone, one in enumerate(runs, 1)
        ]
        for name in layers
    }
    behind = "".join(curve(found[0], x, y).line for found in lines.values())
    charts = [line_chart(name, "w̄", found, x, y, behind) for name, found in lines.items()]
    columns = {f"{n}, {line.name}" if other else n: line.points for n, found in lines.items() for line in found}
    title = "Binarised values over the epochs (as Fig. 5 of BONN)"
    caption = "The scale w̄ of each layer, whose binarised weights are plus and minus w̄; one scale for all panels" + (
        ", thin lines are the other layers." if len(layers) > 1 else "."
    )
    return Figure(title, caption, tuple(c for c in charts if c), numbers(title, columns), "small")


def _histograms(sides: Sequence[tuple[str, Moment, int]], name: str) -> tuple[Chart, ...]:
    """Draw one layer at several moments, each as (title, moment, tone), on one scale."""
    low, high, number = sides[0][1].bins
    join = _join(number, BARS)
    shares = [[(middle, 100 * share) for middle, share in moment.shares(name, join)] for _, moment, _ in sides]
    x = linear_axis(AXIS, [low, high])
    y = linear_axis("in %", [0.0, *(share for found in shares for _, share in found)], ticks=2)
    guides = tuple(100 * x.place(at) for at in (-1.0, 1.0) if low < at < high)
    return tuple(
        Chart(title, _told(title, moment, name), x, y, (histogram(name, found, x, y, tone=tone),), guides)
        for (title, moment, tone), found in zip(sides, shares, strict=True)
    )


def _told(title: str, moment: Moment, name: str) -> str:
    layer, (low, high, _) = moment.layers[name], moment.bins
    told = f"Histogram of {name}, {title}: valley {_valley(moment, name)}, mean |X| {words(layer.mean_abs)}"
    return f"{told}, {words(100 * layer.outside)} % of the weights outside of {low:g} to {high:g}"


def _bins(title: str, moments: Sequence[tuple[str, Moment]], name: str) -> Table:
    """Return one layer's histogram at several moments, each as (title, moment), in coarser bins."""
    low, high, number = moments[0][1].bins
    join = _join(number, ROWS)
    width = (high - low) / number * join
    columns = [[100 * share for _, share in moment.shares(name, join)] for _, moment in moments]
    sides = [
        [100 * moment.layers[name].counts[at] / moment.layers[name].total for _, moment in moments] for at in (0, -1)
    ]
    rows = (
        (f"below {low:g}", *(f"{share:.2f}" for share in sides[0])),
        *(
            (f"{low + i * width:.4g} to {low + (i + 1) * width:.4g}", *(f"{column[i]:.2f}" for column in columns))
            for i in range(number // join)
        ),
        (f"above {high:g}", *(f"{share:.2f}" for share in sides[1])),
    )
    return Table(title, (f"<{AXIS}", *(when for when, _ in moments)), rows)


def _spread(count: int) -> list[int]:
    """Return up to ``PANELS`` places in ``count``, the first and the last among them, evenly spread."""
    panels = min(PANELS, count)
    return [round(i * (count - 1) / max(1, panels - 1)) for i in range(panels)]


def _join(number: int, most: int) -> int:
    """Return how many neighbouring bins to take as one, so that ``most`` of them are left."""
    return next(join for join in range(1, number + 1) if number % join == 0 and number // join <= most)


def _when(moment: Moment) -> str:
    return f"epoch {moment.epoch}" if moment.epoch else "before training"


def _valley(moment: Moment, name: str) -> str:
    value = moment.valley(name)
    return f"{value:.2f}" if value < 100 else words(value)
