"""A document that fails only when it is read for training."""

from __future__ import annotations

from dataclasses import dataclass

from vlcpt.data.ledger import Dropped


@dataclass(frozen=True)
class FailedSample:
    """A sample that could be planned, but not read: a medium that does not decode, or a changed file.

    Args:
        source, row: Numbers of its source and its row.
        dropped: Its line of ``dropped.jsonl``.
        message: The error whole.
        stops: Whether the run stops here, as ``on_bad_data`` says.
    """

    source: int
    row: int
    dropped: Dropped
    message: str
    stops: bool
