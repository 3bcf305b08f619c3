"""The plot of a card: what training, another document's image and a blank one change, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO

from vlcpt.report.verdict import DIFFERENCES, difference

# Okabe and Ito's colours, which the colour-blind can tell apart; the shapes differ too.
_LOOKS = {"learnt": ("#0072B2", "o"), "shuffled": ("#D55E00", "s"), "blank": ("#009E73", "D")}
_ROW = 0.32  # inches of a row
_NAME = 24  # characters of a name, at most


def plot_differences(results: Mapping[str, Mapping[str, object]]) -> bytes | None:
    """A PNG of the differences of each set, in nats per target; None where there are none.

    Args:
        results: By name of the set, what ``vlcpt eval --output`` writes under ``sets``.

    Example:
        >>> plot_differences({"held": {"loss": 1.0}}) is None
        True
        >>> plot_differences({"held": {"loss": 1.0, "base_loss": 1.5}})[:4]
        b'\\x89PNG'
    """
    rows = [
        (place, name, found)
        for place, one in enumerate(results.values(), 1)
        for name in DIFFERENCES
        if (found := difference(one, name)) is not None
    ]
    if not rows:
        return None
    # Imported here, because most pushes need no plot; without pyplot, which holds a state of its own.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 0.9 + _ROW * len(rows)), dpi=144, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    for height, (_, name, found) in enumerate(rows):
        colour, marker = _LOOKS[name]
        low, high = (found.value if bound is None else bound for bound in (found.low, found.high))
        axes.plot([low, high], [height, height], color=colour, linewidth=2)
        axes.plot([found.value], [height], color=colour, marker=marker, markersize=6)
    axes.axvline(0, color="#777777", linewidth=0.8)
    labels = [f"{_shown(results, place)}: {DIFFERENCES[name][1]}" for place, name, _ in rows]
    # A dollar sign in a name is no formula.
    axes.set_yticks(range(len(rows)), labels, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("nats per target, with 95% intervals over documents")
    axes.spines[["top", "right"]].set_visible(False)
    file = BytesIO()
    canvas.print_png(file, metadata={"Software": None})
    return file.getvalue()


def _shown(results: Mapping[str, object], place: int) -> str:
    """A set's name, or its place where the font of the plot may not have its characters."""
    name = [*results][place - 1]
    if not (name.isascii() and name.isprintable()):
        return f"set {place}"
    return name if len(name) <= _NAME else f"{name[: _NAME - 3]}..."
