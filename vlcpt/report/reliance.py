"""Which targets need their image: the tokens of a document with their nats, and sums by source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from vlcpt.data.encode.encoder import TokenStream
from vlcpt.data.encode.pieces import NEEDS_IMAGE, TokenTexts, pieces_of, shown_sums
from vlcpt.data.plan.split import Part
from vlcpt.report.screen import Sheet


def token_nats(
    stream: TokenStream, parts: Sequence[Part], nats: np.ndarray, texts: TokenTexts
) -> list[tuple[str, float | None]]:
    """The text of a document: each target with what its image gives it, a run of context with None.

    Targets that write one character together are one. A medium is its name in brackets.

    Args:
        stream: Its tokens.
        parts: The parts that are trained.
        nats: float (T,), NaN where nothing was measured.
        texts: What the tokens write.

    Example:
        >>> from vlcpt import load_processor, parse_markup
        >>> from vlcpt.data.encode.encoder import DocumentEncoder
        >>> from vlcpt.data.encode.pieces import token_texts
        >>> from vlcpt.demo import base_path
        >>> processor = load_processor(base_path())
        >>> document = parse_markup("a valve <trainable_text>is red</trainable_text>")
        >>> stream = DocumentEncoder(processor).tokens(document)
        >>> nats = np.where(stream.labels < 0, np.nan, 0.5)
        >>> token_nats(stream, [Part(0, len(stream), False, 3)], nats, token_texts(processor.tokenizer))
        [('a valve', None), (' is', 0.5), (' red', 0.5), ('<|endoftext|>', 0.5)]
    """
    found: list[tuple[str, float | None]] = []
    measured = np.nan_to_num(nats)
    for piece in pieces_of(stream, parts, texts):
        if piece.kind == "medium":
            found.append((f"[{stream.media[piece.medium].medium}]", None))
        elif piece.kind in ("text", "control") and piece.weight == 0:
            found.append((piece.text, None))
        elif piece.kind in ("text", "control"):
            ends = np.cumsum(piece.lengths).tolist()
            written = [
                piece.text[stop - length : stop] for stop, length in zip(ends, piece.lengths, strict=True)
            ]
            values = shown_sums(piece, measured, stream, texts)
            found += [(text, round(one, 4) + 0.0) for text, one in zip(written, values, strict=True)]
    return _joined(found)


def _joined(found: Sequence[tuple[str, float | None]]) -> list[tuple[str, float | None]]:
    """Neighbours of context as one."""
    joined: list[tuple[str, float | None]] = []
    for is_context, run in groupby(found, key=lambda one: one[1] is None):
        own = [*run]
        joined += [("".join(text for text, _ in own), None)] if is_context else own
    return joined


@dataclass
class NatsSums:
    """What images give the targets of each source.

    Args:
        names: The sources.

    Example:
        >>> sums = NatsSums(["manuals"])
        >>> sums.add("manuals", np.array([np.nan, 3.0, 0.0, 0.05, 0.95]))
        >>> [cells for _, cells in sums.sheet().rows]
        [['4'], ['4.0'], ['1.000'], ['50%']]
    """

    names: Sequence[str]
    _sums: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sums = {name: np.zeros(3) for name in self.names}

    def add(self, name: str, nats: np.ndarray) -> None:
        """Add a document of a source: float (T,), NaN where nothing was measured."""
        own = nats[~np.isnan(nats)]
        self._sums[name] += [len(own), own.sum(), (own > NEEDS_IMAGE).sum()]

    def sheet(self) -> Sheet:
        """A column for each source: targets, what images give them in all and each, how many need them."""
        found = [self._sums[name].tolist() for name in self.names]
        rows = [
            ("targets", [f"{targets:,.0f}" for targets, _, _ in found]),
            ("nats from images", [f"{nats:,.1f}" for _, nats, _ in found]),
            ("  per target", [f"{nats / targets:.3f}" if targets else "–" for targets, nats, _ in found]),
            (
                f"targets over {NEEDS_IMAGE}",
                [f"{over / targets:.0%}" if targets else "–" for targets, _, over in found],
            ),
        ]
        caption = "nats: how much more a blank image costs a target than its own"
        return Sheet("which targets need their image", [*self.names], rows, caption)
