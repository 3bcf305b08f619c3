"""``<trainable_text>`` markup read into segments. Writing is :meth:`Document.to_markup`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from vlcpt.data.documents import (
    MAX_WEIGHT,
    TAG_START,
    Document,
    DocumentError,
    Image,
    Medium,
    MissingFileError,
    Segment,
    Text,
    Video,
    trailing_backslashes,
)
from vlcpt.data.media.references import medium_at

Untagged = Literal["train", "mask", "error"]

_OPEN = re.compile(r'<trainable_text(?:[ \t\n]+weight="([^"<>]{0,40})")?[ \t\n]*>')
_CLOSE = re.compile(r"</trainable_text>")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+(?:[eE][+-]?[0-9]+)?")


def parse_markup(
    text: str,
    images: Sequence[object] = (),
    videos: Sequence[object] = (),
    *,
    untagged: Untagged = "train",
) -> Document:
    r"""Read markup into a document.

    From n backslashes directly before a tag ⌊n/2⌋ are kept, and an odd n makes the tag plain text. What is a
    tag but for case, spaces, hyphens, underscores or one letter is taken for a mistake.

    Args:
        text: The markup.
        images: One reference (path, ``data:`` URI, dict or :class:`Image`) for each image marker.
        videos: The same for videos.
        untagged: What becomes of text without any tag: all is trained, all is context, or it is an error.

    Returns:
        The document, without id and source.

    Raises:
        DocumentError: With the character offset of what is wrong, what was found and what to do.

    Example:
        >>> document = parse_markup("<image>Fig. 1 <trainable_text>A valve.</trainable_text>", ["a.png"])
        >>> [type(segment).__name__ for segment in document.segments]
        ['Image', 'Text', 'Text']
        >>> parse_markup("</trainable_text>")
        Traceback (most recent call last):
        ...
        vlcpt.data.documents.DocumentError: text, character 0: </trainable_text> closes nothing. Put <trainable_text> before it, or write \</trainable_text> for the characters.
    """  # noqa: E501
    segments: list[Segment | None] = []  # None: a marker, filled below
    markers: list[re.Match[str]] = []
    span: tuple[int, float] | None = None  # where the open span began, and its weight
    tagged, empty_spans, done, span_has_text = False, 0, 0, False
    for match in (*TAG_START.finditer(text), None):
        start = len(text) if match is None else match.start()
        slashes = 0 if match is None else trailing_backslashes(text, done, start)
        said = text[done : start - slashes] + "\\" * (slashes // 2)
        is_tag = match is not None and slashes % 2 == 0
        if match is not None:
            said += "" if is_tag else match.group()
            done = match.end()
        if said:
            span_has_text = True
            segments.append(Text(said) if span is None else Text(said, True, span[1]))
        if match is None or not is_tag:
            continue
        if match.group() in ("<trainable_text", "</trainable_text") or match["misspelt"]:
            opening, closing = _OPEN.match(text, start), _CLOSE.match(text, start)
            if opening:
                if span is not None:
                    raise _error(
                        f"<trainable_text> opens inside the span that opened at character {span[0]}. "
                        "Close that one first; spans do not nest.",
                        start,
                    )
                span, span_has_text, tagged = (start, _weight(opening[1], start)), False, True
                done = opening.end()
            elif closing:
                if span is None:
                    raise _error(
                        "</trainable_text> closes nothing. Put <trainable_text> before it, "
                        r"or write \</trainable_text> for the characters.",
                        start,
                    )
                empty_spans += not span_has_text
                span, done = None, closing.end()
            else:
                raise _malformed(text, start)
        else:
            segments.append(None)
            markers.append(match)
    if span is not None:
        raise _error("<trainable_text> is not closed. Add </trainable_text>.", span[0])
    media = iter(_media(markers, {Image: images, Video: videos}, len(text)))
    filled = [next(media) if segment is None else segment for segment in segments]
    if not tagged:
        filled = _treat_untagged(filled, untagged)
    return Document(tuple(filled), tagged=tagged, empty_spans=empty_spans)


_NEXT = ("<image>", "<video>")


def _media(
    markers: Sequence[re.Match[str]], files: Mapping[type[Image] | type[Video], Sequence[object]], end: int
) -> list[Medium]:
    """The file that each marker stands for; markers and files have to agree."""
    for kind, given in files.items():
        if isinstance(given, str | bytes):
            reason = f"expected a list of media references, found {type(given).__name__}."
            raise DocumentError(reason, kind="row", field=f"{kind.__name__.lower()}s")
    used: dict[type[Image] | type[Video], dict[int, int]] = {Image: {}, Video: {}}  # number: place
    order: list[tuple[type[Image] | type[Video], int]] = []
    for match in markers:
        marker, offset, first = match.group(), match.start(), markers[0]
        if (first.group() in _NEXT) != (marker in _NEXT):
            raise _error(
                f"{marker} follows {first.group()} at character {first.start()}: a document uses either "
                "<image>/<video> in order or <IMG1>/<VID2> by number, not both.",
                offset,
            )
        kind = Image if marker[1] in "iI" else Video
        listed = len(files[kind])
        number = len(used[kind]) + 1 if marker in _NEXT else int(marker[4:-1])
        if number in used[kind]:
            raise _error(f"{marker} is used twice. Each file is used exactly once.", offset)
        if marker not in _NEXT and not 1 <= number <= listed:
            raise _error(
                f"{marker} names file {number} but '{kind.__name__.lower()}s' lists {listed}. "
                "Numbers start at 1; add the file or correct the number.",
                offset,
                missing=not listed,
            )
        used[kind][number] = offset
        order.append((kind, number))
    for kind, places in used.items():
        name, listed = kind.__name__.lower(), len(files[kind])
        if len(places) != listed:
            raise _error(
                f"the text has {len(places)} <{name}> marker{'s' * (len(places) != 1)} but '{name}s' lists "
                f"{listed} file{'s' * (listed != 1)}. Give each marker one file, in reading order; "
                rf"write \<{name}> for the characters.",
                next((place for number, place in places.items() if number > listed), end),
                kind="markers",
                missing=not listed,
            )
    return [
        medium_at(kind, files[kind][number - 1], f"{kind.__name__.lower()}s[{number - 1}]")
        for kind, number in order
    ]


def _treat_untagged(segments: list[Segment], untagged: Untagged) -> list[Segment]:
    if untagged == "error":
        raise DocumentError(
            "no <trainable_text> anywhere. Mark what to train, or set untagged to 'train' or 'mask'.",
            kind="untagged",
            field="text",
        )
    if untagged == "mask":
        return segments
    return [Text(piece.text, True) if isinstance(piece, Text) else piece for piece in segments]


def _weight(value: str | None, offset: int) -> float:
    if value is None:
        return 1.0
    if not _NUMBER.fullmatch(value) or not 0 < float(value) <= MAX_WEIGHT:
        raise _error(f'weight="{value}" is not a number above 0, up to {MAX_WEIGHT:g}.', offset)
    return float(value)


def _malformed(text: str, offset: int) -> DocumentError:
    found = text[offset : offset + 40].split("\n")[0]
    return _error(
        f"{found!r} begins like a tag but is none. Tags are <trainable_text>, "
        '<trainable_text weight="0.5"> and </trainable_text>; put a backslash before it for the characters.',
        offset,
    )


def _error(reason: str, offset: int, *, kind: str = "markup", missing: bool = False) -> DocumentError:
    error = MissingFileError if missing else DocumentError
    return error(reason, kind=kind, field="text", offset=offset)
