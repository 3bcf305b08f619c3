"""Rows of ``{"images": [ref or null], "texts": [null or str]}``: OBELICS, web pages in reading order."""

from __future__ import annotations

from vlcpt.data.documents import Document, DocumentError, Image, Segment, Text
from vlcpt.data.readers.fields import Row, list_field, required_list
from vlcpt.data.readers.urls import LocalFiles

_PARAGRAPH = "\n\n"  # as OBELICS writes it inside a text


def read_obelics(row: Row) -> Document:
    """A document of all texts, trained, and images in their order.

    A URL stands for a file in ``media_root``: the one that ``image_files`` (a list beside ``images``)
    names, or the one called as the URL's last part.

    Example:
        >>> row = {"images": [None, "http://example.org/p/a.png"], "texts": ["One.", None]}
        >>> read_obelics(row).segments[1].path
        'a.png'
    """
    texts = required_list(row, "texts", "texts and nulls")
    images = list_field(row, "images")
    names = list_field(row, "image_files", "file names and nulls") or [None] * len(images)
    for field, values in (("images", images), ("image_files", names)):
        if len(values) != len(texts):
            raise DocumentError(
                f"has {len(values)} entries but 'texts' has {len(texts)}. Both lists need one a position, "
                "null in one of them.",
                kind="row",
                field=field,
            )
    files = LocalFiles("image_files")
    segments: list[Segment] = []
    for number, (image, text, name) in enumerate(zip(images, texts, names, strict=True)):
        if (image is None) == (text is None):
            found = "both are null" if text is None else "both are set"
            raise DocumentError(
                f"expected 'images' or 'texts' at this position; {found}.",
                kind="row",
                field=f"texts[{number}]",
            )
        if image is not None:
            segments.append(files.image(image, name, f"images[{number}]"))
        elif not isinstance(text, str):
            raise DocumentError(
                f"expected a string or null, found {type(text).__name__}.",
                kind="row",
                field=f"texts[{number}]",
            )
        else:
            follows_text = segments and not isinstance(segments[-1], Image)
            segments.append(Text(_PARAGRAPH + text if follows_text else text, trainable=True))
    return Document(tuple(segments))
