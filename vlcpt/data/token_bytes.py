"""Which tokens a span holds, from the bytes of each token: their offsets take longer to get."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

from vlcpt.data.documents import Text


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
    edges = [*accumulate((_bytes(part.text) for part in texts), initial=0)]
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


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _belongs_before(before: Text, start: int, after: Text, stop: int) -> bool | None:
    """Whether a token over the edge between two texts belongs to the first; None where it is cut, or may be.

    Args:
        start, stop: Its bytes, counted from the edge.
    """
    left, right = _last_bytes(before.text, -start), _first_bytes(after.text, stop)
    if left is None or right is None:
        return None
    if before.trainable != after.trainable and not (left if after.trainable else right).isspace():
        return None
    return not after.trainable or (before.trainable and not (left.isspace() and not right.isspace()))


def _first_bytes(text: str, count: int) -> str | None:
    """Characters of so many bytes; None if the last one has more."""
    near = text[:count]
    if near.isascii():
        return near
    try:
        return near.encode()[:count].decode()
    except UnicodeDecodeError:
        return None


def _last_bytes(text: str, count: int) -> str | None:
    near = text[-count:]
    if near.isascii():
        return near
    try:
        return near.encode()[-count:].decode()
    except UnicodeDecodeError:
        return None
