"""Rows of ``{"text_list": [str], "image_info": [{"image_name", "raw_url", "matched_text_index"}]}``: MMC4."""

from __future__ import annotations

from collections.abc import Mapping

from vlcpt.data.documents import Document, DocumentError, Image, Segment, Text
from vlcpt.data.readers.fields import Row, list_field, required_list
from vlcpt.data.readers.urls import LocalFiles


def read_mmc4(row: Row) -> Document:
    """A document of all sentences, trained, each image before the sentence that it matches.

    Sentences are joined by a space that belongs to the sentence before. An image is the file
    ``image_name`` in ``media_root``, or, without one, that called as the last part of ``raw_url``.

    Example:
        >>> image = {"image_name": "b9.png", "raw_url": "http://example.org/a.png", "matched_text_index": 1}
        >>> read_mmc4({"text_list": ["One.", "Two."], "image_info": [image]}).to_markup()
        '<trainable_text>One. </trainable_text><image><trainable_text>Two.</trainable_text>'
    """
    sentences = required_list(row, "text_list", "sentences")
    files = LocalFiles("image_info[].image_name")
    before: dict[int, list[Image]] = {}
    for number, entry in enumerate(list_field(row, "image_info", "images")):
        place = f"image_info[{number}]"
        if not isinstance(entry, Mapping):
            raise DocumentError(
                f"expected an image in {{}}, found {type(entry).__name__}.", kind="row", field=place
            )
        index = entry.get("matched_text_index")
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(sentences):
            raise DocumentError(
                f"expected the number of a sentence, 0 to {len(sentences) - 1}; found {index!r:.60}.",
                kind="row",
                field=f"{place}.matched_text_index",
            )
        image = files.image(entry.get("raw_url"), entry.get("image_name"), place)
        before.setdefault(index, []).append(image)
    segments: list[Segment] = []
    for number, sentence in enumerate(sentences):
        if not isinstance(sentence, str):
            raise DocumentError(
                f"expected a string, found {type(sentence).__name__}.",
                kind="row",
                field=f"text_list[{number}]",
            )
        joint = " " if sentence and number + 1 < len(sentences) else ""
        segments += [*before.get(number, ()), Text(sentence + joint, trainable=True)]
    return Document(tuple(segments))
