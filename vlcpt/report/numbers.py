"""Numbers as people read them, and the few that pages, tables and sentences all work out."""

from __future__ import annotations

import math
from collections.abc import Sequence


def as_number(value: object) -> float | None:
    """A finite number, or None of what is none.

    Example:
        >>> as_number(2), as_number(True), as_number(float("nan")), as_number("2")
        (2.0, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def perplexity_of(loss: float) -> float:
    """exp(loss), of a loss beyond all reason the largest that there is.

    Example:
        >>> perplexity_of(0.0), perplexity_of(1e6) == perplexity_of(700)
        (1.0, True)
    """
    return math.exp(min(loss, 700))


def number(value: float) -> str:
    """Three significant digits, without exponents where a person reads.

    Example:
        >>> number(1234.5), number(1.2345)
        ('1,234', '1.23')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def brief(value: float) -> str:
    """A loss or a perplexity in about three digits.

    Example:
        >>> [brief(value) for value in (684.2, 1.5, 0.09896, 0.00123, 0.0)]
        ['684', '1.50', '0.099', '0.0012', '0']
    """
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}" if size >= 1 else f"{value:.3f}" if size >= 0.01 else f"{value:.2g}"


def arrow(first: float, last: float) -> str:
    """From where to where, in about three digits.

    Example:
        >>> arrow(6.5281, 0.09896)
        '6.53 → 0.099'
    """
    return f"{brief(first)} → {brief(last)}"


def short(value: float) -> str:
    """A number with four significant digits.

    Example:
        >>> short(0.00012345), short(1234567.0), short(2.0)
        ('0.0001234', '1,234,567', '2')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def nats(value: float) -> str:
    """Three digits after the point, and no zero with a sign.

    Example:
        >>> nats(1.23456), nats(-0.0001)
        ('1.235', '0.000')
    """
    return f"{value:.3f}".replace("-0.000", "0.000")


def signed(value: float) -> str:
    """Three digits after the point, with a sign.

    Example:
        >>> signed(1.23456)
        '+1.235'
    """
    return f"{value:+.3f}"


def loss_ends(losses: Sequence[float]) -> tuple[float, float] | None:
    """The mean over the first and over the last losses of a log: up to ten, and no more than a third of it.

    Args:
        losses: Those of its lines; what is no finite number is left out.

    Example:
        >>> loss_ends([4.0, 3.0, 2.0, 1.0, 0.5, 0.25]), loss_ends([])
        ((3.5, 0.375), None)
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    count = min(10, (len(finite) + 2) // 3)
    return (sum(finite[:count]) / count, sum(finite[-count:]) / count) if count else None
