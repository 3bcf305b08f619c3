"""A document's tokens; also of one that was encoded before, if it could have been encoded here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np

from vlcpt.data.documents import Document, DocumentError
from vlcpt.data.encode.vision import PlacedMedium

IGNORE_INDEX = -100


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


def require_sound_tokens(
    document: EncodedDocument,
    *,
    vocabulary: int,
    edges: tuple[int, int],
    pads: Mapping[type, int],
    squares: Mapping[type, tuple[int, int]],
) -> None:
    """Raise for tokens that would fail only in the model, or train on a medium.

    Args:
        document: What is looked at.
        vocabulary: Tokens that the tokenizer has.
        edges: Ids of vision start and end.
        pads: Of each kind of medium, the id of its pad token.
        squares: Of each kind, its processor's ``merge_size`` and ``patch_size``.

    Raises:
        DocumentError: With the folder of the prepared source.
    """
    stream = document.stream
    ids, weights, inside = stream.input_ids, stream.loss_weights, 0
    if int(ids.max()) >= vocabulary:
        raise _error(document, f"token {int(ids.max())} is not among the tokenizer's {vocabulary:,}")
    if weights[0] > 0:
        raise _error(document, "its first token is a target")
    for placed in stream.media:
        kind = type(placed.medium)
        expected = np.full(placed.stop - placed.start, pads[kind])
        expected[0], expected[-1] = edges
        _, height, width = placed.grid_thw
        is_whole = (placed.merge, placed.patch) == squares[kind]
        is_whole &= not height % placed.merge and not width % placed.merge
        if not is_whole or not np.array_equal(ids[placed.start : placed.stop], expected):
            raise _error(document, f"the tokens of {placed.medium} are not those of its grid")
        if weights[placed.start : placed.stop].any():
            raise _error(document, f"{placed.medium} is a target")
        inside += len(expected)
    # Far quicker than np.isin, for the few hundred tokens of most documents.
    if sum(np.count_nonzero(ids == one) for one in (*edges, *pads.values())) != inside:
        raise _error(document, "a token of a medium stands outside of it")


def _error(document: EncodedDocument, reason: str) -> DocumentError:
    return DocumentError(
        f"it is not as vlcpt prepares it ({reason}). Copy it again, or run vlcpt prepare again.",
        kind="source",
        source=document.source,
        field=document.folder,
    )
