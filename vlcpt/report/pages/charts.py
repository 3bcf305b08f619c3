"""Curves as pictures inside a page: drawn by matplotlib, coloured by the page's own style sheet."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import pairwise
from statistics import median
from xml.etree import ElementTree

from markupsafe import Markup, escape

from vlcpt.report.numbers import short

POINTS = 400  # of a curve that are drawn, about
MEANS = 120  # stretches of a longer one, whose means are drawn
Point = tuple[float, float]

_SIZE = (5.9, 3.0)  # inches of 72 units; on a desktop two charts stand side by side
_COLOURS, _DASHES = 6, ("", "7 2.5", "2 2", "8 2 2 2", "12 3")
# matplotlib's names of markers, and the shape that the legend shows.
_MARKERS = {
    "o": "M10 6a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
    "s": "M10.5 2.5h7v7h-7Z",
    "^": "M14 1.5l4.5 8.5h-9Z",
    "D": "M14 1l5 5l-5 5l-5 -5Z",
    "v": "M14 10.5l4.5 -8.5h-9Z",
    "X": "M10.5 1.5l3.5 3l3.5 -3l2 2l-3.2 2.5l3.2 2.5l-2 2l-3.5 -3l-3.5 3l-2 -2l3.2 -2.5l-3.2 -2.5Z",
}
# Colours that matplotlib is given stand for classes of the style sheet, which knows light, dark and print.
_CLASSES = {f"#0000{number:02x}": f"c{number}" for number in range(1, _COLOURS + 1)}
_CLASSES |= {"#010000": "text", "#020000": "frame", "#030000": "grid", "#040000": "paper"}
_HEX = {name: colour for colour, name in _CLASSES.items()}
_STEPS = [1, 2, 2.5, 5, 10]  # of the numbers at the axes
_NUMBER = re.compile(r"-?\d+\.\d+")


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
    plotted = _plotted(styled, _ends(values, from_zero, least), until)
    keys = [(_legend_key(one), one.curve.name) for one in styled]
    is_long = any(one.is_long for one in styled)
    notes = [note, "Thick: means; thin: lowest and highest." if is_long else ""]
    text = " ".join(words)
    return Chart(
        title,
        unit,
        _cleaned(plotted, key, title, text),
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
    return f"c{style % _COLOURS + 1}", _DASHES[(style + turn) % len(_DASHES)], [*_MARKERS][(style + turn) % 6]


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


def _plotted(lines: Sequence[_Line], ends: Point, until: float) -> str:
    """The picture as matplotlib writes it."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    # A user's own matplotlibrc must not change the page.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "vlcpt", "path.simplify": True}):
        figure = Figure(figsize=_SIZE, dpi=72)
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0.105, 0.115, 0.875, 0.85))
        for one in lines:
            colour, dashes, marker = _shape(one.style)
            if one.is_long or one.curve.is_faint:
                axes.plot(*_axes_of(thinned(one.points)), color=_HEX[colour], linewidth=0.9, alpha=0.45)
            if one.curve.is_faint:
                continue
            points = stretch_means(one.points) if one.is_long else thinned(one.points)
            (line,) = axes.plot(*_axes_of(points), color=_HEX[colour], linewidth=2, clip_on=False)
            if dashes:
                line.set_dashes([float(length) for length in dashes.split()])
            if len(lines) > 1 or len(points) < 30:
                line.set_marker(marker)
                line.set_markersize(5.5)
                line.set_markevery(max(1, len(points) // 12))
        last = max(until, *(one.points[-1][0] for one in lines))
        axes.set_xlim(-0.01 * last, 1.015 * last or 1)
        axes.set_ylim(*ends)
        axes.grid(True, color=_HEX["grid"], linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_facecolor("none")
        axes.tick_params(length=0, labelcolor=_HEX["text"], labelsize=10, pad=5)
        for name, spine in axes.spines.items():
            spine.set_visible(name == "bottom")
            spine.set_color(_HEX["frame"])
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: _tick(step)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        figure.patch.set_alpha(0)
        text = StringIO()
        figure.savefig(
            text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return text.getvalue()


def _axes_of(points: Sequence[Point]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    steps, values = zip(*points, strict=True)
    return steps, values


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


def _cleaned(svg: str, key: str, title: str, description: str) -> Markup:
    """A picture without styles of its own, which the page's policy forbids, and without foreign ids."""
    root = ElementTree.fromstring(svg)
    used = {found for one in root.iter() for value in one.attrib.values() for found in _references(value)}
    body = "".join(_written(one, key, used) for one in root)
    box = root.attrib["viewBox"]
    return Markup(
        f'<svg class="chart" viewBox="{box}" role="img" aria-labelledby="{key}-title {key}-desc">'
        f'<title id="{key}-title">{escape(title)}</title><desc id="{key}-desc">{escape(description)}</desc>'
        f"{body}</svg>"
    )


def _references(value: str) -> Iterator[str]:
    """Ids that an attribute names."""
    yield from re.findall(r"url\(#([^)]+)\)", value)
    if value.startswith("#"):
        yield value[1:]


def _written(element: ElementTree.Element, key: str, used: set[str]) -> str:
    """An element and what is in it, as the page has it."""
    name = element.tag.rpartition("}")[2]
    if name in ("metadata", "style", "title", "desc"):
        return ""
    classes: list[str] = []
    found: dict[str, str] = {}
    for full, value in element.attrib.items():
        attribute = full.rpartition("}")[2]
        if attribute == "style":
            found |= _attributes(value, classes)
        elif attribute == "id":
            found |= {"id": f"{key}-{value}"} if value in used else {}
        else:
            found[attribute] = re.sub(r"^#(?=\w)|(?<=url\()#", f"#{key}-", value)
    for attribute in found.keys() & {"d", "x", "y", "transform"}:
        found[attribute] = " ".join(_NUMBER.sub(_rounded, found[attribute]).split())
    if found.get("transform", "").startswith("rotate(-0 "):
        del found["transform"]
    if classes:
        found["class"] = " ".join(classes)
    if found.get("opacity") == "0" or (name == "path" and found.get("fill") == "none" and not classes):
        return ""  # the grounds of the picture
    inner = "".join(_written(one, key, used) for one in element)
    text = escape((element.text or "").strip())
    if not inner and not text and name in ("g", "defs"):
        return ""
    shown = "".join(f' {attribute}="{escape(value)}"' for attribute, value in found.items())
    return f"<{name}{shown}>{text}{inner}</{name}>"


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.1f}".removesuffix(".0")


def _attributes(style: str, classes: list[str]) -> dict[str, str]:
    """A ``style`` as attributes; a colour becomes a class."""
    found: dict[str, str] = {}
    for name, _, value in (one.partition(":") for one in style.split(";") if one.strip()):
        name, value = name.strip(), value.strip()
        if name.startswith("font"):
            continue  # the page has its own
        if value in _CLASSES:
            classes.append(f"{name}-{_CLASSES[value]}")
        else:
            found[name] = value
    return found


def _legend_key(line: _Line) -> Markup:
    colour, dashes, marker = _shape(line.style)
    if line.curve.is_faint:
        return _line_key(f"stroke-{colour} faint", "")
    return _line_key(f"stroke-{colour}", dashes, f'<path class="fill-{colour}" d="{_MARKERS[marker]}"/>')


def _line_key(classes: str, dashes: str, marker: str = "") -> Markup:
    dash = f' stroke-dasharray="{dashes}"' if dashes else ""
    line = f'<path class="{classes}" d="M0 6H28" stroke-width="2"{dash}/>'
    return Markup(f'<svg class="line-key" viewBox="0 0 28 12" aria-hidden="true">{line}{marker}</svg>')
