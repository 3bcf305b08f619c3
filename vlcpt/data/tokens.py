"""Spans of characters become targets: one run of text, tokenised as it would be at inference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from vlcpt.data.documents import Text


class Run(NamedTuple):
    """A run of text as tokens.

    Args:
        ids: int64 (T,).
        weights: float32 (T,): the loss weight of a target, 0 for context.
        cut_edges: Span edges that fell inside a token and cut the text.
    """

    ids: np.ndarray
    weights: np.ndarray
    cut_edges: int


class RunTokenizer:
    """Tokenises text in which no control token exists, and finds the targets of its spans.

    The tokenizer's own added tokens are left out, so that ``<|image_pad|>`` or ``<tool_call>`` in
    a user's text are characters. ``split_special_tokens=True`` would keep those that are added but
    not special as single ids (transformers 5.23).

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["added_tokens"] = []
        state["truncation"] = state["padding"] = None
        self._plain = Tokenizer.from_str(json.dumps(state))

    def tokenize(self, texts: Sequence[Text]) -> Run:
        """Tokens and weights of neighbouring texts.

        Where the edge of a span falls inside a token, the token stays whole if its part outside is
        white space, and the text is cut there otherwise, from left to right, tokenising again after
        each cut. So every character of a span but white space is trained, and none outside.

        Args:
            texts: A run of texts between two media.
        """
        if len(texts) == 1:
            ids = np.array(self._encode(texts[0].text).ids, dtype=np.int64)
            weight = texts[0].weight if texts[0].trainable else 0.0
            return Run(ids, np.full(len(ids), weight, dtype=np.float32), 0)
        text = "".join(part.text for part in texts)
        # The loss weight of each character; 0 outside the spans.
        weights = np.concatenate(
            [np.full(len(part.text), part.weight if part.trainable else 0.0) for part in texts]
        )
        inside = weights > 0
        edges = (np.flatnonzero(inside[1:] != inside[:-1]) + 1).tolist()
        ids: list[int] = []
        token_weights: list[float] = []
        cuts = 0
        pieces = [(0, len(text))]  # a stack: the leftmost piece on top
        while pieces:
            start, stop = pieces.pop()
            encoding = self._encode(text[start:stop])
            spans = [(start + first, start + max(last, first + 1)) for first, last in encoding.offsets]
            cut = _first_cut(text, spans, edges, inside, stop)
            if cut is None:
                ids += encoding.ids
                token_weights += _token_weights(text, spans, weights)
            else:
                cuts += 1
                pieces += [(cut, stop), (start, cut)]
        return Run(np.array(ids, dtype=np.int64), np.array(token_weights, dtype=np.float32), cuts)

    def _encode(self, text: str) -> Encoding:
        return self._plain.encode(text, add_special_tokens=False)


def _first_cut(
    text: str, spans: list[tuple[int, int]], edges: list[int], inside: np.ndarray, stop: int
) -> int | None:
    """The first edge inside a token whose part outside the span holds more than white space."""
    where = 0
    for first, last in spans:
        while where < len(edges) and edges[where] <= first:
            where += 1
        while where < len(edges) and edges[where] < last:
            edge = edges[where]
            before = edges[where - 1] if where and edges[where - 1] > first else first
            after = edges[where + 1] if where + 1 < len(edges) and edges[where + 1] < last else last
            outside = text[edge:after] if inside[edge - 1] else text[before:edge]
            if not outside.isspace():
                return edge
            where += 1
        # Byte pieces of one character share its offsets: the next token may start before `last`.
        while where and edges[where - 1] > first:
            where -= 1
    return None


def _token_weights(text: str, spans: list[tuple[int, int]], weights: np.ndarray) -> list[float]:
    """The weight of each token: that of its first trained character, white space last."""
    total = np.concatenate([[0.0], np.cumsum(weights)])
    found: list[float] = []
    for first, last in spans:
        if total[last] == total[first]:
            found.append(0.0)
            continue
        trained = [place for place in range(first, last) if weights[place] > 0]
        solid = [place for place in trained if not text[place].isspace()]
        found.append(float(weights[(solid or trained)[0]]))
    return found
