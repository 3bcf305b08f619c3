"""What documents of text alone cost, many at once: arrays for each would take as long as reading it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

import numpy as np

from vlcpt.data.documents import Document, DocumentError, Text
from vlcpt.data.encoding import DocumentEncoder
from vlcpt.data.ledger import TokenCounts
from vlcpt.data.streams import TokenStream, closed_stream
from vlcpt.data.tokens import Run


class TextScan(NamedTuple):
    """What one document costs; it is one part, of its first ``stop`` tokens.

    Args:
        stop: Its tokens up to the last target.
        checksum: See :attr:`TokenStream.checksum`.
        counts: Its tokens, by what becomes of them.
    """

    stop: int
    checksum: int
    counts: TokenCounts


def scan_texts(
    encoder: DocumentEncoder, documents: Sequence[Document], max_length: int
) -> list[TextScan | TokenStream | DocumentError]:
    """Encode many documents that hold text and nothing else.

    Args:
        encoder: Gives the tokens.
        documents: What to encode, each with at least one text.
        max_length: Tokens of a sample.

    Returns:
        Of each document what it costs. Its tokens where there is more to say of it: without targets, longer
        than ``max_length``, or cut at the edge of a span; or what is wrong with it.

    Example:
        >>> from vlcpt import load_processor, parse_markup
        >>> from vlcpt.demo import base_path
        >>> texts = ["one <trainable_text>two</trainable_text>", "<trainable_text></trainable_text>three"]
        >>> found = scan_texts(DocumentEncoder(load_processor(base_path())), [*map(parse_markup, texts)], 64)
        >>> found[0].counts.targets, len(found[1])
        (2, 2)
    """
    texts = [[one for one in document.segments if isinstance(one, Text)] for document in documents]
    runs = encoder.runs.uncut(texts)
    closings = np.array([encoder.eos_weight(document) for document in documents], dtype=np.float32)
    ids = np.insert(runs.ids, runs.ends, encoder.eos).astype("<i4")
    weights = np.insert(runs.weights, runs.ends, closings).astype("<f4")
    ends = runs.ends + np.arange(1, len(documents) + 1)
    starts = np.append(0, ends[:-1])
    without_context = (weights[starts] > 0).astype(np.int64)
    weights[starts] = 0
    is_target = weights > 0
    targets = np.add.reduceat(is_target.astype(np.int64), starts)
    places = np.where(is_target, np.arange(1, len(weights) + 1), 0)
    stops = np.maximum.reduceat(places, starts) - starts
    counts = np.stack([ends - starts, targets, stops, without_context, starts, ends], axis=1)
    of_ids, of_weights = ids.data.cast("B"), weights.data.cast("B")
    found: list[TextScan | TokenStream | DocumentError] = []
    for number, (read, trained, stop, lost, start, end) in enumerate(counts.tolist()):
        if not (runs.is_uncut[number] and trained and stop <= max_length):
            of_text = slice(start - number, end - number - 1)
            run = Run(runs.ids[of_text], runs.weights[of_text], 0)
            if not runs.is_uncut[number]:
                try:
                    run = encoder.runs.cut(texts[number])
                except DocumentError as error:
                    found.append(error.at(documents[number].source))
                    continue
            closing = float(closings[number])
            found.append(
                closed_stream([run.ids], [run.weights], encoder.eos, closing, cut_edges=run.cut_edges)
            )
            continue
        of_both = crc32(of_weights[4 * start : 4 * end], crc32(of_ids[4 * start : 4 * end])) & 0x7FFFFFFF
        tokens = TokenCounts(
            read=read,
            targets=trained,
            context=stop - trained,
            media=0,
            special=0,
            trimmed=read - stop,
            targets_without_context=lost,
            repeated=0,
        )
        found.append(TextScan(stop, of_both, tokens))
    return found
