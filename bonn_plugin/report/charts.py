"""Charts as geometry: axes, ticks and paths in a square of 1000 that the page stretches to its place.

Labels are text of the page, so that they keep their size on any screen; only lines and areas are SVG.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

SIDE = 1000
"""Width and height of the drawing, in its own units; y points down."""
DOTTED = 40
"""Curves of up to so many points show them as dots."""
NARROW = 0.02
"""An axis spans at least this share of the largest value, so that noise does not look like a change."""

Points = Sequence[tuple[float, float]]
Pattern = Literal["", "dashed", "dotted"]


@dataclass(frozen=True)
class Axis:
    """One axis: what it shows, its ends, and its ticks as (place in percent from the low end, label)."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def place(self, value: float) -> float:
        """Return where ``value`` lies, from 0 at the low end to 1 at the high one."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Line:
    """What a line shows, by its (x, y); ``tone`` is its colour, from 1, ``pattern`` its class in the style sheet."""

    name: str
    points: Points
    tone: int = 1
    pattern: Pattern = ""

    @property
    def seen(self) -> Points:
        """The points that are finite."""
        return [(x, y) for x, y in self.points if math.isfinite(y)]


@dataclass(frozen=True)
class Curve:
    """A line or a filled area, drawn.

    Attributes:
        name: what it shows; curves of one name and tone look the same.
        tone: its colour, from 1.
        pattern: of its line, empty for a whole one.
        line: SVG path of the line.
        dots: SVG path of the points, empty where there are too many, or the line lies over another.
        area: SVG path of what is filled, empty for a line.
    """

    name: str
    tone: int
    pattern: Pattern
    line: str
    dots: str = ""
    area: str = ""


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        title: its heading.
        description: what it shows, in words with numbers, for who can't see it.
        x: horizontal axis.
        y: vertical axis.
        curves: from back to front.
        guides: places of vertical lines, in percent from the left.
        backdrop: SVG path of lines that are there for comparison.
    """

    title: str
    description: str
    x: Axis
    y: Axis
    curves: tuple[Curve, ...]
    guides: tuple[float, ...] = ()
    backdrop: str = ""

    @property
    def legend(self) -> tuple[Curve, ...]:
        """One curve of each look; none where all look the same."""
        looks = {(c.name, c.tone, c.pattern): c for c in self.curves}
        return tuple(looks.values()) if len(looks) > 1 else ()


def linear_axis(label: str, values: Iterable[float], *, whole: bool = False, ticks: int = 4) -> Axis:
    """Return an axis over ``values``, whose ends are ticks or, of a ``whole`` axis, the values themselves.

    Args:
        label: what it shows.
        values: at least one, finite.
        whole: only whole numbers are ticks.
        ticks: about so many steps.

    >>> linear_axis("epoch", [1, 40], whole=True).ticks[-1]
    (100.0, '40')
    """
    found = list(values)
    low, high = min(found), max(found)
    if whole:
        high = max(high, low + 1)
    elif high - low < NARROW * max(abs(low), abs(high)):
        middle, margin = (low + high) / 2, NARROW / 2 * max(abs(low), abs(high))
        low, high = middle - margin, middle + margin
    elif low == high:
        high = 1.0
    step = _step((high - low) / ticks)
    if whole:
        step = max(1.0, step)
        first = math.ceil(low / step)
        inner = [i * step for i in range(first, math.floor(high / step) + 1)]
        # the ends are told; a tick too near to one of them would overlap
        places = [low, *(v for v in inner if min(v - low, high - v) > 0.6 * step), high]
    else:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        places = [low + i * step for i in range(round((high - low) / step) + 1)]
    axis = Axis(label, low, high, ())
    return Axis(label, low, high, tuple((round(100 * axis.place(v), 2), _text(v, step)) for v in places))


def line_chart(
    title: str, label: str, lines: Sequence[Line], x: Axis | None = None, y: Axis | None = None, backdrop: str = ""
) -> Chart | None:
    """Return a chart of lines over epochs; None where no point is finite.

    Args:
        title: its heading.
        label: what the vertical axis shows, where the title does not say it.
        lines: from back to front; one without finite points is left out.
        x: the epochs; default those of the lines.
        y: default what the lines need.
        backdrop: SVG path of lines that are there for comparison.
    """
    drawn = [line for line in lines if line.seen]
    if not drawn:
        return None
    x = x or linear_axis("epoch", [px for line in drawn for px, _ in line.points], whole=True)
    y = y or linear_axis(label, [py for line in drawn for _, py in line.seen])
    told = "; ".join(course(line) for line in drawn)
    curves = tuple(curve(line, x, y) for line in drawn)
    description = f"{title}{label and ', '}{label} over epochs: {told}"
    return Chart(title, description, x, y, curves, backdrop=backdrop)


def curve(line: Line, x: Axis, y: Axis) -> Curve:
    """Draw a line; it is broken where a point is not finite.

    >>> axis = Axis("", 0, 1, ())
    >>> curve(Line("a", [(0, 0), (1, 1)]), axis, axis).line
    'M0 1000L1000 0'
    """
    placed = [_place(px, py, x, y) if math.isfinite(py) else None for px, py in line.points]
    seen = [p for p in placed if p is not None]
    shown = len(seen) == 1 or (len(seen) <= DOTTED and not line.pattern)
    dots = "".join(f"M{p}h0" for p in seen) if shown else ""
    return Curve(line.name, line.tone, line.pattern, _joined(placed), dots)


def histogram(name: str, shares: Points, x: Axis, y: Axis, *, tone: int = 1) -> Curve:
    """Return the filled steps of a histogram, from (middle, height) of bins of one width.

    >>> axis = Axis("", 0, 2, ())
    >>> histogram("a", [(0.5, 1), (1.5, 2)], axis, axis).line
    'M0 500H500V0H1000'
    """
    width = shares[1][0] - shares[0][0] if len(shares) > 1 else x.high - x.low

    def right(middle: float) -> str:
        return _number(SIDE * x.place(middle + width / 2))

    left = _number(SIDE * x.place(shares[0][0] - width / 2))
    steps = "".join(f"H{right(m)}V{_number(SIDE * (1 - y.place(h)))}" for (m, _), (_, h) in pairwise(shares))
    line = f"M{left} {_number(SIDE * (1 - y.place(shares[0][1])))}{steps}H{right(shares[-1][0])}"
    ground = _number(SIDE * (1 - y.place(0)))
    return Curve(name, tone, "", line, area=f"{line}V{ground}H{left}Z")


def words(value: float) -> str:
    """Return a number as a sentence has it.

    >>> words(98.4375), words(0.00012345), words(3)
    ('98.44', '0.0001234', '3')
    """
    return f"{value:.4g}"


def course(line: Line) -> str:
    """Return what a line does, in words.

    >>> course(Line("top-1", [(1, 50), (2, 75), (3, 70)]))
    'top-1 from 50 at 1 to 70 at 3, lowest 50, highest 75'
    """
    (x0, first), (x1, last), heights = line.seen[0], line.seen[-1], [y for _, y in line.seen]
    if len(heights) == 1:
        return f"{line.name} {words(first)} at {words(x0)}"
    ends = f"{line.name} from {words(first)} at {words(x0)} to {words(last)} at {words(x1)}"
    return f"{ends}, lowest {words(min(heights))}, highest {words(max(heights))}"


def _place(px: float, py: float, x: Axis, y: Axis) -> str:
    return f"{_number(SIDE * x.place(px))} {_number(SIDE * (1 - y.place(py)))}"


def _joined(placed: Sequence[str | None]) -> str:
    path, down = [], False
    for point in placed:
        if point is not None:
            path.append(("L" if down else "M") + point)
        down = point is not None
    return "".join(path)


def _step(rough: float) -> float:
    """Return the smallest of 1, 2, 5 times a power of ten that is no less than ``rough``."""
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _text(value: float, step: float) -> str:
    """Return a tick's label, with the digits that tell it from the next one."""
    if abs(value) < 1e-6 * step:
        return "0"
    last = math.floor(math.log10(step) + 1e-9)
    if not 1e-3 <= max(abs(value), step) < 1e7:
        digits = max(0, math.floor(math.log10(abs(value)) + 1e-9) - last)
        mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.{max(0, -last)}f}"


def _number(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
