"""Does it read its images? Curves of what blank images cost in training, and bars at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlcpt.report.numbers import as_number, signed
from vlcpt.report.pages.charts import Chart, Curve, draw

QUESTION = "Does it read its images?"
LEAST = 0.2  # nats that the axis spans at least: what is next to nothing must look so


def reliance_chart(
    key: str, title: str, curves: Sequence[Curve], *, note: str = "", until: float = 0.0
) -> Chart | None:
    """How far the text relies on its images, over steps; None where it was not measured.

    Args:
        key, until: See :func:`~vlcpt.report.pages.charts.draw`.
        note: What a reader must know besides.
    """
    said = " ".join(
        filter(None, ("What blank images cost. Near 0: the text does not need its images.", note))
    )
    return draw(
        key, title, "nats per target, by step", curves, note=said, from_zero=True, least=LEAST, until=until
    )


def cost_bars(
    results: Mapping[str, Mapping[str, object]], retention: Sequence[str]
) -> list[tuple[str, list[dict[str, object]]]]:
    """By set, what other images cost: bars on one scale, in percent of their width."""
    found: list[tuple[str, list[tuple[str, float, float | None, float | None]]]] = []
    for name, one in results.items():
        loss, costs = as_number(one.get("loss")), []
        for key, words in (("shuffled", "another document's image"), ("blank", "a blank image")):
            other = as_number(one.get(f"{key}_images_loss"))
            if loss is not None and other is not None:
                costs.append((words, other - loss, *_interval(one, key)))
        label = f"{name}{' (retention)' if name in retention else ''}{_needing(one)}"
        found += [(label, costs)] if costs else []
    ends = [edge for _, costs in found for _, *edges in costs for edge in edges if edge is not None]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    width = (high - low) or 1.0

    def place(value: float) -> float:
        return round(100 * (value - low) / width, 2)

    return [
        (
            name,
            [
                {
                    "label": words,
                    "text": signed(value) + _range(below, above),
                    "start": place(min(value, 0.0)),
                    "width": round(place(abs(value) + low), 2),
                    "whiskers": None if below is None else (place(below), place(above or 0.0)),
                    "zero": place(0.0),
                }
                for words, value, below, above in costs
            ],
        )
        for name, costs in found
    ]


def _needing(result: Mapping[str, object]) -> str:
    """How many targets of a set need their image, where that was measured."""
    relying = result.get("reliance")
    share = as_number(relying.get("share_over_0.1")) if isinstance(relying, dict) else None
    return "" if share is None else f": {share:.0%} of targets get over 0.1 nats"


def _range(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" ({signed(low)} to {signed(high)})"


def _interval(result: Mapping[str, object], key: str) -> tuple[float | None, float | None]:
    intervals = result.get("intervals")
    low, high = intervals.get(key, (None, None)) if isinstance(intervals, dict) else (None, None)
    return low, high
