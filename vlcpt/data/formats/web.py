"""Formats of web data: MMC4, OBELICS, and images with a caption."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from vlcpt.data.documents import Document, DocumentError, Image, Medium, MissingFileError, Segment, Text
from vlcpt.data.formats.markers import MEDIA_FIELDS, place_media, refuse_unread, split_markers
from vlcpt.data.media.files import shown_url
from vlcpt.data.media.references import medium_at
from vlcpt.data.rows.fields import Row, field_names, is_given, list_field, required_list, text_at, text_field


def _local_file(reference: object, name: object, place: str, url_of: dict[str, str], mapping: str) -> Medium:
    """The image by its file's name, else by its URL's last part, else as any reference.

    Args:
        reference: A URL, or what any image may be.
        name: The file's name, if the row has it.
        place: For messages.
        url_of: The URL of each last part so far: two may not mean the same file.
        mapping: The field that names files, for messages.
    """
    if name is not None:
        if not isinstance(name, str):
            raise DocumentError(
                f"expected a file's name, found {type(name).__name__}.", kind="reference", field=place
            )
        reference = name
    elif isinstance(reference, str) and reference.lower().startswith(("http://", "https://")):
        url = reference
        try:
            reference = urlsplit(url).path.rpartition("/")[2]
        except ValueError:
            reference = ""
        other = url_of.setdefault(reference, url)
        if not reference or other != url:
            reason = (
                f"{shown_url(url)!r} and {shown_url(other)!r} both end in {reference!r}: one file cannot be "
                f"both. Name their files in {mapping}."
                if reference
                else f"the URL {shown_url(url)!r} ends in no file's name. Name its file in {mapping}."
            )
            raise DocumentError(reason, kind="reference", field=place)
    return medium_at(Image, reference, place)


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
    url_of: dict[str, str] = {}
    before: dict[int, list[Medium]] = {}
    for number, entry in enumerate(list_field(row, "image_info", "images")):
        place = f"image_info[{number}]"
        if not isinstance(entry, Mapping):
            raise DocumentError(f"expected an image in {{}}, found {type(entry).__name__}.", field=place)
        index = entry.get("matched_text_index")
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(sentences):
            raise DocumentError(
                f"expected the number of a sentence, 0 to {len(sentences) - 1}; found {index!r:.60}.",
                field=f"{place}.matched_text_index",
            )
        found = (entry.get("raw_url"), entry.get("image_name"), place)
        before.setdefault(index, []).append(_local_file(*found, url_of, "image_info[].image_name"))
    segments: list[Segment] = []
    for number, sentence in enumerate(sentences):
        text = text_at(sentence, f"text_list[{number}]")
        joint = " " if text and number + 1 < len(sentences) else ""
        segments += [*before.get(number, ()), Text(text + joint, trainable=True)]
    return Document(tuple(segments))


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
                field=field,
            )
    url_of: dict[str, str] = {}
    segments: list[Segment] = []
    for number, (image, text, name) in enumerate(zip(images, texts, names, strict=True)):
        if (image is None) == (text is None):
            found = "both are null" if text is None else "both are set"
            raise DocumentError(
                f"expected 'images' or 'texts' at this position; {found}.", field=f"texts[{number}]"
            )
        if image is not None:
            segments.append(_local_file(image, name, f"images[{number}]", url_of, "image_files"))
        elif not isinstance(text, str):
            raise DocumentError(
                f"expected a string or null, found {type(text).__name__}.", field=f"texts[{number}]"
            )
        else:
            follows_text = segments and not isinstance(segments[-1], Image)
            segments.append(Text(_PARAGRAPH + text if follows_text else text, trainable=True))
    return Document(tuple(segments))


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
        raise MissingFileError(
            f"expected an image or a video. Fields found: {field_names(row)}.", field="image"
        )
    (pieces,) = place_media([split_markers(text)], row, field, missing_first=0)
    segments: list[Segment] = [
        Text(piece, trainable=True) if isinstance(piece, str) else piece for piece in pieces
    ]
    return Document(tuple(segments), empty_spans=int(not text))
