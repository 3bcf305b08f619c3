"""Rows of ``{"text", "images", "videos", "id"}`` with markup."""

from __future__ import annotations

from vlcpt.data.documents import Document
from vlcpt.data.markup import Untagged, parse_markup
from vlcpt.data.readers.fields import Row, list_field, text_field


def read_row(row: Row, *, untagged: Untagged = "train") -> Document:
    """A document from a row with markup.

    Example:
        >>> read_row({"text": "<image>a <trainable_text>b</trainable_text>", "images": ["a.png"]}).images
        (Image(path='a.png', min_pixels=None, max_pixels=None),)
    """
    return parse_markup(
        text_field(row, "text"), list_field(row, "images"), list_field(row, "videos"), untagged=untagged
    )
