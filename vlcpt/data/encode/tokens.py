"""Spans of characters become targets: one run of text, tokenised as it would be at inference."""

from __future__ import annotations

import json
import os
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from vlcpt.data.documents import DocumentError, Text, TurnEdge

# Characters on each side of an edge that decide whether they compose over it: a letter and its marks.
_WINDOW = 32
_MOST_AGAIN = 4_000_000  # characters that are tokenised again because of cuts: some seconds
_OFF = ("false", "off", "no", "n", "f", "0")  # as tokenizers reads it
_SMALLEST = float(np.finfo(np.float32).tiny)


def token_sizes(vocabulary: Mapping[str, int]) -> list[int]:
    """The bytes of each token of a byte-level vocabulary, which writes one letter for each byte.

    Example:
        >>> token_sizes({"a": 1, "Ġthe": 0})
        [4, 1]
    """
    sizes = [0] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        sizes[number] = len(token)
    return sizes


def byte_sizes(state: Mapping[str, object]) -> list[int]:
    """The bytes of each token of a tokenizer; none where tokens are not made of bytes.

    Args:
        state: A tokenizer as ``tokenizer.json`` has it.

    Example:
        >>> byte_sizes({"pre_tokenizer": {"type": "ByteLevel"}, "model": {"vocab": {"a": 1, "Ġthe": 0}}})
        [4, 1]
    """
    model, steps = state.get("model"), state.get("pre_tokenizer")
    if not isinstance(model, Mapping) or not isinstance(steps, Mapping):
        return []
    if not any(step["type"] == "ByteLevel" for step in steps.get("pretokenizers", [steps])):
        return []
    vocab = model["vocab"]
    if not isinstance(vocab, Mapping):  # Unigram has a list of tokens and scores
        return []
    return token_sizes(vocab)


def part_ends(texts: Sequence[Text], ids: Sequence[int], sizes: Sequence[int]) -> list[int] | None:
    """How many tokens there are up to the end of each text.

    A token over an edge belongs to the span, if its part outside is white space, and of two spans to the
    first, if its part there is not.

    Args:
        texts: Neighbouring texts, more than one.
        ids: The tokens of all of them together.
        sizes: See :func:`byte_sizes`.

    Returns:
        A count for each text; None where an edge cuts a token, or may.

    Example:
        >>> part_ends([Text("a "), Text("the", trainable=True)], ids=[1, 0], sizes=[4, 1])
        [1, 2]
    """
    if not sizes:
        return None
    bounds = [*accumulate(map(sizes.__getitem__, ids), initial=0)]
    edges = [*accumulate((len(part.text.encode()) for part in texts), initial=0)]
    if bounds[-1] != edges[-1]:
        return None
    ends: list[int] = []
    for number in range(1, len(texts)):
        token = bisect_right(bounds, edges[number]) - 1  # begins at the edge, or goes over it
        if bounds[token] < edges[number]:
            first, last = bounds[token : token + 2]
            if first < edges[number - 1] or last > edges[number + 1]:
                return None  # more than one edge in it
            is_before = _belongs_before(
                texts[number - 1], first - edges[number], texts[number], last - edges[number]
            )
            if is_before is None:
                return None
            token += is_before
        ends.append(token)
    return [*ends, len(ids)]


def _belongs_before(before: Text, start: int, after: Text, stop: int) -> bool | None:
    """Whether a token over the edge between two texts belongs to the first; None where it is cut, or may be.

    Args:
        start, stop: Its bytes, counted from the edge.
    """
    try:
        left = before.text[start:].encode()[start:].decode()
        right = after.text[:stop].encode()[:stop].decode()
    except UnicodeDecodeError:  # inside a character
        return None
    if before.trainable != after.trainable and not (left if after.trainable else right).isspace():
        return None
    return not after.trainable or (before.trainable and not (left.isspace() and not right.isspace()))


class Run(NamedTuple):
    """A run of text as tokens.

    Args:
        ids: int64 (T,).
        weights: float32 (T,): the loss weight of a target, 0 for context.
        cuts: Where span edges fell inside a token and cut the text: the tokens that follow them.
    """

    ids: np.ndarray
    weights: np.ndarray
    cuts: tuple[int, ...] = ()

    @property
    def cut_edges(self) -> int:
        """How many span edges cut the text."""
        return len(self.cuts)


class _Tokens(NamedTuple):
    """Tokens of a piece of a run; ``first`` and ``last`` count characters of the run."""

    ids: np.ndarray
    first: np.ndarray  # of each token's characters
    last: np.ndarray  # one past them
    words: np.ndarray  # the tokenizer's pre-token, over whose end no token reaches

    def part(self, start: int, stop: int) -> _Tokens:
        """Tokens ``start:stop``."""
        return _Tokens(*(column[start:stop] for column in self))


# By everything that the tokenizer says of itself. Each data set has an encoder, and to make this of the
# 152 thousand tokens takes two seconds.
@lru_cache(maxsize=2)
def _without_added_tokens(tokenizer: str) -> tuple[Tokenizer, list[int]]:
    """A tokenizer that knows no added tokens and does not normalise, and :func:`byte_sizes` of its tokens."""
    state = json.loads(tokenizer)
    state["added_tokens"] = []
    state["truncation"] = state["padding"] = state["post_processor"] = None
    # Text is normalised before: the offsets of tokenizers 0.23 leave out what NFC composes, so that
    # the accent of "e" + U+0301 would belong to no token.
    state["normalizer"] = None
    return Tokenizer.from_str(json.dumps(state)), byte_sizes(state)


class RunTokenizer:
    """Tokenises text in which no control token exists, and finds the targets of its spans.

    The tokenizer's own added tokens are left out, so that ``<|image_pad|>`` or ``<tool_call>`` in
    a user's text are characters. ``split_special_tokens=True`` would keep those that are added but
    not special as single ids (transformers 5.23).

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._normalizer = tokenizer.backend_tokenizer.normalizer
        ascii_text = "".join(map(chr, range(128)))
        self._keeps_ascii = (
            self._normalizer is None or self._normalizer.normalize_str(ascii_text) == ascii_text
        )
        self._plain, self._sizes = _without_added_tokens(tokenizer.backend_tokenizer.to_str())
        # Where a call for many texts may use threads, tokenizers warns at every fork that comes after.
        self._is_fast = os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in _OFF

    def tokenize(self, texts: Sequence[Text]) -> Run:
        """Tokens and weights of neighbouring texts.

        Where the edge of a span falls inside a token, the token stays whole if its part outside is
        white space, and the text is cut there otherwise, from left to right, tokenising again after
        each cut. So every character of a span but white space is trained, and none outside.

        Args:
            texts: A run of texts between two media.

        Raises:
            DocumentError: If cuts fall inside words so long that it would take minutes.
        """
        whole = "".join([part.text for part in texts])
        text = self._normalized(whole)
        # The first keeps no offsets, and takes a fifth less time.
        (encoding,) = self._plain.encode_batch_fast([text]) if self._is_fast else [self._plain.encode(text)]
        ids = encoding.ids
        ends: list[int] | None = [len(ids)]
        if len(texts) > 1:  # one text alone has one weight, whatever it becomes
            ends = part_ends(texts, ids, self._sizes) if text == whole else None
        if ends is None:
            return self._cut(texts)
        weights = np.array([target_weight(part) for part in texts], dtype=np.float32)
        lengths = [stop - start for start, stop in pairwise([0, *ends])]
        return Run(np.array(ids, dtype=np.int64), np.repeat(weights, lengths))

    def _cut(self, texts: Sequence[Text]) -> Run:
        """Tokens and weights of texts where an edge cuts a token, or may."""
        text, weights = self._characters(texts)
        inside = weights > 0
        edges = (np.flatnonzero(inside[1:] != inside[:-1]) + 1).tolist()
        cuts = self._cuts_inside_characters(text, edges)
        again = 0
        pieces: list[_Tokens] = []
        # A stack: the leftmost piece on top.
        todo = [self._encode(text, start, stop) for start, stop in pairwise([0, *cuts, len(text)])][::-1]
        while todo:
            tokens = todo.pop()
            found = _first_cut(text, tokens, edges, inside)
            if found is None:
                pieces.append(tokens)
                continue
            token, edge = found
            # Only what the cut can change is tokenised again: a long document may need a thousand cuts.
            low, high = _changed_by_cut(text, tokens, token)
            start, stop = int(tokens.first[low]), int(tokens.last[high - 1])
            again += stop - start
            if again > max(_MOST_AGAIN, len(text)):
                raise DocumentError(
                    f"its spans cut a word of {stop - start:,} characters, after {len(cuts):,} other cuts. "
                    "Put the tags where words begin or end.",
                    kind="markup",
                    field="text",
                )
            cuts.append(edge)
            pieces.append(tokens.part(0, low))
            todo.append(tokens.part(high, len(tokens.ids)))
            todo += [self._encode(text, edge, stop), self._encode(text, start, edge)]
        ids, first, last = (np.concatenate([piece[column] for piece in pieces]) for column in range(3))
        places = np.searchsorted(first, np.sort(np.array(cuts, dtype=np.int64))).tolist()
        return Run(ids, _token_weights(text, weights, first, last), tuple(places))

    def _normalized(self, text: str) -> str:
        if self._normalizer is None or (self._keeps_ascii and text.isascii()):
            return text
        return str(self._normalizer.normalize_str(text))

    def _encode(self, text: str, start: int, stop: int) -> _Tokens:
        encoding = self._plain.encode(text[start:stop])
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) + start
        ids = np.array(encoding.ids, dtype=np.int64)
        return _Tokens(ids, offsets[:, 0], offsets[:, 1], np.array(encoding.word_ids, dtype=np.int64))

    def _characters(self, texts: Sequence[Text]) -> tuple[str, np.ndarray]:
        """The characters of a run, and the loss weight of each; 0 outside the spans."""
        wholes: list[str] = []
        weights: list[np.ndarray] = []
        for _, group in groupby(texts, key=lambda part: part.trainable):
            parts = list(group)
            texts_of_parts = [self._normalized(part.text) for part in parts]
            whole = self._normalized("".join(texts_of_parts))
            ends = np.cumsum([len(text) for text in texts_of_parts])
            if len(whole) != ends[-1]:  # a character that is composed over two spans is the first one's
                prefixes = ("".join(texts_of_parts[: count + 1]) for count in range(len(parts)))
                ends = np.maximum.accumulate([len(self._normalized(prefix)) for prefix in prefixes])
            of_parts = np.array([target_weight(part) for part in parts], dtype=np.float32)
            weights.append(np.repeat(of_parts, np.diff(ends, prepend=0)))
            wholes.append(whole)
        return "".join(wholes), np.concatenate(weights)

    def _cuts_inside_characters(self, text: str, edges: list[int]) -> list[int]:
        """Edges over which two characters would compose into one."""
        cuts: list[int] = []
        if self._normalized(text) == text:
            return cuts
        for edge, following in pairwise([*edges, len(text)]):
            start = max(cuts[-1] if cuts else 0, edge - _WINDOW)
            near = text[start : min(following, edge + _WINDOW)]
            if self._normalized(near) != near:
                cuts.append(edge)
        return cuts


def target_weight(part: Text | TurnEdge) -> float:
    """The loss weight of a part's tokens: 0 for context.

    A weight too small for float32 stays above 0: its tokens are still targets.

    Example:
        >>> target_weight(Text("a", trainable=True, weight=1e-50)) > 0
        True
    """
    return max(part.weight, _SMALLEST) if part.trainable else 0.0


def _first_cut(text: str, tokens: _Tokens, edges: list[int], inside: np.ndarray) -> tuple[int, int] | None:
    """The first edge, and its token, whose part outside the span holds more than white space."""
    if not len(tokens.ids):
        return None
    begin, end = bisect_right(edges, tokens.first[0]), bisect_left(edges, tokens.last[-1])
    for number in range(begin, end):
        edge = edges[number]
        # Byte pieces of one character share its offsets, so that more than one token may hold the edge.
        candidates = range(
            int(np.searchsorted(tokens.last, edge, "right")), int(np.searchsorted(tokens.first, edge))
        )
        for token in candidates:
            before = max(int(tokens.first[token]), edges[number - 1] if number else 0)
            after = min(int(tokens.last[token]), edges[number + 1] if number + 1 < len(edges) else len(text))
            outside = text[before:edge] if inside[edge] else text[edge:after]
            if not outside.isspace():
                return token, edge
    return None


def _changed_by_cut(text: str, tokens: _Tokens, token: int) -> tuple[int, int]:
    """The tokens from ``low`` up to ``high`` around ``token``: those that a cut in it may change.

    A pre-token that ends with a letter or digit where no letter follows ends there whatever stands
    to its left or right, in the pattern of Qwen2's tokenizer.
    """

    words = tokens.words

    def is_firm(number: int) -> bool:
        """Of the first token of a word: nothing inside a word is."""
        place = int(tokens.first[number])
        return text[place - 1].isalnum() and not text[place].isalpha()

    low, high = (int(np.searchsorted(words, words[token], side)) for side in ("left", "right"))
    while low and not is_firm(low):
        low = int(np.searchsorted(words, words[low - 1], "left"))
    while high < len(words) and not is_firm(high):
        high = int(np.searchsorted(words, words[high], "right"))
    return low, high


def _token_weights(text: str, weights: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The weight of each token: that of its first trained character, white space last."""
    trained = weights > 0
    solid = trained & ~np.fromiter(map(str.isspace, text), dtype=bool, count=len(text))
    found = np.zeros(len(first), dtype=np.float32)
    for wanted in (trained, solid):
        places = np.append(np.flatnonzero(wanted), len(text))
        nearest = places[np.searchsorted(places, first)]
        has_one = nearest < last
        found[has_one] = weights[nearest[has_one]]
    return found
