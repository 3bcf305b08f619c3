"""A document's tokens, and a document that carries them because it was encoded before."""

from __future__ import annotations

from dataclasses import dataclass, field
from zlib import crc32

import numpy as np

from vlcpt.data.documents import Document
from vlcpt.data.vision import PlacedMedium


@dataclass(frozen=True, eq=False)
class TokenStream:
    """A whole document as tokens, before any pixel is decoded.

    Args:
        input_ids: int64 (T,).
        labels: int64 (T,): the id of a target, -100 elsewhere; ``labels[0]`` is -100.
        loss_weights: float32 (T,): 0 where there is no target.
        media: Each medium with its place, in order.
        without_context: Targets lost because nothing precedes them: 0 or 1.
        cut_edges: Span edges that cut a token.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    loss_weights: np.ndarray
    media: tuple[PlacedMedium, ...]
    without_context: int
    cut_edges: int

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def checksum(self) -> int:
        """Of tokens and loss weights, 31 bits: tells a text from another one of as many tokens."""
        ids = np.ascontiguousarray(self.input_ids, dtype="<i4").data
        return crc32(np.ascontiguousarray(self.loss_weights, dtype="<f4").data, crc32(ids)) & 0x7FFFFFFF


@dataclass(frozen=True)
class EncodedDocument(Document):
    """A document of a prepared data set: its media with their bytes, and its tokens in place of its text.

    Args:
        stream: Its tokens.
        folder: Of the prepared source, for messages.

    Example:
        >>> ids = np.array([5, 6])
        >>> stream = TokenStream(ids, np.array([-100, 6]), np.array([0.0, 1.0], np.float32), (), 0, 0)
        >>> len(EncodedDocument((), stream=stream).stream)
        2
    """

    stream: TokenStream = field(kw_only=True, compare=False, repr=False)
    folder: str = field(default="", kw_only=True, compare=False, repr=False)
