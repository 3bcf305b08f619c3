"""Compressed files, unpacked once: rows are read in any order, which a compressed file does not allow."""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
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
