"""What reading a source gave, kept in a file for other processes, under all that it depends on."""

from __future__ import annotations

import json
import logging
import mmap
import re
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import xxhash

from vlcpt import __version__
from vlcpt.data.encode.encoder import DocumentEncoder
from vlcpt.data.plan.ledger import Dropped
from vlcpt.data.plan.scan import LINE, BadRow, Reading, Scan, SourceScanner, joined
from vlcpt.data.rows.base import FileState
from vlcpt.data.sources import DocumentSource
from vlcpt.errors import ConfigError
from vlcpt.file_writes import WriteError, remove, write_file
from vlcpt.folder_locks import LOCK, hold

logger = logging.getLogger(__name__)

# Their releases may count tokens, or find a file broken, in another way.
_COUNTING = ("transformers", "tokenizers", "qwen-vl-utils", "pillow", "av")
_FILE = re.compile(r"[0-9a-f]{32}\.scan")
_LENGTH, _DIGEST = 8, 16  # bytes
_UNKEPT = "%s Until then each process and each start reads the data itself."
LONG_AGO = 600.0  # seconds after which a file that no source asks for goes; clocks of machines differ


def scan_file(
    folder: Path, source: DocumentSource, encoder: DocumentEncoder, reading: Reading
) -> Path | None:
    """The file of a source's scan; None for a source that nothing tells the state of.

    Args:
        folder: That of one data set.
        source: The source, as it is now.
        encoder, reading: What the scan depends on besides the rows.

    Example:
        >>> from vlcpt import load_processor
        >>> from vlcpt.data.rows.open import SourceConfig
        >>> from vlcpt.data.sources import open_source
        >>> from vlcpt.demo import base_path
        >>> encoder = DocumentEncoder(load_processor(base_path()))
        >>> source = open_source(SourceConfig("rows"), [{"text": "in memory"}])
        >>> scan_file(Path("plan"), source, encoder, Reading(64)) is None
        True
    """
    if (state := source_key(source)) is None:
        return None
    processor = encoder.processor
    key = _key_of(
        state,
        (reading.max_length, reading.on_overlong, reading.on_bad_data),
        LINE.descr,
        __version__,
        [version(name) for name in _COUNTING],
        processor.tokenizer.backend_tokenizer.to_str(),
        [
            (type(one).__name__, one.to_json_string())
            for one in (processor.image_processor, processor.video_processor)
        ],
        asdict(encoder.options),
    )
    return folder / f"{key}.scan"


def source_key(source: DocumentSource) -> str | None:
    """What a source's documents depend on; None where nothing tells whether they changed.

    Files are known by path, size and time, ``datasets`` by the fingerprint they carry. Of the media that
    rows name, nothing is known: there may be millions.

    Example:
        >>> from vlcpt.data.rows.open import SourceConfig
        >>> from vlcpt.data.sources import open_source
        >>> source_key(open_source(SourceConfig("rows"), [{"text": "in memory"}])) is None
        True
    """
    if (state := source.state()) is None:
        return None
    ignored = sorted(source.unread.ignored)
    return _key_of(state, len(source), source.reading, source.media_root, ignored, source.max_row_bytes)


def _key_of(*parts: object) -> str:
    """32 hexadecimal digits that stand for plain values."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


def scanned(scanner: SourceScanner, pieces: Iterable[Scan], path: Path | None) -> Scan:
    """What reading a source gave: from its file, or read now by one process, while others wait for the file.

    A process that ends while it reads, however that happens, leaves no file, and the next one reads. Where
    the folder cannot be written, each process reads for itself.

    Args:
        scanner: Says whether a stored scan still holds.
        pieces: Those of the scanner, read as they are asked for.
        path: That of the file; None: it is not kept.
    """
    if path is None:
        return joined(pieces)
    if (found := _load(path, scanner)) is not None:
        return found
    # What reading itself raises is the run's error: the pieces cannot be read a second time.
    with ExitStack() as stack:
        try:
            stack.enter_context(hold(path.parent, waits=True))
        except (ConfigError, WriteError) as error:
            logger.warning(_UNKEPT, error)
            return joined(pieces)
        if (found := _load(path, scanner)) is not None:  # another process has read it in the meantime
            return found
        found = joined(pieces)
        try:
            _save(path, found)
        except WriteError as error:
            logger.warning(_UNKEPT, error)
            return found
        return _load(path, scanner) or found  # mapped: other processes have the same memory


def _save(path: Path, scan: Scan) -> None:
    """Write a scan: its lines, the rest as JSON and the size of that, and a hash of all."""
    about = {
        "rows": scan.rows,
        "marks": scan.marks,
        "dropped_tokens": scan.dropped_tokens,
        "unused": [[one.row, vars(one.dropped), one.message, one.is_bad, one.files] for one in scan.unused],
    }
    text = json.dumps(about).encode()
    content: list[bytes | memoryview] = [scan.lines.view(np.uint8).data, text, len(text).to_bytes(_LENGTH)]
    digest = xxhash.xxh3_128()
    for part in content:
        digest.update(part)
    write_file(path, [*content, digest.digest()], "what reading the data gave, for other processes")


def _load(path: Path, scanner: SourceScanner) -> Scan | None:
    """A stored scan, its lines mapped into memory; None where none is sound and still true."""
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # not there, or empty
        return None
    if xxhash.xxh3_128_digest(memoryview(content)[:-_DIGEST]) != content[-_DIGEST:]:
        return None
    end = len(content) - _DIGEST - _LENGTH
    start = end - int.from_bytes(content[end : end + _LENGTH])
    about = json.loads(content[start:end])
    unused = [
        BadRow(row, Dropped(**dropped), message, is_bad, tuple(FileState(*file) for file in files))
        for row, dropped, message, is_bad, files in about["unused"]
    ]
    scan = Scan(
        rows=about["rows"],
        lines=np.frombuffer(content, LINE, start // LINE.itemsize),
        marks=Counter(about["marks"]),
        dropped_tokens=Counter(about["dropped_tokens"]),
        unused=unused,
    )
    return scan if scanner.holds(scan) else None


def remove_old(folder: Path, used: Iterable[Path | None]) -> None:
    """Delete the scans of other states of the data, but for such as another machine may be writing."""
    for path in set(folder.glob("*.scan")) - {*used}:
        try:
            is_old = time.time() - path.stat().st_mtime > LONG_AGO
        except OSError:  # another process has just deleted it
            continue
        if is_old and _FILE.fullmatch(path.name):
            remove(path)


def remove_plans(path: Path) -> None:
    """Delete the plans in a folder and in its folders, and nothing else that may be there.

    Example:
        >>> remove_plans(Path("no/such/folder"))
    """
    for folder in [*path.glob("*/"), path]:
        found = [*folder.glob("*"), *folder.glob(".*")] if folder.is_dir() else []
        for file in found:
            if _FILE.fullmatch(file.name) or file.suffix == ".partial" or file.name == LOCK:
                remove(file)
        try:
            folder.rmdir()
        except OSError:  # it is not there, or something else is in it
            continue
