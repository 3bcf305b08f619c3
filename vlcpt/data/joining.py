"""The scans of a source's pieces, put together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from vlcpt.data.columns import Columns
from vlcpt.data.scanning import COLUMNS, PART_COLUMNS, BadRow, Scan


@dataclass
class SourceScan:
    """What reading a whole source gave; see :class:`Scan`.

    Args:
        documents: Those that can be trained on, in order: a line each, of ``COLUMNS``.
        parts: Theirs, in order, of ``PART_COLUMNS``.
        rows, marks, dropped_tokens, unused: As of a scan.
    """

    documents: Columns = field(default_factory=lambda: Columns(COLUMNS))
    parts: Columns = field(default_factory=lambda: Columns(PART_COLUMNS))
    rows: int = 0
    marks: Counter[str] = field(default_factory=Counter)
    dropped_tokens: Counter[str] = field(default_factory=Counter)
    unused: list[BadRow] = field(default_factory=list)


def joined(scans: Iterable[Scan]) -> SourceScan:
    """One scan from those of neighbouring pieces, each of which is let go as soon as it is in.

    Example:
        >>> import numpy as np
        >>> empty = Scan(np.zeros((0, len(COLUMNS))), np.zeros((0, len(PART_COLUMNS))), rows=3)
        >>> joined([empty, empty]).rows
        6
    """
    whole = SourceScan()
    for scan in scans:
        whole.documents.extend(dict(zip(COLUMNS, scan.documents.T, strict=True)))
        whole.parts.extend(dict(zip(PART_COLUMNS, scan.parts.T, strict=True)))
        whole.rows += scan.rows
        whole.marks += scan.marks
        whole.dropped_tokens += scan.dropped_tokens
        whole.unused += scan.unused
    return whole
