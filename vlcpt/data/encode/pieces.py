"""A document as it is shown: pieces of text, each of one treatment, with the places of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from vlcpt.data.encode.encoder import TokenStream
from vlcpt.data.plan.split import Part

Kind = Literal["text", "control", "medium", "part", "cut"]
NEEDS_IMAGE = 0.1  # nats that its image must give a target, for it to count as one that needs the picture


class Piece(NamedTuple):
    """A part of a document that is treated in one way, or a mark between two.

    Args:
        kind: ``text``; ``control``: a token that no user wrote; ``medium``; or a mark: ``part``, where a part
            begins, and ``cut``, where a span's edge fell inside a token.
        text: What stands there; empty for media and marks.
        weight: The loss weight of its targets; 0 for context.
        is_trimmed: Whether it is dropped: it follows the last target of its part.
        lengths: Characters of each token, or of the fewest that hold a whole character.
        start: Its first token.
        stop: One past its last.
        medium: The number of a medium in its document.
    """

    kind: Kind
    text: str = ""
    weight: float = 0.0
    is_trimmed: bool = False
    lengths: Sequence[int] = ()
    start: int = 0
    stop: int = 0
    medium: int = -1


def _letters() -> dict[str, int]:
    """Which byte each letter of a byte-level vocabulary stands for."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


@dataclass(frozen=True, eq=False)
class TokenTexts:
    """What each token of a vocabulary writes.

    The tokenizer's own ``decode`` takes 30 µs a token; a page of 10,000 documents has millions of them.

    Args:
        written: The bytes of each token.
        is_control: bool (V,): whether the tokenizer added it to its vocabulary.
        begins: bool (V,): whether it begins with a character, and not with the rest of one.
        characters: int64 (V,): the characters that begin in it.
    """

    written: Sequence[bytes]
    is_control: np.ndarray
    begins: np.ndarray
    characters: np.ndarray

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> TokenTexts:
        """Those of a tokenizer."""
        vocabulary, added, letters = tokenizer.get_vocab(), tokenizer.get_added_vocab(), _letters()
        written = [b""] * (max(vocabulary.values()) + 1)
        is_control = np.zeros(len(written), dtype=bool)
        for token, number in vocabulary.items():
            if token in added or not letters.keys() >= set(token):
                written[number], is_control[number] = token.encode(errors="replace"), token in added
            else:
                written[number] = bytes(map(letters.__getitem__, token))
        return cls(
            written,
            is_control,
            np.array([not one or one[0] & 0xC0 != 0x80 for one in written]),
            np.array([sum(byte & 0xC0 != 0x80 for byte in one) for one in written], dtype=np.int64),
        )

    def text(self, ids: np.ndarray) -> str:
        """What tokens write together."""
        return b"".join(map(self.written.__getitem__, ids.tolist())).decode(errors="replace")


@lru_cache(maxsize=2)
def token_texts(tokenizer: PreTrainedTokenizerFast) -> TokenTexts:
    """What each token of a tokenizer writes, made once."""
    return TokenTexts.of(tokenizer)


def pieces_of(stream: TokenStream, parts: Sequence[Part], texts: TokenTexts) -> list[Piece]:
    """A document in reading order.

    Args:
        stream: Its tokens.
        parts: The parts that are trained; none where the document cannot be used.
        texts: What the tokens write.

    Example:
        >>> from vlcpt import load_processor, parse_markup
        >>> from vlcpt.data.encode.encoder import DocumentEncoder
        >>> from vlcpt.data.plan.split import split_stream
        >>> from vlcpt.demo import base_path
        >>> processor = load_processor(base_path())
        >>> document = parse_markup("the <trainable_text>valve</trainable_text>")
        >>> stream = DocumentEncoder(processor).tokens(document)
        >>> found = pieces_of(stream, split_stream(stream, 64), token_texts(processor.tokenizer))
        >>> [(one.kind, one.text, one.weight) for one in found]
        [('text', 'the ', 0.0), ('text', 'valve', 1.0), ('control', '<|endoftext|>', 1.0)]
    """
    ids, length = stream.input_ids, len(stream)
    is_kept = np.zeros(length, dtype=bool)
    for part in parts:
        is_kept[part.start + part.repeated : part.stop] = True
    begins, is_control = texts.begins[ids], texts.is_control[ids]
    media = {placed.start: number for number, placed in enumerate(stream.media)}
    inside = np.full(length, -1)
    for number, placed in enumerate(stream.media):
        inside[placed.start : placed.stop] = number
    # A character may be cut by the place where a part ends: it is shown whole, where it begins.
    begins |= (inside >= 0) | is_control
    begins[:1] = True
    owner = np.maximum.accumulate(np.where(begins, np.arange(length), 0))
    changes = np.zeros(length, dtype=bool)
    for column in (is_kept[owner], stream.loss_weights[owner], inside):
        changes[1:] |= column[1:] != column[:-1]
    changes |= is_control & (inside < 0)
    changes[1:] |= is_control[:-1] & (inside[:-1] < 0)
    marks = _marks(stream, parts, owner)
    changes[[place for place in marks if 0 < place < length]] = True
    places = np.flatnonzero(changes | (np.arange(length) == 0)).tolist()
    found: list[Piece] = []
    for start, stop in pairwise([*places, length]):
        found += marks.get(start, ())
        trimmed = not bool(is_kept[start])
        if start in media:
            number = media[start]
            found.append(Piece("medium", is_trimmed=trimmed, start=start, stop=stop, medium=number))
            continue
        kind: Kind = "control" if is_control[start] else "text"
        text, weight = texts.text(ids[start:stop]), float(stream.loss_weights[start])
        lengths = _lengths(texts.characters[ids[start:stop]], begins[start:stop])
        found.append(Piece(kind, text, weight, trimmed, lengths, start, stop))
    return found


def _lengths(characters: np.ndarray, begins: np.ndarray) -> list[int]:
    starts = np.flatnonzero(begins)
    if not len(starts):
        return [int(characters.sum())]
    starts[0] = 0
    return np.add.reduceat(characters, starts).tolist()


def _marks(stream: TokenStream, parts: Sequence[Part], owner: np.ndarray) -> dict[int, list[Piece]]:
    """The marks before tokens."""
    found: dict[int, list[Piece]] = {}
    for place in stream.cuts:
        found.setdefault(place, []).append(Piece("cut", start=place, stop=place))
    if len(parts) > 1:
        for number, part in enumerate(parts):
            place = int(owner[part.start + part.repeated])
            found.setdefault(place, []).insert(
                0, Piece("part", start=part.start, stop=part.stop, medium=number)
            )
    return found


def shown_sums(piece: Piece, values: np.ndarray, stream: TokenStream, texts: TokenTexts) -> list[float]:
    """The sum of a number of each token over each of the piece's ``lengths``.

    Args:
        values: float (T,), of the whole document.
    """
    starts = np.flatnonzero(texts.begins[stream.input_ids[piece.start : piece.stop]])
    if not len(starts):
        return [float(values[piece.start : piece.stop].sum())]
    starts[0] = 0
    return np.add.reduceat(values[piece.start : piece.stop], starts).tolist()
