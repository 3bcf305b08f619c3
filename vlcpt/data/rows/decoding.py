"""Bytes of a file as text: compressed files unpacked once, other encodings named with what converts them."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shlex
import uuid
from functools import cache
from pathlib import Path

from vlcpt.data.documents import DocumentError
from vlcpt.file_writes import WriteError, Writing, human_size, remove

logger = logging.getLogger(__name__)

_CODECS = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_CHUNK = 1 << 22


def inner_name(name: str) -> str:
    """The name of what is inside a compressed file; any other name as it is.

    Example:
        >>> inner_name("train.jsonl.gz"), inner_name("0001.tgz"), inner_name("a.jsonl")
        ('train.jsonl', '0001.tar', 'a.jsonl')
    """
    stem, suffix = os.path.splitext(name)
    if suffix.lower() == ".tgz":
        return stem + ".tar"
    return stem if suffix.lower() in _CODECS else name


def unpacked(path: Path) -> Path:
    """A file without compression: itself, or a copy in the cache of Hugging Face ``datasets``.

    The copy is made once for each state of the file, and is there completely or not at all.

    Args:
        path: A file; ``.gz``, ``.tgz``, ``.zst`` and ``.zstd`` are unpacked.

    Raises:
        DocumentError: If the file is damaged or cut short.
        WriteError: If there is no room for the copy, or its place cannot be written.

    Example:
        >>> unpacked(Path("a.jsonl"))
        PosixPath('a.jsonl')
    """
    codec = _CODECS.get(path.suffix.lower())
    if codec is None:
        return path
    import datasets
    import pyarrow as pa

    state = path.stat()
    key = f"{path.resolve()}:{state.st_size}:{state.st_mtime_ns}"
    name = f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:24]}-{inner_name(path.name)}"
    copy = Path(datasets.config.HF_DATASETS_CACHE) / "vlcpt" / name
    if copy.exists():
        return copy
    logger.info("%s: unpacked once to %s", path, copy)
    # Each process writes a file of its own, and the last one to rename wins with equal content.
    partial = copy.with_name(f".{uuid.uuid4().hex}.partial")
    done = 0
    try:
        with _writing(copy, path, done):
            copy.parent.mkdir(parents=True, exist_ok=True)
            file = partial.open("wb")
        # Arrow itself opens no file whose name is not UTF-8.
        with file, path.open("rb") as packed, pa.CompressedInputStream(packed, codec) as stream:
            while chunk := stream.read(_CHUNK):
                done += len(chunk)
                with _writing(copy, path, done):
                    file.write(chunk)
            with _writing(copy, path, done):
                file.flush()
                os.fsync(file.fileno())
                partial.replace(copy)
    except WriteError:
        raise
    except OSError as error:
        raise DocumentError(
            f"cannot be unpacked as {codec}: {error}. It is damaged or cut short.",
            kind="source",
            field=str(path),
        ) from None
    finally:
        remove(partial)
    return copy


def _writing(copy: Path, path: Path, done: int) -> Writing:
    what = f"an unpacked copy of {path.name}, of more than {human_size(done)}"
    return Writing(copy, what, todo="HF_DATASETS_CACHE names the folder of such copies.")


BOM = b"\xef\xbb\xbf"
_LOOKED_AT = 1 << 16  # bytes
_MARKS = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


def text_of(data: bytes, file: str, around: bytes = b"") -> str:
    """A text from UTF-8, with or without a mark at its start.

    Args:
        data: The bytes.
        file: The file's name, for the command that converts it.
        around: The same with what stands around it: a word is not enough to tell encodings apart.

    Raises:
        DocumentError: That names the encoding that the bytes look like.

    Example:
        >>> text_of("阀门".encode(), "a.txt")
        '阀门'
        >>> text_of("这是一个阀门。".encode("gbk"), "a.txt")
        Traceback (most recent call last):
        vlcpt.data.documents.DocumentError: byte 0 is not UTF-8, it looks like GBK: convert to UTF-8, iconv -f GBK -t UTF-8 a.txt > a.utf8.txt && mv a.utf8.txt a.txt.
    """  # noqa: E501
    check_wide(data, file)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(around or data, error.start, file) from None


def check_wide(data: bytes, file: str) -> None:
    """Raise for UTF-16 and UTF-32: between their zero bytes ASCII looks like UTF-8, and trains as noise.

    Args:
        data: The bytes, or the first ones.
        file: The file's name.

    Example:
        >>> check_wide(b"A valve.", "a.txt")
    """
    found = _wide(data[:_LOOKED_AT])
    if found is not None:
        raise _error(f"it looks like {found}", found, file)


def not_utf8(data: bytes, place: int, file: str) -> DocumentError:
    """The error about bytes that are not UTF-8.

    Args:
        data: The bytes, as many as there are: a word is not enough to tell encodings apart.
        place: The first byte that is none.
        file: The file's name.
    """
    found = looks_like(data)
    if found is None:
        return DocumentError(
            f"byte {place:,} is not UTF-8: convert to UTF-8, or write it again if it is damaged.",
            kind="encoding",
        )
    return _error(f"byte {place:,} is not UTF-8, it looks like {found}", found, file)


def looks_like(data: bytes) -> str | None:
    """The encoding that bytes look like, as ``iconv`` names it; None if they are like none that is known.

    Example:
        >>> looks_like("这是一个阀门。".encode("gbk")), looks_like("Café".encode("latin-1"))
        ('GBK', 'ISO-8859-1')
    """
    data = data[:_LOOKED_AT]
    if (wide := _wide(data)) is not None:
        return wide
    # A letter with an accent stands among plain ones; half of a Chinese character does not.
    high = [len(run) for run in re.findall(rb"[\x80-\xff]+", data)]
    lone = high.count(1) / sum(high) if high else 0
    for known in _COMMON:
        if (lone < 0.7 or known[0].startswith("UTF")) and _is_like(data, *known):
            return known[0]
    if lone >= 0.5:
        return "WINDOWS-1252" if re.search(rb"[\x80-\x9f]", data) else "ISO-8859-1"
    return None


_CHINESE = (*range(0xA1, 0xA4), *range(0xB0, 0xD8))
# Each encoding with the codec and first byte of the characters that are common in it (Chinese of the first
# level, kana, hangul), and how large a part of a text they are at least, in how many characters.
_COMMON: tuple[tuple[str, str, tuple[int, ...], float, int], ...] = (
    ("UTF-16LE", "gb2312", _CHINESE, 0.6, 4),
    ("UTF-16BE", "gb2312", _CHINESE, 0.6, 4),
    ("EUC-JP", "euc_jp", (0xA4, 0xA5), 0.3, 1),
    ("SHIFT_JIS", "euc_jp", (0xA4, 0xA5), 0.3, 1),
    ("EUC-KR", "euc_kr", tuple(range(0xB0, 0xC9)), 0.97, 20),
    ("GBK", "gb2312", _CHINESE, 0.6, 1),
    ("BIG5", "big5", tuple(range(0xA1, 0xC7)), 0.6, 1),
)


@cache
def _characters(codec: str, leads: tuple[int, ...]) -> frozenset[str]:
    pairs = (bytes((lead, trail)) for lead in leads for trail in range(0x40, 0xFF))
    return frozenset("".join(pair.decode(codec, "ignore") for pair in pairs))


def _is_like(
    data: bytes, encoding: str, codec: str, leads: tuple[int, ...], share: float, least: int
) -> bool:
    text = [char for char in data.decode(encoding, "replace") if not char.isascii()]
    common = sum(char in _characters(codec, leads) for char in text)
    return len(text) >= least and common >= share * len(text)


def _wide(data: bytes) -> str | None:
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name
    pairs = len(data) // 2
    # Of one letter nothing is known; a NUL here and there is damage.
    if pairs < 2:
        return None
    first, second = data[0 : 2 * pairs : 2].count(0), data[1 : 2 * pairs : 2].count(0)
    low, high = min(first, second), max(first, second)
    if high >= 0.1 * pairs and low <= 0.25 * high:  # some characters end with a zero byte as well
        return "UTF-16LE" if second > first else "UTF-16BE"
    return None


def _error(found: str, name: str, file: str) -> DocumentError:
    path = Path(file)
    inner = path.with_name(inner_name(path.name))
    first = "" if inner == path else "unpack it, "
    old, new = shlex.quote(str(inner)), shlex.quote(str(inner.with_name(f"{inner.stem}.utf8{inner.suffix}")))
    return DocumentError(
        f"{found}: convert to UTF-8, {first}iconv -f {name} -t UTF-8 {old} > {new} && mv {new} {old}.",
        kind="encoding",
    )
