"""Plain text files: one file, one document, all of it trained."""

from __future__ import annotations

from vlcpt.data.documents import Document, Text
from vlcpt.data.readers.fields import Row, text_field


def read_text(row: Row) -> Document:
    """A document whose whole text is trained; nothing in it is markup.

    Example:
        >>> read_text({"text": "<image> is plain here"}).segments
        (Text(text='<image> is plain here', trainable=True, weight=1.0),)
    """
    return Document((Text(text_field(row, "text"), trainable=True),))
