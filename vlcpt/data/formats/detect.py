"""The formats by name: which fields each reads, what ``targets`` may be, and how a row is recognised."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from vlcpt.data.documents import TAG_START, Document, DocumentError
from vlcpt.data.formats.chat import (
    TARGETS,
    TEMPLATE,
    read_alpaca,
    read_docmatix,
    read_messages,
    read_query,
    read_sharegpt,
)
from vlcpt.data.formats.marked import read_marked, read_segments, read_text
from vlcpt.data.formats.web import read_caption, read_mmc4, read_obelics
from vlcpt.data.markup import Untagged
from vlcpt.data.media.files import may_be_media, medium_in
from vlcpt.data.rows.base import Rows
from vlcpt.data.rows.fields import Row, field_names, is_given
from vlcpt.data.rows.text_files import TextRows

logger = logging.getLogger(__name__)

_LOOKED_AT = 20  # readable rows, of the first 100


@dataclass(frozen=True)
class Schema:
    """One format.

    Args:
        read: Makes a row a Document.
        fields: What it reads of a row, besides ``id``; the first one holds the text or the turns.
        sample: What messages show of a row.
        targets: What ``targets`` may be, the default first; empty: rows mark their targets themselves.
        remedy: Where a row of it has its media, as an order.
        marking: How a row without a target gets some; empty: all its text is one, so it has no text.
        chat: Whether it has turns, and so ``chat_template``.
    """

    read: Callable[..., Document]
    fields: tuple[str, ...]
    sample: str
    targets: tuple[str, ...] = ("all",)
    remedy: str = ""
    marking: str = ""
    chat: bool = False


_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_LISTED = "list it in 'images' or 'videos'"


def _chat(read: Callable[..., Document], *fields: str, sample: str, marker: str) -> Schema:
    return Schema(
        read,
        (*fields, *_MEDIA, "system", "objects", TEMPLATE),
        sample,
        TARGETS,
        remedy=_LISTED + marker,
        marking="Targets are the assistant's turns: check roles and loss switches, or set targets: all.",
        chat=True,
    )


_IN_TURN = " and put <image> or <video> into a turn"
_IN_TEXT = ", perhaps with <image> in the text"
SCHEMAS: dict[str, Schema] = {
    "vlcpt": Schema(
        read_marked,
        ("text", "images", "videos"),
        "text, marked or not",
        (),
        remedy=f"{_LISTED} and put <image> or <video> into the text",
        marking="Mark targets with <trainable_text>.",
    ),
    "segments": Schema(
        read_segments,
        ("segments",),
        "segments",
        (),
        remedy='give it a segment of its own: {"type": "image", "image": …}',
        marking='Set "trainable": true in the text segments that are targets.',
    ),
    "sharegpt": _chat(
        read_sharegpt, "conversations", sample="conversations of from and value", marker=_IN_TURN
    ),
    "messages": _chat(read_messages, "messages", sample="messages of role and content", marker=_IN_TURN),
    "alpaca": _chat(
        read_alpaca,
        *("instruction", "output", "input", "history"),
        sample="instruction and output",
        marker=_IN_TEXT,
    ),
    "query": _chat(
        read_query,
        *("query", "response", "instruction", "history"),
        sample="query or instruction, and response",
        marker=_IN_TEXT,
    ),
    "docmatix": _chat(read_docmatix, "texts", sample="texts of user and assistant", marker=_IN_TEXT),
    "caption": Schema(
        read_caption, ("caption", "text", *_MEDIA, "objects"), "image and caption, or image and text"
    ),
    "obelics": Schema(
        read_obelics,
        ("texts", "images", "image_files"),
        "images and texts",
        remedy="put it into 'images', where 'texts' has null",
    ),
    "mmc4": Schema(
        read_mmc4,
        ("text_list", "image_info"),
        "text_list and image_info",
        remedy="put it into 'image_info', as 'image_name'",
    ),
    "text": Schema(read_text, ("text",), "files of plain text"),
}
FORMATS = ("auto", *SCHEMAS)


def schema_reader(
    format: str,
    *,
    untagged: Untagged = "train",
    targets: str | None = None,
    chat_template: bool = False,
) -> Callable[..., Document]:
    """What makes a row of this format a Document, with its options.

    Raises:
        ValueError: If the format is unknown, or has no such option.

    Example:
        >>> schema_reader("sharegpt", targets="none")
        Traceback (most recent call last):
        ...
        ValueError: targets 'none' is unknown. Format sharegpt has: assistant, last, all.
    """
    check_format(format, targets, chat_template)
    schema = SCHEMAS[format]
    if format == "vlcpt":
        return partial(schema.read, untagged=untagged)
    if not schema.chat:  # there is no choice
        return schema.read
    return partial(schema.read, targets=targets or schema.targets[0], chat_template=chat_template)


def check_format(format: str, targets: str | None = None, chat_template: bool = False) -> None:
    """Raise ValueError for a format that is unknown, or that has no such option.

    Example:
        >>> check_format("mesages")
        Traceback (most recent call last):
        ...
        ValueError: unknown format 'mesages'. Known: auto, vlcpt, segments, sharegpt, messages, alpaca, query, docmatix, caption, obelics, mmc4, text.
    """  # noqa: E501
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}. Known: {', '.join(FORMATS)}.")
    if chat_template and format != "auto" and not SCHEMAS[format].chat:
        having = ", ".join(name for name, schema in SCHEMAS.items() if schema.chat)
        raise ValueError(f"chat_template does not apply to format {format}, only to {having}. Remove it.")
    if targets is None:
        return
    known = SCHEMAS[format].targets if format != "auto" else TARGETS
    if not known:
        raise ValueError(
            f"targets {targets!r} does not apply to format {format}: its rows mark what trains. Remove it."
        )
    if targets not in known:
        raise ValueError(f"targets {targets!r} is unknown. Format {format} has: {', '.join(known)}.")


def detect_format(rows: Rows, name: str, ignored: Collection[str] = ()) -> str:
    """The format that the fields of the first rows show.

    Args:
        rows: The rows.
        name: What messages call them.
        ignored: Fields that are not looked at.

    Raises:
        DocumentError: If no format fits, or more than one.

    Example:
        >>> from vlcpt.data.rows.tables import MemoryRows
        >>> detect_format(MemoryRows([{"image": "a.png", "caption": "A cat."}], "rows"), "rows")
        'caption'
    """
    if isinstance(rows, TextRows):
        return "text"
    first_of: dict[str, int] = {}  # the first row that each format fits
    unknown: tuple[int, Row] | None = None
    for number, row in islice(_readable(rows), _LOOKED_AT):
        found = ["vlcpt"] if isinstance(row, Document) else _fitting(row, ignored)
        for format in found:
            first_of.setdefault(format, number)
        if not found and unknown is None and not isinstance(row, Document):
            unknown = (number, row)
    if len(first_of) == 1:
        return next(iter(first_of))
    if first_of:
        found_in = ", ".join(
            f"{format} (row {row + 1}: {SCHEMAS[format].sample})" for format, row in first_of.items()
        )
        raise DocumentError(
            f"the first rows fit more than one format: {found_in}. Set format to the one that is meant.",
            kind="source",
            field=name,
        )
    if unknown is not None:
        known = "; ".join(f"{format}: {schema.sample}" for format, schema in SCHEMAS.items())
        raise DocumentError(
            f"no format fits the fields {field_names(unknown[1])}.{_misnamed(unknown[1])} "
            f"Known formats: {known}.",
            kind="source",
            source=rows.source(unknown[0]),
        )
    return "vlcpt"  # no row could be read: its reader names what is wrong with each


def log_formats(chosen: Mapping[str, str]) -> None:
    """Log which formats the rows of sources were found to have, and why: a line a format.

    A command shows the first such line of a format. Sources are opened a role after the other, so the line
    has one of them as an example, and no list that would be incomplete.

    Args:
        chosen: The formats by the names of the sources.
    """
    first_of: dict[str, str] = {}
    for name, format in chosen.items():
        first_of.setdefault(format, name)
    for format, name in first_of.items():
        logger.info(
            "format %s was found, because the first rows have %s, e.g. of %s. Set format of a source to read "
            "it otherwise.",
            *(format, SCHEMAS[format].sample, name),
            extra={"once": f"format {format}"},
        )


def _misnamed(row: Row) -> str:
    """Which field seems to have a medium, for rows of which no field has a known name for one."""
    names = (str(name)[:60] for name, value in row.items() if medium_in(value, str(name), None) is not None)
    return next((f" {name!r} seems to have a medium: call it 'image' or 'video'." for name in names), "")


def _readable(rows: Rows) -> Iterator[tuple[int, Row | Document]]:
    for number in range(min(len(rows), 100)):
        try:
            yield number, rows.row(number)
        except DocumentError:
            continue  # reported, or counted, when it is read


# Formats with fields of their own; then those that are known by fields that many other rows have.
_OWN_FIELDS = {
    "segments": {"segments"},
    "sharegpt": {"conversations"},
    "messages": {"messages"},
    "mmc4": {"text_list", "image_info"},
}
_ANSWERS = (("alpaca", {"instruction", "input"}, "output"), ("query", {"query", "instruction"}, "response"))


def _fitting(row: Row, ignored: Collection[str] = ()) -> list[str]:
    """The formats whose fields a row has; a null is no field, for Arrow fills rows with them."""
    given = {name: value for name, value in row.items() if value is not None and name not in ignored}
    found = [format for format, needed in _OWN_FIELDS.items() if needed <= given.keys()]
    texts = given.get("texts")
    if isinstance(texts, Sequence) and not isinstance(texts, str | bytes):
        pairs = [isinstance(one, Mapping) and {"user", "assistant"} <= one.keys() for one in texts]
        if pairs and all(pairs):
            found.append("docmatix")
        elif "images" in given and all(one is None or isinstance(one, str) for one in texts):
            found.append("obelics")
    alone = any(may_be_media(given.get(name)) for name in ("image", "video"))
    listed = any(may_be_media(one) and is_given(one) for one in (given.get("images"), given.get("videos")))
    text = str(given.get("text"))
    tags = [*TAG_START.finditer(text)] if "text" in given else []
    if "caption" in given and (alone or listed):
        if tags and listed:  # markup and its files: the caption is a field like any other
            found.append("vlcpt")
        else:
            found += ["vlcpt", "caption"] if tags or ("text" in given and listed) else ["caption"]
    elif "text" in given and alone and not listed and not found:
        # Also with a misspelt tag: it would be trained as it stands, as a caption.
        has_span = any("<trainable_text" in tag.group() or tag["misspelt"] for tag in tags)
        found += ["vlcpt", "caption"] if has_span else ["caption"]
    elif "text" in given:
        found.append("vlcpt")
    if not found:
        found = [format for format, asked, answer in _ANSWERS if answer in given and asked & given.keys()]
    return found
