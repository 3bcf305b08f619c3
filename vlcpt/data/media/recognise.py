"""Whether a value that no format reads holds a medium: by name, first bytes, or a file that is there."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

from vlcpt.data.documents import Image, Video
from vlcpt.data.media.names import MEDIA_SUFFIXES, ends_like_media
from vlcpt.data.media.open import MediaError, heif_kind, resolve
from vlcpt.data.rows.fields import is_given

_SAYS_MEDIUM = re.compile(
    "image|img|picture|photo|video|图片|图像|照片|截图|插图|视频|影片|影像|圖片|圖像|視頻|画像|写真|動画",
    re.IGNORECASE,
)
# A column of a table with such a name is searched even where its first rows have no medium.
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
# Links as Markdown and HTML write them, by a reference too, and as Obsidian does.
_LINK = re.compile(
    r"""\]\(\s*(?:<([^<>\n]{1,500})>|((?:[^\s<>()]|\([^\s<>()]{0,200}\)){1,500}))|!\[\[([^\]|\n]{1,500})"""
    r"""|^[ ]{0,3}\[[^\]\n]{1,200}\]:\s*<?([^\s<>]{1,500})"""
    r"""|\b(?:src|href|srcset|poster)\s*=\s*(?:"([^"<>]{1,500})"|'([^'<>]{1,500})'|([^\s"'<>]{1,500}))""",
    re.IGNORECASE | re.MULTILINE,
)
_ENDING = re.compile(rf"\.(?:{'|'.join(sorted(MEDIA_SUFFIXES))})\b", re.IGNORECASE)
_MOST_NAME = 1000  # characters that a path has at most
_MOST_DEEP = 16  # lists and structs in each other
_MOST_LEAVES = 4000  # of a field


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
        # In a list of numbers, such as an embedding, the first says what all are.
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
    if (says or ends_like_media(value)) and is_local and is_there(value, media_root):
        return f"the name of a file that is there, {value[:80]!r}"
    return None


def links_to_media(text: str, media_root: str | None) -> bool:
    """Whether Markdown or HTML in a text links to a media file that is there.

    Example:
        >>> links_to_media("![a valve](/no/such/file.png)", None)
        False
    """
    if not _ENDING.search(text):  # many pages link, few to media: the cheap look first
        return False
    for match in _LINK.finditer(text):
        target = match[match.lastindex or 0]
        if "://" in target:
            continue
        # A `srcset` may lead to several.
        for one in (target, *(part.split()[0] for part in target.split(",") if part.strip())):
            name = unquote(re.split(r"[?#]", one, maxsplit=1)[0])
            if ends_like_media(name) and is_there(name, media_root):
                return True
    return False


def is_there(name: str, media_root: str | None) -> bool:
    """Whether a name, also as Windows writes it, is that of a file that a row may name.

    Example:
        >>> is_there("no/such/file.png", None)
        False
    """
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
    return _sniffed(base64.b64decode(start)) if _BASE64.fullmatch(start) else None


_KINDS = (
    (rb"\x89PNG\r\n", "a PNG"),
    (rb"\xff\xd8\xff", "a JPEG"),
    (rb"GIF8", "a GIF"),
    (rb"II\*\0|MM\0\*", "a TIFF"),
    (rb"RIFF.{4}WEBP", "a WebP"),
    (rb"BM.{4}\0{4}", "a BMP"),
    (rb"\x1aE\xdf\xa3", "a video (Matroska or WebM)"),
    (rb"RIFF.{4}AVI ", "a video (AVI)"),
    (rb".{4}ftyp", "a video (MP4 or MOV)"),
)


def _sniffed(start: bytes) -> str | None:
    """The kind of a medium by its first bytes."""
    kinds = (kind for pattern, kind in _KINDS if re.match(pattern, start, re.DOTALL))
    return heif_kind(start) or next(kinds, None)
