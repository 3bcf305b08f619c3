"""Rows of ``{"image", "caption"}`` or ``{"image", "text"}``: an image or a video, and what it shows."""

from __future__ import annotations

from vlcpt.data.documents import Document, DocumentError, Segment, Text
from vlcpt.data.readers.fields import Row, field_names, is_given, text_field
from vlcpt.data.readers.markers import MEDIA_FIELDS, place_media, refuse_unread, split_markers


def read_caption(row: Row) -> Document:
    """A document of the media and the caption, which is trained.

    The media come first, unless ``<image>`` or ``<video>`` in the caption says where.

    Example:
        >>> read_caption({"image": "cat.png", "caption": "A cat."}).to_markup()
        '<image><trainable_text>A cat.</trainable_text>'
    """
    refuse_unread(row)
    field = "caption" if row.get("caption") is not None or "text" not in row else "text"
    text = text_field(row, field)
    if not any(is_given(row.get(name)) for name in MEDIA_FIELDS):
        raise DocumentError(
            f"expected an image or a video. Fields found: {field_names(row)}.", kind="row", field="image"
        )
    (pieces,) = place_media([split_markers(text)], row, field, missing_first=0)
    segments: list[Segment] = [
        Text(piece, trainable=True) if isinstance(piece, str) else piece for piece in pieces
    ]
    return Document(tuple(segments), empty_spans=int(not text))
