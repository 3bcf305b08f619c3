"""Curves as pictures inside a page, coloured by its style sheet, which knows light, dark and print.

Not drawn by matplotlib, which took 1.3 seconds of a run to import, and 0.7 for each page.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from markupsafe import Markup, escape

from vlcpt.report.numbers import short

POINTS = 400  # of a curve that are drawn, about
MEANS = 120  # stretches of a longer one, whose means are drawn
Point = tuple[float, float]

_SIZE = "0 0 424.8 216"  # on a desktop two charts stand side by side
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.6, 416.3, 7.6, 191.2  # of the field within the axes
_COLOURS, _DASHES = 6, ("", "7 2.5", "2 2", "8 2 2 2", "12 3")
_MARKERS = (  # as the legend shows them, around (14, 6)
    "M10 6a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
    "M10.5 2.5h7v7h-7Z",
    "M14 1.5l4.5 8.5h-9Z",
    "M14 1l5 5l-5 5l-5 -5Z",
    "M14 10.5l4.5 -8.5h-9Z",
    "M10.5 1.5l3.5 3l3.5 -3l2 2l-3.2 2.5l3.2 2.5l-2 2l-3.5 -3l-3.5 3l-2 -2l3.2 -2.5l-3.2 -2.5Z",
)
_IN_PLOT = 'transform="scale(.7) translate(-14 -6)"'  # smaller than in the legend, around the point
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)  # of the numbers at the axes
_INTERVALS = 5  # between them, at most


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Args:
        name: That of the line in the legend; it may be what a user has written.
        points: Step and value, in order.
        is_faint: Whether it is only the ground on which its running mean is seen.
        style: Which colour, dashes and marker it has; by default its place in the chart.
    """

    name: str
    points: Sequence[Point]
    is_faint: bool = False
    style: int | None = None


@dataclass(frozen=True)
class Chart:
    """A picture with what belongs beside it.

    Args:
        title: What it shows.
        unit: That of its values.
        svg: The picture; its words are for a screen reader.
        keys: The legend: a small picture and a name for each line.
        note: What a reader must know besides.
        description: Each line in words.
    """

    title: str
    unit: str
    svg: Markup
    keys: Sequence[tuple[Markup, str]]
    note: str
    description: str


def thinned(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """Points of a long curve: the first, the last, and the lowest and highest of each stretch between.

    Example:
        >>> curve = [(step, 100.0 if step == 777 else float(step % 2)) for step in range(10_000)]
        >>> short = thinned(curve)
        >>> len(short) <= 402, max(value for _, value in short)
        (True, 100.0)
    """
    found = [one for one in points if math.isfinite(one[1])]
    if len(found) <= most:
        return found
    kept = {0, len(found) - 1}
    bins = most // 2
    for number in range(bins):
        stretch = range(number * len(found) // bins, (number + 1) * len(found) // bins)
        kept |= {min(stretch, key=lambda at: found[at][1]), max(stretch, key=lambda at: found[at][1])}
    return [found[at] for at in sorted(kept)]


def stretch_means(points: Sequence[Point], most: int = MEANS) -> list[Point]:
    """The means of a long curve's stretches; a short curve as it is.

    Example:
        >>> stretch_means([(1, 1.0), (2, 3.0), (3, 5.0), (4, 5.0)], most=2)
        [(1.5, 2.0), (3.5, 5.0)]
    """
    found = [one for one in points if math.isfinite(one[1])]
    if len(found) <= most:
        return found
    means: list[Point] = []
    for number in range(most):
        stretch = found[number * len(found) // most : (number + 1) * len(found) // most]
        steps, values = zip(*stretch, strict=True)
        means.append((sum(steps) / len(stretch), sum(values) / len(stretch)))
    return means


def running_mean(points: Sequence[Point], window: int = 10) -> list[Point]:
    """At each point the mean of the last ones.

    Example:
        >>> running_mean([(1, 4.0), (2, 2.0), (3, 0.0)], window=2)
        [(1, 4.0), (2, 3.0), (3, 1.0)]
    """
    found: list[Point] = []
    for number, (step, _) in enumerate(points):
        recent = [value for _, value in points[max(0, number - window + 1) : number + 1]]
        found.append((step, sum(recent) / len(recent)))
    return found


def draw(
    key: str,
    title: str,
    unit: str,
    curves: Sequence[Curve],
    *,
    note: str = "",
    from_zero: bool = False,
    least: float = 0.0,
    until: float = 0.0,
) -> Chart | None:
    """A chart over steps; None where no curve has a point.

    Args:
        key: A word that no other chart of the page has; it begins the ids in the picture.
        from_zero: Whether the axis of values begins at 0, or below where a value is.
        least: What the axis of values spans at least, so that small changes look small.
        until: The step to which the chart goes at least.
    """
    given = [(curve, found) for curve in curves if (found := _finite(curve.points))]
    if not given:
        return None
    words = [described(curve.name, points) for curve, points in given if not curve.is_faint]
    styled = [_Line(curve, points, _style(curve, at)) for at, (curve, points) in enumerate(given)]
    values = [value for one in styled for _, value in one.points]
    keys = [(_legend_key(one), one.curve.name) for one in styled]
    is_long = any(one.is_long for one in styled)
    notes = [note, "Thick: means; thin: lowest and highest." if is_long else ""]
    text = " ".join(words)
    return Chart(
        title,
        unit,
        _picture(styled, _ends(values, from_zero, least), until, (key, title, text)),
        keys if len(keys) > 1 else [],
        " ".join(filter(None, notes)),
        text,
    )


def _finite(points: Sequence[Point]) -> list[Point]:
    return [one for one in points if math.isfinite(one[1])]


@dataclass(frozen=True)
class _Line:
    """A curve with what it looks like; its points are finite."""

    curve: Curve
    points: Sequence[Point]
    style: int

    @property
    def is_long(self) -> bool:
        """Whether its means are drawn, over its extremes: it is long, and goes up and down all the time."""
        if len(self.points) <= POINTS or self.curve.is_faint:
            return False
        values = [value for _, value in self.points]
        moves = median(abs(after - before) for before, after in pairwise(values))
        return moves > 0.005 * (max(values) - min(values))


def described(name: str, points: Sequence[Point]) -> str:
    """A curve in words.

    Example:
        >>> described("loss", [(1, 4.0), (2, 0.5), (3, 2.0)])
        'loss: from 4 at step 1 to 2 at step 3; lowest 0.5 at step 2, highest 4 at step 1.'
    """
    low, high = min(points, key=lambda one: one[1]), max(points, key=lambda one: one[1])
    first, last, lowest, highest = (
        f"{short(value)} at step {step:,.0f}" for step, value in (points[0], points[-1], low, high)
    )
    if len(points) == 1:
        return f"{name}: {first}."
    return f"{name}: from {first} to {last}; lowest {lowest}, highest {highest}."


def _style(curve: Curve, place: int) -> int:
    return place if curve.style is None else curve.style


def _shape(style: int) -> tuple[str, str, str]:
    """Colour, dashes and marker: two lines that share one differ in the others."""
    turn = style // _COLOURS
    return f"c{style % _COLOURS + 1}", _DASHES[(style + turn) % len(_DASHES)], _MARKERS[(style + turn) % 6]


def _ends(values: Sequence[float], from_zero: bool, least: float) -> Point:
    """Where the axis of values begins and ends.

    Example:
        >>> _ends([1.0], True, 0.0), _ends([-1.0, 1.0], True, 0.0), _ends([0.25, 0.75], False, 1.0)
        ((0.0, 1.06), (-1.12, 1.12), (0.0, 1.0))
    """
    low, high = min(values), max(values)
    if from_zero:
        low, high = min(low, 0.0), max(high, least, 0.0)
        margin = 0.06 * (high - low)
        return (low - margin if low < 0 else 0.0), (high + margin) or 1.0
    span = max(high - low, least) or abs(high) or 1.0
    middle = (low + high) / 2
    margin = 0.5 if span > high - low else 0.55
    return middle - margin * span, middle + margin * span


@dataclass(frozen=True)
class _Axis:
    """Where values of one direction lie in the picture.

    Args:
        low, high: The first and the last value.
        start, stop: Where these lie.
    """

    low: float
    high: float
    start: float
    stop: float

    def at(self, value: float) -> str:
        """The place of a value."""
        return _place(self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start))

    def ticks(self, *, whole: bool = False) -> list[float]:
        """Round numbers along the axis.

        Args:
            whole: Whether only whole numbers will do.

        Example:
            >>> _Axis(-0.1, 10.15, 0, 1).ticks(whole=True), _Axis(0.1, 0.9, 0, 1).ticks()
            ([0.0, 2.0, 4.0, 6.0, 8.0, 10.0], [0.2, 0.4, 0.6, 0.8])
        """
        power = 10.0 ** math.floor(math.log10((self.high - self.low) / _INTERVALS))
        for step in (one * power * ten for ten in (1, 10, 100) for one in _STEPS):
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            if last - first <= _INTERVALS and not (whole and step % 1):
                return [float(f"{number * step:.10g}") for number in range(first, last + 1)]
        return []


def _picture(lines: Sequence[_Line], ends: Point, until: float, words: tuple[str, str, str]) -> Markup:
    """The picture; its words are the beginning of its ids, its title and its description.

    It has no style of its own, which the page's policy forbids.
    """
    key, title, description = words
    last = max(until, *(one.points[-1][0] for one in lines))
    across, up = _Axis(-0.01 * last, 1.015 * last or 1.0, _LEFT, _RIGHT), _Axis(*ends, _BOTTOM, _TOP)
    curves = (
        part
        for number, one in enumerate(lines)
        for part in _curve(one, across, up, f"{key}-m{number}", is_alone=len(lines) == 1)
    )
    return Markup(
        f'<svg class="chart" viewBox="{_SIZE}" role="img" aria-labelledby="{key}-title {key}-desc">'
        f'<title id="{key}-title">{escape(title)}</title><desc id="{key}-desc">{escape(description)}</desc>'
        f"{''.join((*_frame(across, up), *curves))}</svg>"
    )


def _frame(across: _Axis, up: _Axis) -> Iterator[str]:
    """The grid, the numbers at the axes, and the line below."""
    for step in across.ticks(whole=True):
        at = across.at(step)
        yield f'<path class="stroke-grid" stroke-width=".8" d="M{at} {_BOTTOM}V{_TOP}"/>'
        yield f'<text class="fill-text" text-anchor="middle" x="{at}" y="203.8">{_tick(step)}</text>'
    for value in up.ticks():
        at = up.at(value)
        yield f'<path class="stroke-grid" stroke-width=".8" d="M{_LEFT} {at}H{_RIGHT}"/>'
        below = _place(float(at) + 3.8)  # the middle of a digit's height
        yield f'<text class="fill-text" text-anchor="end" x="39.6" y="{below}">{_tick(value)}</text>'
    yield f'<path class="stroke-frame" stroke-width=".8" d="M{_LEFT} {_BOTTOM}H{_RIGHT}"/>'


def _curve(line: _Line, across: _Axis, up: _Axis, name: str, *, is_alone: bool) -> Iterator[str]:
    """A line, over its extremes where it is long, with markers where it needs them.

    Args:
        name: The id of its marker.
        is_alone: Whether the chart has no other.
    """
    colour, dashes, marker = _shape(line.style)

    def path(points: Sequence[Point], look: str) -> str:
        places = "L".join(f"{across.at(step)} {up.at(value)}" for step, value in points)
        return f'<path {look} fill="none" stroke-linejoin="round" d="M{places}"/>'

    if line.is_long or line.curve.is_faint:
        yield path(thinned(line.points), f'class="stroke-{colour} faint" stroke-width=".9"')
    if line.curve.is_faint:
        return
    points = stretch_means(line.points) if line.is_long else thinned(line.points)
    dash = f' stroke-dasharray="{dashes}"' if dashes else ""
    yield path(points, f'class="stroke-{colour}" stroke-width="2"{dash}')
    if not is_alone or len(points) < 30:
        yield f'<defs><path id="{name}" d="{marker}" {_IN_PLOT}/></defs>'
        for step, value in points[:: max(1, len(points) // 12)]:
            yield f'<use href="#{name}" class="fill-{colour}" x="{across.at(step)}" y="{up.at(value)}"/>'


def _place(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _tick(value: float) -> str:
    """A number at an axis.

    Example:
        >>> [_tick(value) for value in (0.0, 0.25, 1500.0, 20000.0, 2.5e6, 3e-05)]
        ['0', '0.25', '1,500', '20k', '2.5M', '3e-5']
    """
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return re.sub(r"e([+-])0*", lambda found: f"e{found[1].strip('+')}", f"{value:.6g}")


def _legend_key(line: _Line) -> Markup:
    colour, dashes, marker = _shape(line.style)
    if line.curve.is_faint:
        return _line_key(f"stroke-{colour} faint", "")
    return _line_key(f"stroke-{colour}", dashes, f'<path class="fill-{colour}" d="{marker}"/>')


def _line_key(classes: str, dashes: str, marker: str = "") -> Markup:
    dash = f' stroke-dasharray="{dashes}"' if dashes else ""
    line = f'<path class="{classes}" d="M0 6H28" stroke-width="2"{dash}/>'
    return Markup(f'<svg class="line-key" viewBox="0 0 28 12" aria-hidden="true">{line}{marker}</svg>')
