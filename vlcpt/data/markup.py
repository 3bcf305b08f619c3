"""``<trainable_text>`` markup read into segments. Writing is :meth:`Document.to_markup`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from vlcpt.data.documents import (
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

    Of n backslashes directly before a tag ⌊n/2⌋ are kept, and an odd n makes the tag plain text. What is a
    tag but for case, spaces, hyphens, underscores or one letter is taken for a mistake.

    Args:
        text: The markup.
        images: One reference (path, ``data:`` URI, dict or :class:`Image`) for each image marker.
        videos: The same for videos.
        untagged: What becomes of text without any tag: trained whole, context, or an error.

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
    segments: list[Segment] = []
    media = _Media(images, videos)
    span: tuple[int, float] | None = None  # where the open span began, and its weight
    tagged, empty_spans, done = False, 0, 0
    span_has_text = False

    def add(piece: str) -> None:
        nonlocal span_has_text
        if piece:
            span_has_text = True
            segments.append(Text(piece) if span is None else Text(piece, True, span[1]))

    for match in TAG_START.finditer(text):
        start = match.start()
        slashes = trailing_backslashes(text, done, start)
        add(text[done : start - slashes] + "\\" * (slashes // 2))
        if slashes % 2:
            add(match.group())
            done = match.end()
            continue
        found = match.group()
        if match["misspelt"]:
            raise _malformed(text, start)
        if found == "<trainable_text":
            tag = _whole(_OPEN, text, start)
            if span is not None:
                raise _error(
                    f"<trainable_text> opens inside the span that opened at character {span[0]}. "
                    "Close that one first; spans do not nest.",
                    start,
                )
            span, span_has_text, tagged = (start, _weight(tag.group(1), start)), False, True
            done = tag.end()
        elif found == "</trainable_text":
            tag = _whole(_CLOSE, text, start)
            if span is None:
                raise _error(
                    "</trainable_text> closes nothing. Put <trainable_text> before it, "
                    r"or write \</trainable_text> for the characters.",
                    start,
                )
            empty_spans += not span_has_text
            span, done = None, tag.end()
        else:
            segments.append(media.take(found, start))
            done = match.end()
    add(text[done:])
    if span is not None:
        raise _error("<trainable_text> is not closed. Add </trainable_text>.", span[0])
    media.finish(len(text))
    if not tagged:
        segments = _treat_untagged(segments, untagged)
    return Document(tuple(segments), tagged=tagged, empty_spans=empty_spans)


def _whole(tag: re.Pattern[str], text: str, start: int) -> re.Match[str]:
    """The tag that begins there."""
    found = tag.match(text, start)
    if found is None:
        raise _malformed(text, start)
    return found


class _Media:
    """Hands out the files of a row to its markers, and checks that they agree."""

    def __init__(self, images: Sequence[object], videos: Sequence[object]) -> None:
        self.files: dict[str, Sequence[object]] = {"images": images, "videos": videos}
        for field, files in self.files.items():
            if isinstance(files, str | bytes):
                reason = f"expected a list of media references, found {type(files).__name__}."
                raise DocumentError(reason, kind="row", field=field)
        self.used: dict[str, set[int]] = {"images": set(), "videos": set()}
        self.first: tuple[str, int] | None = None  # the first marker: it decides the style
        self.surplus: dict[str, int] = {}  # where the first marker without a file stands

    def take(self, marker: str, offset: int) -> Medium:
        """The file that ``marker`` stands for."""
        if self.first is None:
            self.first = (marker, offset)
        elif (self.first[0] in ("<image>", "<video>")) != (marker in ("<image>", "<video>")):
            raise _error(
                f"{marker} follows {self.first[0]} at character {self.first[1]}: a document uses either "
                "<image>/<video> in order or <IMG1>/<VID2> by number, not both.",
                offset,
            )
        field = "images" if marker == "<image>" or marker.startswith("<IMG") else "videos"
        used, files = self.used[field], self.files[field]
        number = len(used) + 1 if marker in ("<image>", "<video>") else int(marker[4:-1])
        if number in used:
            raise _error(f"{marker} is used twice. Each file is used exactly once.", offset)
        used.add(number)
        if marker[1] in "IV" and not 1 <= number <= len(files):
            raise (DocumentError if files else MissingFileError)(
                f"{marker} names file {number} but {field!r} lists {len(files)}. "
                "Numbers start at 1; add the file or correct the number.",
                kind="markup",
                field="text",
                offset=offset,
            )
        kind = Image if field == "images" else Video
        if number > len(files):  # counted on: `finish` says both numbers
            self.surplus.setdefault(field, offset)
            return kind("missing")
        return medium_at(kind, files[number - 1], f"{field}[{number - 1}]")

    def finish(self, end: int) -> None:
        """Check that every file has its marker; one that has none is missed at the ``end`` of the text."""
        for field, marker in (("images", "<image>"), ("videos", "<video>")):
            markers, files = len(self.used[field]), len(self.files[field])
            if markers != files:
                raise (DocumentError if files else MissingFileError)(
                    f"the text has {markers} {marker} marker{'s' * (markers != 1)} but {field!r} lists "
                    f"{files} file{'s' * (files != 1)}. Give each marker one file, in reading order; "
                    rf"write \{marker} for the characters.",
                    kind="markers",
                    field="text",
                    offset=self.surplus.get(field, end),
                )


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
    if not _NUMBER.fullmatch(value) or not 0 < float(value) <= 100:
        raise _error(f'weight="{value}" is not a number above 0, up to 100.', offset)
    return float(value)


def _malformed(text: str, offset: int) -> DocumentError:
    found = text[offset : offset + 40].split("\n")[0]
    return _error(
        f"{found!r} begins like a tag but is none. Tags are <trainable_text>, "
        '<trainable_text weight="0.5"> and </trainable_text>; put a backslash before it for the characters.',
        offset,
    )


def _error(reason: str, offset: int) -> DocumentError:
    return DocumentError(reason, kind="markup", field="text", offset=offset)
