"""Rows of ``{"text", "images", "videos", "id"}`` with markup."""

from __future__ import annotations

import re
from dataclasses import replace

from vlcpt.data.documents import Document, DocumentError
from vlcpt.data.markup import Untagged, parse_markup
from vlcpt.data.readers.fields import Row, list_field, text_field
from vlcpt.data.readers.markers import MEDIA_FIELDS

PLAIN = " Where no text of the source is markup, as in web pages or code, set format: text."
# The tag in brackets of a Chinese keyboard, or as HTML and JSON escape it. Such characters are no markup, but
# where a row has them and no tag, its author may have taken them for tags, and all of the text is trained.
OTHER_BRACKETS = "tags in other brackets than < and >"
_DISGUISED = re.compile(
    r"(?:[＜〈《‹﹤]|&(?:lt|#60|#x3c);|\\u003c)\s?/?\s?trainable[\s_-]?text", re.IGNORECASE
)


def read_marked(row: Row, *, untagged: Untagged = "train") -> Document:
    """A document from a row with markup.

    Example:
        >>> read_marked({"text": "<image>a <trainable_text>b</trainable_text>", "images": ["a.png"]}).images
        (Image(path='a.png', min_pixels=None, max_pixels=None),)
    """
    try:
        text = text_field(row, "text")
        document = parse_markup(text, list_field(row, "images"), list_field(row, "videos"), untagged=untagged)
        if not document.tagged and "rainable" in text and _DISGUISED.search(text):
            return replace(document, not_read=(*document.not_read, OTHER_BRACKETS))
        return document
    except DocumentError as error:
        for name in ("image", "video"):
            if f"'{name}s' lists 0 files" in error.reason and name in row and f"{name}s" not in row:
                error.reason += f" The row has {name!r}: call it '{name}s'."
        if error.kind in ("markup", "markers") and not any(row.get(name) for name in MEDIA_FIELDS):
            error.reason += PLAIN
        raise
