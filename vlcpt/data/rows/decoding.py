"""Bytes of a file as text: compressed files unpacked once, other encodings named with what converts them."""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import uuid
from collections.abc import Callable
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

    The copy is made once for each state of the file, and is there whole or not at all.

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
_ENOUGH = 0.6  # of the pairs of bytes in the common part of an encoding; others have a third there
_MARKS = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


def text_of(data: bytes, file: str) -> str:
    """A text from UTF-8, with or without a mark at its start.

    Args:
        data: The bytes.
        file: The file's name, for the command that converts it.

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
        raise not_utf8(data, error.start, file) from None


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
    for name in ("UTF-16LE", "UTF-16BE"):
        if _is_chinese(data[: len(data) // 2 * 2], name):
            return name
    high = [place for place, byte in enumerate(data) if byte >= 0x80]
    if not high:
        return None
    # A letter with an accent stands among plain ones; half of a Chinese character does not.
    is_high = [False, *(byte >= 0x80 for byte in data), False]
    lone = sum(not is_high[place] and not is_high[place + 2] for place in high)
    shares = {name: _share(data, lead, trail) for name, (lead, trail) in _COMMON.items()}
    best = max(shares, key=lambda name: shares[name])
    if shares[best] >= _ENOUGH and lone < 0.7 * len(high):
        return _east_asian(data) if best == "GBK" else best
    if lone >= 0.5 * len(high):
        return "WINDOWS-1252" if any(0x80 <= data[place] < 0xA0 for place in high) else "ISO-8859-1"
    return None


_Test = Callable[[int], bool]
# Of each encoding the first and the second byte of what its common characters have.
_COMMON: dict[str, tuple[_Test, _Test]] = {
    "GBK": (lambda lead: 0xB0 <= lead <= 0xD7 or 0xA1 <= lead <= 0xA5, lambda trail: 0xA1 <= trail <= 0xFE),
    "BIG5": (
        lambda lead: 0xA1 <= lead <= 0xC6,
        lambda trail: 0x40 <= trail <= 0x7E or 0xA1 <= trail <= 0xFE,
    ),
    "SHIFT_JIS": (
        lambda lead: 0x81 <= lead <= 0x83 or 0x88 <= lead <= 0x97,
        lambda trail: 0x40 <= trail <= 0xFC and trail != 0x7F,
    ),
}


def _share(data: bytes, is_lead: _Test, is_trail: _Test) -> float:
    """Which part of the pairs of bytes is of the common ones."""
    place, pairs, common = 0, 0, 0
    while place < len(data) - 1:
        if data[place] < 0x80:
            place += 1
            continue
        pairs += 1
        common += is_lead(data[place]) and is_trail(data[place + 1])
        place += 2
    return common / pairs if pairs else 0.0


def _east_asian(data: bytes) -> str:
    """GBK, or one of two encodings that have the same bytes, where most of them are kana or hangul."""
    leads, place = [], 0
    while place < len(data) - 1:
        if data[place] >= 0x80:
            leads.append(data[place])
            place += 1
        place += 1
    kana = sum(lead in (0xA4, 0xA5) for lead in leads)
    hangul = sum(0xB0 <= lead <= 0xC8 for lead in leads)
    if kana > 0.3 * len(leads):
        return "EUC-JP"
    if len(leads) >= 20 and hangul > 0.97 * sum(lead >= 0xB0 for lead in leads):
        return "EUC-KR"
    return "GBK"


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


_FIRST_LEVEL = {bytes([lead]) for lead in (*range(0xA1, 0xA4), *range(0xB0, 0xD8))}


def _is_chinese(data: bytes, encoding: str) -> bool:
    """Whether bytes are UTF-16 of Chinese, which has hardly a zero byte."""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return False
    # The first level of GB 2312 is what Chinese is written with; of all Chinese characters it is a sixth.
    common = sum(char.encode("gb2312", "ignore")[:1] in _FIRST_LEVEL for char in text)
    return len(text) >= 4 and common >= 0.6 * len(text)


def _error(found: str, name: str, file: str) -> DocumentError:
    path = Path(file)
    inner = path.with_name(inner_name(path.name))
    first = "" if inner == path else "unpack it, "
    old, new = shlex.quote(str(inner)), shlex.quote(str(inner.with_name(f"{inner.stem}.utf8{inner.suffix}")))
    return DocumentError(
        f"{found}: convert to UTF-8, {first}iconv -f {name} -t UTF-8 {old} > {new} && mv {new} {old}.",
        kind="encoding",
    )
