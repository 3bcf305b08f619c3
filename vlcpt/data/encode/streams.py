"""A document's tokens, also of one that was encoded before, and what planning needs of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np

from vlcpt.data.documents import Document
from vlcpt.data.encode.vision import PlacedMedium

IGNORE_INDEX = -100
# What planning needs of a document. `length` ends with the last target; `pads` and `media` lie before it.
NUMBERS = np.dtype([(name, "<i4") for name in (
    "tokens", "length", "targets", "pads", "media", "images", "videos", "without_context", "cut_edges",
    "untagged", "empty_spans", "checksum",
)])  # fmt: skip


@dataclass(frozen=True, eq=False)
class TokenStream:
    """A complete document as tokens, before any pixel is decoded.

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
        """Of tokens, loss weights and media, 31 bits: tells a text from another one of as many tokens."""
        ids = np.ascontiguousarray(self.input_ids, dtype="<i4").data
        of_both = crc32(np.ascontiguousarray(self.loss_weights, dtype="<f4").data, crc32(ids))
        # The pixels themselves are not read: what decides their places is.
        media = np.array([(*placed.grid_thw, placed.interval) for placed in self.media], dtype="<f8")
        return crc32(media.tobytes(), of_both) & 0x7FFFFFFF


def closed_stream(
    ids: Sequence[np.ndarray],
    weights: Sequence[np.ndarray],
    eos: int,
    eos_weight: float,
    *,
    media: Sequence[PlacedMedium] = (),
    cut_edges: int = 0,
) -> TokenStream:
    """A document's tokens from those of its segments: closed, the first no target.

    Args:
        ids, weights: Tokens and loss weights, segment after segment.
        eos, eos_weight: The end of text.
        media, cut_edges: See :class:`TokenStream`.

    Example:
        >>> closed_stream([np.array([5, 6])], [np.array([1.0, 1.0])], 2, 0.0).labels.tolist()
        [-100, 6, -100]
    """
    input_ids = np.concatenate([*ids, [eos]], dtype=np.int64)
    loss_weights = np.concatenate([*weights, [eos_weight]], dtype=np.float32, casting="same_kind")
    without_context = int(loss_weights[0] > 0)
    loss_weights[0] = 0
    return TokenStream(
        input_ids=input_ids,
        labels=np.where(loss_weights > 0, input_ids, IGNORE_INDEX),
        loss_weights=loss_weights,
        media=tuple(media),
        without_context=without_context,
        cut_edges=cut_edges,
    )


def numbers_of(document: Document, stream: TokenStream) -> np.void:
    """What planning needs of a document: a scalar of ``NUMBERS``.

    Example:
        >>> stream = closed_stream([np.array([5, 6])], [np.array([1.0, 1.0])], 2, 0.0)
        >>> found = numbers_of(Document(()), stream)
        >>> found[["tokens", "length", "targets"]].item()
        (3, 2, 1)
    """
    targets = np.flatnonzero(stream.labels >= 0)
    length = int(targets[-1]) + 1 if len(targets) else 0
    kept = [placed.tokens for placed in stream.media if placed.stop <= length]
    numbers = np.zeros(1, NUMBERS)
    numbers[0] = (
        *(len(stream), length, len(targets), sum(kept), len(kept), len(document.images)),
        *(len(document.videos), stream.without_context, stream.cut_edges, not document.tagged),
        *(document.empty_spans, stream.checksum),
    )
    return numbers[0]


@dataclass(frozen=True)
class EncodedDocument(Document):
    """A document of a prepared data set: its media with their bytes, and its tokens in place of its text.

    Args:
        stream: Its tokens; the encoder places its media among them, as it does for any document.
        numbers: What planning was given of it: a scalar of ``NUMBERS``.
        folder: Of the prepared source, for messages.

    Example:
        >>> ids = np.array([5, 6])
        >>> stream = TokenStream(ids, np.array([-100, 6]), np.array([0.0, 1.0], np.float32), (), 0, 0)
        >>> len(EncodedDocument((), stream=stream, numbers=numbers_of(Document(()), stream)).stream)
        2
    """

    stream: TokenStream = field(kw_only=True, compare=False, repr=False)
    numbers: np.void = field(kw_only=True, compare=False, repr=False)
    folder: str = field(default="", kw_only=True, compare=False, repr=False)
