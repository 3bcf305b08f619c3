"""95% intervals of losses over documents, by a paired bootstrap of ratios of sums."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000  # sets of documents that are drawn
LEVEL = 0.95
FEWEST = 8  # documents; of fewer, intervals hold the truth less often than they say
_SEED = 20261129
_CHUNK = 4_000_000  # counts of documents that are held at once
Interval = tuple[float, float]


def loss_intervals(
    sums: np.ndarray, differences: Mapping[str, tuple[int, int | None]]
) -> dict[str, Interval | None]:
    """95% intervals of Σ nll / Σ targets, and of differences of two such ratios, over documents.

    Documents are drawn with replacement, each with all its passes: what makes a document hard is in both
    losses of a difference, and falls away. Targets of one document depend on each other, so none is drawn
    alone.
    Each drawn set is divided by its own standard error (bootstrap-t; Efron and Tibshirani 1993, chapter 12):
    sizes of documents have long tails, and percentiles, BCa too, are then too narrow. With few documents
    bootstrap-t is too narrow as well, so it is made wider: see :func:`_widening`. The same sums give the same
    bounds.

    Args:
        sums: float64 (documents, passes, 2): Σ nll and targets of each document in each pass.
        differences: By name a pass, and the pass that is taken away from it, or None.

    Returns:
        The lower and upper bound by name; None where fewer than eight documents have targets.

    Example:
        >>> sums = np.array([[[nll, 4.0], [nll + 2, 4.0]] for nll in (4.0, 6.0, 8.0, 6.0) * 2])
        >>> found = loss_intervals(sums, {"loss": (0, None), "worse": (1, 0)})
        >>> found["worse"]
        (0.5, 0.5)
        >>> found["loss"][0] < 1.5 < found["loss"][1]
        True
    """
    sums = np.asarray(sums, dtype=np.float64)
    sums = sums[(sums[:, :, 1] > 0).any(axis=1)]
    if len(sums) < FEWEST:
        return dict.fromkeys(differences)
    columns = {name: _columns(sums, one, other) for name, (one, other) in differences.items()}
    joined = np.concatenate([_with_products(one) for one in columns.values()], axis=1)
    drawn = _drawn_sums(joined)
    found: dict[str, Interval | None] = {}
    start = 0
    for name, own in columns.items():
        stop = start + own.shape[1] * (1 + own.shape[1])
        whole = joined[:, start:stop].sum(axis=0, keepdims=True)
        found[name] = _bounds(whole, drawn[:, start:stop], _widening(own[:, 1]))
        start = stop
    return found


def _columns(sums: np.ndarray, one: int, other: int | None) -> np.ndarray:
    """What a number is made of, by document: Σ nll and targets, (N, 2), or those of two passes, (N, 4)."""
    if other is None:
        return sums[:, one]
    if np.array_equal(sums[:, one, 1], sums[:, other, 1]):
        # One ratio, and exact however near the two losses are.
        return np.column_stack([sums[:, one, 0] - sums[:, other, 0], sums[:, one, 1]])
    return np.concatenate([sums[:, one], sums[:, other]], axis=1)


def _with_products(columns: np.ndarray) -> np.ndarray:
    """Columns (N, C), then the products of each two of them: (N, C + C²)."""
    products = columns[:, :, None] * columns[:, None, :]
    return np.concatenate([columns, products.reshape(len(columns), -1)], axis=1)


def _drawn_sums(columns: np.ndarray) -> np.ndarray:
    """The sums of sets of as many documents, drawn with replacement: float64 (RESAMPLES, columns)."""
    rng = np.random.default_rng(_SEED)
    count = len(columns)
    rows = max(1, _CHUNK // count)
    parts = []
    for start in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - start)
        picked = rng.integers(0, count, (size, count)) + count * np.arange(size)[:, None]
        often = np.bincount(picked.ravel(), minlength=size * count).reshape(size, count)
        parts.append(often @ columns)
    return np.concatenate(parts)


def _estimate(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ratio, or the difference of two, and its standard error, from sums (N, C + C²).

    A document adds (nll − ratio · targets) / Σ targets to the error of a ratio: the delta method.
    """
    count = 2 if sums.shape[1] == 6 else 4
    values = np.zeros(len(sums))
    weights = np.empty((len(sums), count))
    for start, sign in zip(range(0, count, 2), (1.0, -1.0), strict=False):
        nll, targets = sums[:, start], sums[:, start + 1]
        ratio = nll / targets
        values += sign * ratio
        weights[:, start], weights[:, start + 1] = sign / targets, -sign * ratio / targets
    products = sums[:, count:].reshape(-1, count, count)
    squares = np.einsum("ni,nij,nj->n", weights, products, weights)
    return values, np.sqrt(np.maximum(squares, 0))


def _widening(targets: np.ndarray) -> float:
    """How much wider than normal Student's interval is, for documents with so many targets.

    Few documents show less of how much documents differ than there is. So do many documents of which a few
    hold most targets: they say no more than a smaller number of equally long ones (Kish's effective number,
    1965). The degrees of freedom are the mean of both numbers, less one. On sets whose truth is known, the
    number of documents alone makes intervals too narrow, and the effective number alone too wide.

    Example:
        >>> [round(_widening(np.array(one)), 3) for one in ([9] * 8, [9] * 7 + [900], [9] * 1000)]
        [1.206, 1.485, 1.001]
    """
    alike = float(targets.sum() ** 2 / max((targets**2).sum(), 1.0))
    freedom = (len(targets) + alike) / 2 - 1
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    # The quantile as a series in 1 / freedom (Abramowitz and Stegun 26.7.5): right to 0.2% from 3 up.
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return 1 + sum(term / freedom**power for power, term in enumerate(terms, 1)) / z


def _bounds(whole: np.ndarray, drawn: np.ndarray, widening: float) -> Interval:
    """The interval of one number, from the sums of all documents and of each drawn set."""
    with np.errstate(divide="ignore", invalid="ignore"):
        values, errors = _estimate(drawn)
        (estimate,), (error,) = _estimate(whole)
        # All alike but for rounding, as of a model against itself: a point.
        known = values[np.isfinite(values)]
        if not len(known) or np.ptp(known) <= 1e-12 * max(1.0, abs(estimate)):
            return float(estimate), float(estimate)
        scaled = (values - estimate) / errors
    # Not of a set in which all documents are alike: it does not show how far off it is.
    scaled = scaled[np.isfinite(scaled) & (errors > 1e-6 * error)]
    if not len(scaled):
        return float(estimate), float(estimate)
    low, high = np.quantile(scaled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    error *= widening
    return float(estimate - high * error), float(estimate - low * error)
