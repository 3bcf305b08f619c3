"""Whether a document that was encoded before could have been encoded here: a stranger may have written it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vlcpt.data.documents import DocumentError
from vlcpt.data.streams import EncodedDocument


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
