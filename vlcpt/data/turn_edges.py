"""The edges of a chat turn: the one thing in a document that is neither text nor medium."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TurnEdge:
    """Where a turn begins or ends, by the model's own marker.

    Readers make it, never a user's text; ``encoding.py`` puts its token in by id.

    Args:
        kind: Which edge.
        trainable: Whether its token is a target: the end of a turn that is trained.
        weight: Scales the loss of a target.

    Example:
        >>> TurnEdge("start").trainable
        False
    """

    kind: Literal["start", "end"]
    trainable: bool = False
    weight: float = 1.0
