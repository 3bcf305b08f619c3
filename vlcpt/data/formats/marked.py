"""Formats that mark their targets themselves: text with markup, segments, and plain text files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from vlcpt.data.documents import Document, DocumentError, Image, Segment, Text, Video
from vlcpt.data.markup import Untagged, parse_markup
from vlcpt.data.media.references import HINTS, SIZES, medium_at
from vlcpt.data.rows.fields import Row, list_field, required_field, text_field

# The tag in brackets of a Chinese keyboard, or as HTML and JSON escape it. Such characters are no markup, but
# where a row has them and no tag, its author may have taken them for tags, and all of the text is trained.
OTHER_BRACKETS = "tags in other brackets than < and >, which are text"
_DISGUISED = re.compile(
    r"(?:[＜〈《‹﹤]|&(?:lt|#60|#x3c);|\\u003c)\s?/?\s?trainable[\s_-]?text", re.IGNORECASE
)


def read_marked(row: Row, *, untagged: Untagged = "train") -> Document:
    """A document from a row with markup.

    Example:
        >>> read_marked({"text": "<image>a <trainable_text>b</trainable_text>", "images": ["a.png"]}).images
        (Image(path='a.png', min_pixels=None, max_pixels=None),)
    """
    text = text_field(row, "text")
    document = parse_markup(text, list_field(row, "images"), list_field(row, "videos"), untagged=untagged)
    if not document.tagged and "rainable" in text and _DISGUISED.search(text):
        return replace(document, not_read=(*document.not_read, OTHER_BRACKETS))
    return document


def read_text(row: Row) -> Document:
    """A document with all its text trained; nothing in it is markup.

    Example:
        >>> read_text({"text": "<image> is plain here"}).segments
        (Text(text='<image> is plain here', trainable=True, weight=1.0),)
    """
    return Document((Text(text_field(row, "text"), trainable=True),))


_KEYS = {
    "text": ("type", "text", "trainable", "weight"),
    "image": ("type", "image", *SIZES[Image]),
    "video": ("type", "video", *SIZES[Video]),
}


def read_segments(row: Row) -> Document:
    """A document from a row of segments. Tags inside a text segment are plain characters.

    A row always says itself what it trains.

    Example:
        >>> read_segments({"segments": [{"type": "text", "text": "a", "trainable": True}]}).segments
        (Text(text='a', trainable=True, weight=1.0),)
    """
    required_field(row, "segments")
    segments: list[Segment] = []
    for number, entry in enumerate(list_field(row, "segments", "segments")):
        place = f"segments[{number}]"
        try:
            segments.append(_segment(entry, place))
        except DocumentError as error:
            raise error.at(None, place) from None
    empty_spans = sum(isinstance(one, Text) and one.trainable and not one.text for one in segments)
    return Document(tuple(segments), empty_spans=empty_spans)


def _segment(entry: object, place: str) -> Segment:
    if not isinstance(entry, Mapping):
        raise DocumentError(f"expected a segment with a 'type', found {type(entry).__name__}.")
    kind = entry.get("type")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise DocumentError(f"'type' must be 'text', 'image' or 'video'; found {kind!r:.60}.")
    # Null is how Arrow fills the keys that other segments of a row have.
    known = _KEYS[kind] if kind == "text" else (*_KEYS[kind], *HINTS)
    unknown = [key for key, value in entry.items() if key not in known and value is not None]
    if unknown:
        raise DocumentError(
            f"a segment of type {kind!r} has no key {unknown[0]!r:.60}. "
            f"Known: {', '.join(sorted(_KEYS[kind]))}."
        )
    if kind != "text":
        return medium_at(Image if kind == "image" else Video, entry.get(kind), place, entry)
    text, trainable, weight = entry.get("text"), entry.get("trainable"), entry.get("weight")
    if not isinstance(text, str):
        raise DocumentError(f"'text' must be a string; found {type(text).__name__}.")
    if not isinstance(trainable, bool):
        raise DocumentError(f"'trainable' must be true or false; found {trainable!r:.60}.")
    if weight is None:
        return Text(text, trainable)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or abs(weight) > 1e300:
        raise DocumentError(f"'weight' must be a number; found {weight!r:.60}.")
    return Text(text, trainable, float(weight))
