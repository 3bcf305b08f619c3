"""Files of media: their names, their kinds by the first bytes, and whether a value of a row is one."""

from __future__ import annotations

import base64
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

from vlcpt.data.documents import Document, Image, Video
from vlcpt.data.rows.fields import is_given

# HEIC and AVIF are not read, but whoever has them has pictures all the same: opening one says what it is.
IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "tif", "tiff"),
    *("heic", "heif", "avif"),
)
VIDEO_SUFFIXES = ("mp4", "m4v", "mov", "webm", "mkv", "avi")
MEDIA_SUFFIXES = frozenset((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))

# What files that are not read are called, where their suffix says less; counted by files.
BESIDE = "media files beside the rows"
LONE_MEDIA = "pictures and videos without a text"
LONE_TEXTS = "texts without a picture or video"
UNNAMED = "media files that no row names"
_MOST_BESIDE = 10_000  # entries of a folder, and of those in it
_MOST_BELOW = 3  # as images/train/000/
_MOST_FILES, _MOST_READ = 20, 2**16  # files of rows, and bytes of each, that are looked at for media


def is_media_name(name: str) -> bool:
    """Whether a path or URL ends like an image or a video, those included that have to be converted first.

    Example:
        >>> is_media_name("a.JPG"), is_media_name("a.heic"), is_media_name("a.txt"), is_media_name(".jpg")
        (True, True, False, False)
    """
    if "://" in name[:20]:
        name = name.partition("?")[0].partition("#")[0]
        if name.count("/") < 3:  # a host alone
            return False
    stem, point, suffix = name[-7:].rpartition(".")
    # `img_ext: ".jpg"` is a suffix and no name.
    return point == "." and suffix.lower() in MEDIA_SUFFIXES and stem[-1:] not in ("", "/", "\\")


def is_video_name(name: str) -> bool:
    """Whether a file's name ends like a video.

    Example:
        >>> is_video_name("a.MP4"), is_video_name("a.gif")
        (True, False)
    """
    return name.rpartition(".")[2].lower() in VIDEO_SUFFIXES


def media_beside(media_root: str) -> int:
    """How many media files are in a folder and in some folders below; few looks, however large it is.

    Example:
        >>> media_beside("/no/such/folder")
        0
    """
    found, looked = 0, 0
    folders = [(media_root, 0)]
    for folder, below in folders:
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    looked += 1
                    if looked > _MOST_BESIDE:
                        return found
                    if entry.name.startswith("."):
                        continue
                    if below < _MOST_BELOW and entry.is_dir(follow_symlinks=False):
                        folders.append((entry.path, below + 1))
                    found += is_media_name(entry.name)
        except OSError:
            continue
    return found


def is_media_of_others(rows: Path, media_root: str) -> bool:
    """Whether media beside a file of rows are those of another one: first rows of a .jsonl there have some.

    Args:
        rows: The file.
        media_root: Folder of the media.

    Example:
        >>> is_media_of_others(Path("/no/such/folder/a.jsonl"), "/no/such/folder")
        False
    """
    try:
        # A name of a pipe would wait for ever.
        others = [
            file for file in sorted(rows.parent.glob("*.jsonl")) if file.name != rows.name and file.is_file()
        ]
    except OSError:
        return False
    return any(_has_media(file, media_root) for file in others[:_MOST_FILES])


def _has_media(file: Path, media_root: str) -> bool:
    try:
        with file.open("rb") as opened:
            lines = opened.read(_MOST_READ).splitlines()
    except OSError:
        return False
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # the last one is cut
            continue
        if isinstance(row, dict) and any(medium_in(value, name, media_root) for name, value in row.items()):
            return True
    return False


def suffixes_of(files: Iterable[Path]) -> Mapping[str, int]:
    """Files that are not read, counted by their suffixes, as :func:`list_unread` shows them.

    Example:
        >>> suffixes_of([Path("a_stats.json"), Path("b.JSON"), Path("LICENSE")])
        {'.json': 2, '. (no suffix)': 1}
    """
    return dict(Counter(file.suffix.lower() or ". (no suffix)" for file in files))


def shown_url(url: str) -> str:
    """A URL for a message: without user, password, query and fragment, where secrets are, and not endless.

    Example:
        >>> shown_url("https://me:secret@example.org/a.png?signature=secret")
        'https://example.org/a.png?…'
    """
    bare = re.sub(r"(?<=://)[^/?#]*@", "", url)
    bare = re.sub(r"[?#].*", "?…", bare, flags=re.DOTALL)
    return bare if len(bare) <= 200 else bare[:200] + "…"


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", re.IGNORECASE)


class MediaError(ValueError):
    """A medium that cannot be used: what was found and what to do. The caller adds file, line and field."""


def media_folder(document: Document) -> Path | None:
    """The folder that the media paths of a document start from, as :func:`resolve` takes it."""
    return None if document.media_root is None else Path(document.media_root)


def resolve(path: str, media_root: Path | None) -> Path:
    """The real path of a regular file that the row may name.

    Args:
        path: As the row has it: relative to ``media_root``, absolute, or a ``file:`` URI.
        media_root: The folder that the file's real path must lie in, after ``..`` and links.
            None trusts the caller: any file, relative paths from the current folder.

    Raises:
        MediaError: If it is a URL, lies outside, is missing, or is no regular file.

    Example:
        >>> resolve("files.py", Path(__file__).parent).name
        'files.py'
    """
    shown = repr(path if len(path) <= 200 else path[:200] + "…")
    local = path
    if path[:5].lower() == "file:":
        local = re.sub("^//(?:localhost)?(?=/)", "", unquote(path[5:]), flags=re.IGNORECASE)
        if local.startswith("//"):
            raise MediaError(f"{shown} names another machine. Write file:///folder/name, or a plain path.")
    elif _URL.match(path):
        raise MediaError(f"{shown_url(path)!r} is a URL, and nothing is fetched. Download it, give its path.")
    folder = str(media_root or Path())  # as written: messages reach files, absolute paths are private
    try:
        root = os.path.realpath(folder)
        real = os.path.realpath(os.path.join(root, local))
        inside = media_root is None or os.path.commonpath([root, real]) == root
        mode = os.stat(real).st_mode if inside else 0
    except FileNotFoundError:
        todo = "Correct the path, or set media_root to the folder that paths are relative to."
        raise MediaError(f"{shown} does not exist in {folder!r}. {todo}") from None
    except OSError as error:
        raise MediaError(f"{shown} cannot be opened: {error.strerror}. Correct the path.") from None
    except ValueError as error:  # a NUL, or half a surrogate pair
        raise MediaError(f"{shown} is not a path: {error}. Correct it.") from None
    if not inside:
        raise MediaError(
            f"{shown} lies outside the media_root {folder!r} (from there, {os.path.relpath(real, root)!r}). "
            "Move the file there, or set media_root to a folder that holds it."
        )
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise MediaError(f"{shown} is {kind}, not a regular file. Name a file.")
    return Path(real)


# Major brands of HEIF's family. MP4 and MOV have others (isom, mp42, qt), whatever they are compatible with.
_AVIF = frozenset((b"avif", b"avis"))
_ANY_CODEC = frozenset((b"mif1", b"mif2", b"msf1"))  # brands that they are compatible with say which
_HEIC = _ANY_CODEC.union(b"heic heix heim heis heif avci hevc hevx hevm hevs avcs".split())


def heif_kind(start: bytes) -> str | None:
    """``"HEIC"`` or ``"AVIF"`` by the first bytes of a file, whatever its name says; None: neither.

    Args:
        start: The file's first bytes; 64 are enough.

    Example:
        >>> heif_kind(b"\\0\\0\\0\\x18ftypmif1\\0\\0\\0\\0mif1avif")
        'AVIF'
        >>> heif_kind(b"\\0\\0\\0\\x14ftypisom\\0\\0\\0\\0heic")
    """
    brand = start[8:12] if start[4:8] == b"ftyp" else b""
    size = min(int.from_bytes(start[:4], "big"), len(start)) if brand in _ANY_CODEC else 0
    compatible = {start[place : place + 4] for place in range(16, size - 3, 4)}
    if _AVIF & {brand, *compatible}:
        return "AVIF"
    return "HEIC" if brand in _HEIC else None


def may_be_media(value: object) -> bool:
    """Whether a field's value may be one of media: a number counts them, and false says that there is none.

    Example:
        >>> may_be_media("a.png"), may_be_media(False), may_be_media(3), may_be_media({"path": None})
        (True, False, False, True)
    """
    # Equality is of no use for arrays.
    return not (value is None or isinstance(value, int | float) or (isinstance(value, str) and not value))


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
    if says and is_media_name(value) and not _IS_TEXT.search(name):
        return f"the name {value[:80]!r}"
    is_local = "://" not in value or value[:5].lower() == "file:"
    if (says or is_media_name(value)) and is_local and is_there(value, media_root):
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
            if is_media_name(name) and is_there(name, media_root):
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
