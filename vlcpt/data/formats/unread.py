"""Fields of a row that its format does not read: named, and an error where a medium would be lost by it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vlcpt.data.documents import Document, DocumentError, MissingFileError, Text
from vlcpt.data.formats.chat import TEMPLATE, TEMPLATE_SIZES, TURN_WEIGHTS
from vlcpt.data.formats.detect import SCHEMAS
from vlcpt.data.formats.marked import OTHER_BRACKETS
from vlcpt.data.formats.markers import MEDIA_FIELDS
from vlcpt.data.media.files import (
    BESIDE,
    LONE_MEDIA,
    LONE_TEXTS,
    UNNAMED,
    is_there,
    links_to_media,
    may_be_media,
    medium_in,
)
from vlcpt.data.media.references import HINTS
from vlcpt.data.rows.fields import Row, is_given
from vlcpt.data.rows.tars import UNNAMED as OF_A_TAR

LINKS = "files that its Markdown or HTML links to"
_OF_FILES = frozenset((BESIDE, LONE_MEDIA, LONE_TEXTS, UNNAMED))
_OF_ROWS = frozenset((LINKS, OTHER_BRACKETS, OF_A_TAR))  # no fields, but counted by rows
_MOST_NAMED = 20  # fields in a message; ledger.json has all
_PLAIN = " Where no text of the source is markup, as in web pages or code, set format: text."
_QWEN = re.compile(r"<img>\s*([^<>\n]{1,500}?)\s*</img>")

# The keys that are read of a turn, and of a part that is text. In all other structs an unknown key is an
# error, except hints and keys that only a part of another type uses.
_OF_TURN = frozenset(("from", "value", "role", "content", "user", "assistant", "train_detail", *TURN_WEIGHTS))
_OF_TEXT_PART = frozenset(("type", "text", "index"))
_UNUSED = {
    **dict.fromkeys(("image", "image_url"), HINTS | {"text", "fps", "max_frames"}),
    **dict.fromkeys(("video", "video_url"), HINTS | {"text"}),
}

# Keys that other tools have, or may have, for whether a turn is trained.
_SWITCH = re.compile(
    r"(?:^|_)(?:loss|train(?:able|ing|ed)?|mask(?:ed)?|label|learn|supervised?|weight)(?:_|$)"
)
# `label: 0` is a class, and `train_id: 0` the first of many; false is neither.
_IS_NUMBER = re.compile(r"(?:^|_)(?:label|id|idx|index|step|name|count)s?$")


@dataclass(frozen=True)
class Unread:
    """Names the fields of a row that its format does not read.

    Args:
        format: The format, for what to do.
        fields: What it reads.
        ignored: What the user said is not to be looked at.
        media_root: Folder of the source's media; None: paths are trusted.
        untouched: Columns of a table that hold no medium and were never read.

    Example:
        >>> unread = Unread("vlcpt", frozenset({"id", "text"}), frozenset(), None)
        >>> unread.of({"text": "a", "source": "web"}, Document((Text("a"),)))
        ['source']
    """

    format: str
    fields: frozenset[str]
    ignored: frozenset[str]
    media_root: str | None
    untouched: tuple[str, ...] = ()

    def of(self, row: Row, document: Document) -> list[str]:
        """The names, and pseudo-names for what the text links to.

        Raises:
            DocumentError: If no medium of the row was read, though one of them holds a medium, or if a key
                of a turn seems to switch it off.
        """
        if self.format == "text":  # all of it is plain characters
            return []
        found: dict[str, object] = {}
        for name, key, value in self._left(row):
            if name in self.ignored or not is_given(value):
                continue
            if key and _switches_off(key, value):
                raise DocumentError(
                    f"{value!r:.60} seems to say that this is not trained, but the key is not read. Write "
                    f'"loss": false into the turn, or set ignore_fields: ["{name}"] for the source if the '
                    "key means something else.",
                    field=name[:60],
                )
            # If several turns have the key, a value with a medium is kept.
            if name not in found or medium_in(value, key, self.media_root) is not None:
                found[name] = value
        links: list[str] = []
        if all(isinstance(segment, Text) for segment in document.segments):
            for name, value in found.items():
                if (medium := medium_in(value, name, self.media_root)) is not None:
                    raise self._lost(name, medium)
            links = self._in_text(document)
        # Rows in memory keep all their fields, and have just been counted.
        return [*found, *links, *(name for name in self.untouched if name not in row)]

    def advise(self, error: DocumentError, row: Row) -> None:
        """Say what else may be meant, of a row with a marker, or a caption, without a file."""
        if self.format == "text":
            return
        if isinstance(error, MissingFileError):
            others = (name for name in row if name not in self.fields and name not in self.ignored)
            for name in others:
                is_named = name in MEDIA_FIELDS and is_given(row[name]) and may_be_media(row[name])
                if is_named or medium_in(row[name], str(name), self.media_root) is not None:
                    is_caption = self.format == "caption"
                    todo = "call it 'image' or 'video'" if is_caption else "list it in 'images' or 'videos'"
                    error.reason += (
                        f" The row has one in {str(name)[:60]!r}, which format {self.format} does not read: "
                        f"{todo}."
                    )
                    return
        is_markup = self.format == "vlcpt" and error.kind in ("markup", "markers")
        if is_markup and not any(is_given(one) and may_be_media(one) for one in map(row.get, MEDIA_FIELDS)):
            error.reason += _PLAIN

    def _left(self, row: Row) -> Iterator[tuple[str, str, object]]:
        """Each field, and each key of a struct in one, that is not read: name, a struct's key, value."""
        schema = SCHEMAS[self.format]
        for field, value in row.items():
            if field not in self.fields or (
                field == "text" and self.format == "caption" and row.get("caption") is not None
            ):
                yield str(field), "", value
            elif field == TEMPLATE and isinstance(value, Mapping):
                others = (key for key in value if key not in TEMPLATE_SIZES)
                yield from ((f"{TEMPLATE}.{key}"[:60], "", value[key]) for key in others)
            elif isinstance(value, Mapping | list | tuple):
                yield from _keys_left(value, str(field), is_turn=schema.chat and field == schema.fields[0])

    def _in_text(self, document: Document) -> list[str]:
        texts = [segment.text for segment in document.segments if isinstance(segment, Text)]
        for text in texts:
            for match in _QWEN.finditer(text) if "<img>" in text and "<img>" not in self.ignored else ():
                if is_there(match[1], self.media_root):
                    raise self._lost_in_text(match.group(), is_marked=document.tagged)
        return [LINKS] if any(links_to_media(text, self.media_root) for text in texts) else []

    def _lost_in_text(self, found: str, *, is_marked: bool) -> DocumentError:
        # As plain text, marked rows would train their tags, and conversations have no text.
        plain = "" if self.format != "vlcpt" or is_marked else ", or format: text where nothing is markup"
        schema = SCHEMAS[self.format]
        return DocumentError(
            f"{found[:80]!r} names a file that is there, but <img>…</img> is not read, and no medium of the "
            f"row is. To train on it, {schema.remedy} in its place; otherwise set ignore_fields: "
            f'["<img>"] for the source{plain}.',
            field=schema.fields[0],
        )

    def _lost(self, name: str, found: str) -> DocumentError:
        # As YAML wants it.
        shown = name if re.fullmatch(r"[^\W\d][\w .-]*", name) else json.dumps(name, ensure_ascii=False)
        return DocumentError(
            f"it holds {found}, but format {self.format} does not read this field, and no medium of the row "
            f"is read. To train on it, {SCHEMAS[self.format].remedy}; otherwise set ignore_fields: [{shown}] "
            "for the source.",
            field=name[:60],
        )


def _keys_left(value: object, place: str, *, is_turn: bool = False) -> Iterator[tuple[str, str, object]]:
    """Each key inside a field that is not read: where it stands, its name and its value."""
    if isinstance(value, list | tuple):
        for one in value:
            yield from _keys_left(one, f"{place}[]", is_turn=is_turn)
    elif isinstance(value, Mapping):
        is_text = "[].content[]" in place and value.get("type") == "text"
        read = _OF_TURN if is_turn else _OF_TEXT_PART
        unused = _UNUSED.get(str(value.get("type")), HINTS)
        for key, inner in value.items():
            if key not in read if is_turn or is_text else key in unused:
                yield f"{place}.{key}", str(key), inner
            elif isinstance(inner, Mapping | list | tuple):
                yield from _keys_left(inner, f"{place}.{key}"[:60])


def _switches_off(key: str, value: object) -> bool:
    """Whether a key of a turn seems to say that it is not trained.

    Example:
        >>> _switches_off("trainOnTurn", False), _switches_off("trainable", True), _switches_off("mask", 1)
        (True, False, True)
    """
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower())
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        return False
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower().replace("-", "_")
    if not _SWITCH.search(name) or (_IS_NUMBER.search(name) and not isinstance(value, bool)):
        return False
    is_negated = name.startswith(("no_", "not_", "ignore_", "skip_"))
    if "masked" in name:
        return bool(value) != is_negated
    # A mask is 1 for what is left out in one tool, and for what is trained in the next.
    return "mask" in name or bool(value) == is_negated


def list_unread(counts: Mapping[str, int]) -> str:
    """Names with their rows, as every command shows them; empty where all was read.

    Example:
        >>> list_unread({"source": 12000, "url": 1})
        'not read: source (12,000 rows), url (1 row)'
    """
    named: list[str] = []
    more = 0
    for name, count in counts.items():
        is_field = name not in _OF_FILES and name not in _OF_ROWS and not name.startswith(".")
        if is_field and len(named) >= _MOST_NAMED:
            more += 1
            continue
        unit = "row" if is_field or name in _OF_ROWS else "file"
        named.append(f"{name[:60]} ({count:,} {unit}{'s' * (count != 1)})")
    if more:
        named.append(f"{more:,} more field{'s' * (more != 1)}")
    return "not read: " + ", ".join(named) if named else ""
