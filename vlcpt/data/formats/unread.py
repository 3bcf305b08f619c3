"""What of a row was not read: named, and an error where a medium would be lost by it."""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

from vlcpt.data.documents import Document, DocumentError, Image, Text, Video
from vlcpt.data.formats.marked import OTHER_BRACKETS, PLAIN
from vlcpt.data.formats.turns import TURN_WEIGHTS
from vlcpt.data.media.names import BESIDE, MEDIA_SUFFIXES, ends_like_media
from vlcpt.data.media.open import MediaError, heif_kind, resolve
from vlcpt.data.media.references import HINTS, hints_in
from vlcpt.data.rows.fields import Row, is_given
from vlcpt.data.rows.tars import UNNAMED as OF_A_TAR

LINKS = "files that its Markdown or HTML links to"
LONE_MEDIA = "pictures and videos without a text"
LONE_TEXTS = "texts without a picture or video"
UNNAMED = "media files that no row names"
_OF_FILES = frozenset((BESIDE, LONE_MEDIA, LONE_TEXTS, UNNAMED))
_OF_ROWS = frozenset((LINKS, OTHER_BRACKETS, OF_A_TAR))  # no fields, but counted by rows

_SAYS_MEDIUM = re.compile(
    "image|img|picture|photo|video|图片|图像|照片|截图|插图|视频|影片|影像|圖片|圖像|視頻|画像|写真|動画",
    re.IGNORECASE,
)
# Of a table, such a column is looked at even where its first rows have no medium.
_SAYS_FILE = re.compile(
    "file|path|uri|src|media|frame|figure|clip|screenshot|attachment|asset|pic", re.IGNORECASE
)
_NOTHING = frozenset(("", "none", "null", "nan", "n/a", "-"))
# `video_title: "How to open clip.mp4"` is a text about a file.
_IS_TEXT = re.compile(
    r"(?:(?:title|caption|text|description|alt|prompt|question|answer)s?|标题|描述|说明|文本|問題|標題)$",
    re.IGNORECASE,
)


@lru_cache(maxsize=4096)
def _says_medium(name: str) -> bool:
    return _SAYS_MEDIUM.search(name) is not None


_QUOTED_FILE = re.compile(rf"\.(?:{'|'.join(sorted(MEDIA_SUFFIXES))})[\"']", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/]{48}")
# What may stand before base64: a header of any kind, or the mark that Python shows bytes with.
_HEADER = re.compile(r"""data:[^,]{0,80},|base64[:,]/{0,2}|b["']""", re.IGNORECASE)
_QWEN = re.compile(r"<img>\s*([^<>\n]{1,500}?)\s*</img>")
# Links as Markdown and HTML write them, by a reference too, and as Obsidian does.
_LINK = re.compile(
    r"""\]\(\s*(?:<([^<>\n]{1,500})>|((?:[^\s<>()]|\([^\s<>()]{0,200}\)){1,500}))|!\[\[([^\]|\n]{1,500})"""
    r"""|^[ ]{0,3}\[[^\]\n]{1,200}\]:\s*<?([^\s<>]{1,500})"""
    r"""|\b(?:src|href|srcset|poster)\s*=\s*(?:"([^"<>]{1,500})"|'([^'<>]{1,500})'|([^\s"'<>]{1,500}))""",
    re.IGNORECASE | re.MULTILINE,
)
_ENDING = re.compile(rf"\.(?:{'|'.join(sorted(MEDIA_SUFFIXES))})\b", re.IGNORECASE)
_MOST_NAMED = 20  # fields in a message; ledger.json has all
_MOST_NAME = 1000  # characters that a path has at most
_MOST_DEEP = 16  # lists and structs in each other
_MOST_LEAVES = 4000  # of a field

# Where the formats of conversations have their turns, and what is read of one and of a part of one.
_TURNS = {"sharegpt": "conversations", "messages": "messages", "docmatix": "texts"}
_OF_TURN = frozenset(("from", "value", "role", "content", "user", "assistant", "train_detail", *TURN_WEIGHTS))
_OF_TEXT_PART = frozenset(("type", "text", "index", *HINTS))
# Keys that other tools have, or may have, for whether a turn is trained.
_SWITCH = re.compile(
    r"(?:^|_)(?:loss|train(?:able|ing|ed)?|mask(?:ed)?|label|learn|supervised?|weight)(?:_|$)"
)

# `label: 0` is a class, and `train_id: 0` the first of many; false is neither.
_IS_NUMBER = re.compile(r"(?:^|_)(?:label|id|idx|index|step|name|count)s?$")

# Fields with structs of media, whose other keys are named.
_REFERENCES = ("images", "image", "videos", "video", "segments", "messages")

# Where each format has its text, for messages; others under "text".
_TEXTS = {
    "segments": "segments",
    "sharegpt": "conversations",
    "messages": "messages",
    "alpaca": "instruction",
    "query": "query",
    "docmatix": "texts",
    "obelics": "texts",
    "mmc4": "text_list",
}
_REMEDIES = {
    "vlcpt": "list it in 'images' or 'videos' and put <image> or <video> into the text",
    "segments": 'give it a segment of its own: {"type": "image", "image": …}',
    "sharegpt": "list it in 'images' or 'videos' and put <image> or <video> into a turn",
    "messages": "list it in 'images' or 'videos' and put <image> or <video> into a turn",
    **dict.fromkeys(
        ("alpaca", "query", "docmatix"), "list it in 'images' or 'videos', perhaps with <image> in the text"
    ),
    "caption": "call the field 'image' or 'video'",
    "obelics": "put it into 'images', where 'texts' has null",
    "mmc4": "put it into 'image_info', as 'image_name'",
}


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
            DocumentError: If no medium of the row was read, though one of them holds a medium.
        """
        if self.format == "text":  # all of it is plain characters
            return []
        names = [
            hint
            for name in _REFERENCES
            if name in self.fields and isinstance(row.get(name), Mapping | list | tuple)
            for hint in dict.fromkeys(hints_in(row[name], name))
        ]
        held = {
            str(name): value
            for name, value in row.items()
            if name not in self.fields and name not in self.ignored and not is_empty(value)
        } | self._in_turns(row)
        names += held
        if self.format == "caption" and row.get("caption") is not None and "text" in row:
            names += ["text"] if row["text"] and "text" not in self.ignored else []
        if all(isinstance(segment, Text) for segment in document.segments):
            for name, value in held.items():
                found = medium_in(value, name, self.media_root)
                if found is not None:
                    raise self._lost(name, found)
            names += self._in_text(document)
        # Rows in memory keep all their fields, and have just been counted.
        return [*names, *(name for name in self.untouched if name not in row)]

    def explain(self, error: DocumentError, row: Row) -> None:
        """Say of a marker, or a caption, without a file which field has one: no other format mends that."""
        is_caption = self.format == "caption" and error.kind == "row" and error.field == "image"
        lacks_file = error.kind in ("markup", "markers") and "lists 0" in error.reason
        if self.format == "text" or not (is_caption or lacks_file):
            return
        others = (name for name in row if name not in self.fields and name not in self.ignored)
        name = next((name for name in others if medium_in(row[name], str(name), self.media_root)), None)
        if name is not None:
            todo = "call it 'image' or 'video'" if is_caption else "list it in 'images' or 'videos'"
            error.reason = (
                f"{error.reason.removesuffix(PLAIN)} The row has one in {str(name)[:60]!r}, which format "
                f"{self.format} does not read: {todo}."
            )

    def _in_turns(self, row: Row) -> dict[str, object]:
        """Keys of turns and of their parts that are not read, such as the ``images`` of Ollama.

        Raises:
            DocumentError: If one of them seems to switch a turn off, which would be trained all the same.
        """
        field = _TURNS.get(self.format, "")
        found: dict[str, object] = {}
        for place, key, value in _keys_of_turns(row.get(field), field):
            name = f"{place}.{key}"
            if name in self.ignored or not is_given(value):
                continue
            if _switches_off(key, value):
                raise DocumentError(
                    f"{value!r:.60} seems to say that this is not trained, but the key is not read. Write "
                    f'"loss": false into the turn, or set ignore_fields: ["{name}"] for the source if the '
                    "key means something else.",
                    kind="row",
                    field=name[:60],
                )
            # Of all turns' values, one with a medium is the one to look at.
            if name not in found or medium_in(value, key, self.media_root) is not None:
                found[name] = value
        return found

    def _in_text(self, document: Document) -> list[str]:
        links = False
        for segment in document.segments:
            text = segment.text if isinstance(segment, Text) else ""
            for match in _QWEN.finditer(text) if "<img>" in text and "<img>" not in self.ignored else ():
                if _is_there(match[1], self.media_root):
                    raise self._lost_in_text(match.group(), is_marked=document.tagged)
            # Many pages link, few to media: the cheap look first.
            if not links and _ENDING.search(text):
                links = any(
                    _is_linked(match[match.lastindex or 0], self.media_root) for match in _LINK.finditer(text)
                )
        return [LINKS] if links else []

    def _lost_in_text(self, found: str, *, is_marked: bool) -> DocumentError:
        # As plain text, marked rows would train their tags, and conversations have no text.
        plain = "" if self.format != "vlcpt" or is_marked else ", or format: text where nothing is markup"
        return DocumentError(
            f"{found[:80]!r} names a file that is there, but <img>…</img> is not read, and no medium of the "
            f"row is. To train on it, {_REMEDIES[self.format]} in its place; otherwise set ignore_fields: "
            f'["<img>"] for the source{plain}.',
            kind="row",
            field=_TEXTS.get(self.format, "text"),
        )

    def _lost(self, name: str, found: str) -> DocumentError:
        # As YAML wants it.
        shown = name if re.fullmatch(r"[^\W\d][\w .-]*", name) else json.dumps(name, ensure_ascii=False)
        return DocumentError(
            f"it holds {found}, but format {self.format} does not read this field, and no medium of the row "
            f"is read. To train on it, {_REMEDIES[self.format]}; otherwise set ignore_fields: [{shown}] for "
            "the source.",
            kind="row",
            field=name[:60],
        )


def _keys_of_turns(turns: object, field: str) -> Iterator[tuple[str, str, object]]:
    """Each key of a turn or of a part that is not read: where it stands, its name and its value."""
    for turn in turns if isinstance(turns, list | tuple) else ():
        if not isinstance(turn, Mapping):
            continue
        for key in turn:
            if key not in _OF_TURN:
                yield f"{field}[]", str(key), turn[key]
        content = turn.get("content")
        for part in content if isinstance(content, list | tuple) else ():
            if not isinstance(part, Mapping):
                continue
            # Of a part that is a medium, the reader takes some keys that it does not use.
            kind = part.get("type")
            unused = {"text", "fps", "max_frames"} if kind in ("image", "image_url") else {"text"}
            for key in part if kind == "text" else [key for key in part if key in unused]:
                if key not in _OF_TEXT_PART or kind != "text":
                    yield f"{field}[].content[]", str(key), part[key]


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


def medium_in(value: object, name: str, media_root: str | None) -> str | None:
    """What medium a field holds, as a message says it; None: none.

    Args:
        value: The field's; lists and structs are looked through.
        name: The field's; it tells whether a file's name is one of a medium.
        media_root: Folder that files may be in.

    Example:
        >>> medium_in("a.png", "image_path", "/no/such/folder"), medium_in(7, "image_id", None)
        ("the name 'a.png'", None)
    """
    leaves = islice(_leaves(value, name), _MOST_LEAVES)
    # A page's `metadata: {"og:image": "https://…"}` tells of the page; the field says nothing of a medium.
    says = _says_medium(name)
    found = (
        _medium(leaf, leaf_name, media_root) for leaf, leaf_name in leaves if says or not _is_address(leaf)
    )
    return next((one for one in found if one is not None), None)


def _leaves(value: object, name: str, depth: int = 0) -> Iterator[tuple[object, str]]:
    """What a value holds that is no list or struct, each with the name that says most of it; no numbers."""
    if isinstance(value, Mapping):
        for key, inner in value.items() if depth < _MOST_DEEP else ():
            yield from _leaves(inner, name if _says_medium(name) else str(key), depth + 1)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview):
        first = next((inner for inner in value if inner is not None), None)
        # Of numbers, as embeddings have them, the first says what all are.
        for inner in value if depth < _MOST_DEEP and not isinstance(first, int | float) else ():
            yield from _leaves(inner, name, depth + 1)
    elif value is not None and not isinstance(value, int | float):
        yield value, name


def _is_address(value: object) -> bool:
    """Whether a value is where something is on a network, which nothing here would fetch."""
    return isinstance(value, str) and re.match(r"(?!file:)[a-z][a-z0-9+.-]*://|//", value, re.I) is not None


def _medium(value: object, name: str, media_root: str | None) -> str | None:
    """The same for what is no list or struct."""
    if isinstance(value, os.PathLike):
        value = str(value)
    if isinstance(value, str):
        return _named(value, name, media_root)
    if isinstance(value, bytes | bytearray | memoryview):
        kind = _sniffed(bytes(value[:32]))
        return f"the bytes of {kind}" if kind else "bytes" if _says_medium(name) and value else None
    if isinstance(value, Image | Video) or type(value).__module__.startswith("PIL."):
        return "an image or a video"
    return None


def may_hold_media(name: str, values: Iterable[object]) -> bool:
    """Whether a column of a table has to be looked at in each row, by its name and its first values.

    Example:
        >>> may_hold_media("url", ["http://example.org/"]), may_hold_media("file_name", ["a.png"])
        (False, True)
    """
    if _says_medium(name) or _SAYS_FILE.search(name):
        return True
    known = False
    for value in values:
        known = known or (is_given(value) and not (isinstance(value, str) and value.lower() in _NOTHING))
        if isinstance(value, bytes) or medium_in(value, "image", None) is not None:
            return True
    return not known  # of nulls and the like nothing is known


def suffixes_of(files: Iterable[Path]) -> Mapping[str, int]:
    """Files that are not read, counted by their suffixes, as :func:`list_unread` shows them.

    Example:
        >>> suffixes_of([Path("a_stats.json"), Path("b.JSON"), Path("LICENSE")])
        {'.json': 2, '. (no suffix)': 1}
    """
    return dict(Counter(file.suffix.lower() or ". (no suffix)" for file in files))


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


def is_empty(value: object) -> bool:
    """Whether there is nothing in a field; null is how Arrow fills those that other rows have.

    Example:
        >>> is_empty(None), is_empty([]), is_empty(0)
        (True, True, False)
    """
    if isinstance(value, str | int | float):  # most are; a 0 is something
        return value == ""
    return value is None or (isinstance(value, bytes | Mapping | Sequence) and not len(value))


def _named(value: str, name: str, media_root: str | None) -> str | None:
    """The same for a string: a data: URI, base64, or a file's name."""
    if value[:11].lower() in ("data:image/", "data:video/"):
        return "a data: URI"
    if len(value) > 64 and (kind := _sniffed_base64(value)):
        return f"base64 of {kind}"
    says = _says_medium(name)
    if says and value[:1] in "[{" and _QUOTED_FILE.search(value[:_MOST_NAME]):
        return f"the names {value[:80]!r}"
    if len(value) > _MOST_NAME or "\n" in value:
        return None
    if says and ends_like_media(value) and not _IS_TEXT.search(name):
        return f"the name {value[:80]!r}"
    is_local = "://" not in value or value[:5].lower() == "file:"
    if (says or ends_like_media(value)) and is_local and _is_there(value, media_root):
        return f"the name of a file that is there, {value[:80]!r}"
    return None


def _is_linked(target: str, media_root: str | None) -> bool:
    """Whether a link leads to a media file that is there; a ``srcset`` may lead to several."""
    if "://" in target or not _ENDING.search(target):
        return False
    for one in (target, *(part.split()[0] for part in target.split(",") if part.strip())):
        name = unquote(re.split(r"[?#]", one, maxsplit=1)[0])
        if ends_like_media(name) and _is_there(name, media_root):
            return True
    return False


def _is_there(name: str, media_root: str | None) -> bool:
    """Whether a name is a file that a row may name."""
    # Also as Windows writes it.
    for path in dict.fromkeys((name, name.replace("\\", "/"))):
        try:
            return resolve(path, None if media_root is None else Path(media_root)).is_file()
        except (MediaError, OSError, ValueError):
            continue
    return False


def _sniffed_base64(value: str) -> str | None:
    header = _HEADER.match(value)
    begin = header.end() if header else 0
    # In the alphabet for URLs, two characters are others.
    start = "".join(value[begin : begin + 80].split())[:48].replace("-", "+").replace("_", "/")
    if not _BASE64.fullmatch(start):
        return None
    try:
        return _sniffed(base64.b64decode(start))
    except binascii.Error:
        return None


_MAGIC: Collection[tuple[bytes, str]] = (
    (b"\x89PNG\r\n", "a PNG"),
    (b"\xff\xd8\xff", "a JPEG"),
    (b"GIF8", "a GIF"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"\x1aE\xdf\xa3", "a video (Matroska or WebM)"),
)


def _sniffed(start: bytes) -> str | None:
    """The kind of a medium by its first bytes."""
    for magic, kind in _MAGIC:
        if start.startswith(magic):
            return kind
    if start[:4] == b"RIFF" and start[8:12] in (b"WEBP", b"AVI "):
        return "a WebP" if start[8:12] == b"WEBP" else "a video (AVI)"
    if start[4:8] == b"ftyp":
        return heif_kind(start) or "a video (MP4 or MOV)"
    return "a BMP" if start[:2] == b"BM" and start[6:10] == bytes(4) else None
