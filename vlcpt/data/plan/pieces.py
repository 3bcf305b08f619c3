"""Who scans which piece of a source: this process, its workers, or other ranks through a folder."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

import numpy as np
import xxhash
from torch.utils.data import DataLoader, Dataset

from vlcpt.data.plan.ledger import Dropped
from vlcpt.data.plan.scan import BadRow, Scan
from vlcpt.data.rows.jsonl import FileState
from vlcpt.data.workers import Watched, Workers
from vlcpt.file_writes import Writing, remove, write_file

T = TypeVar("T")
logger = logging.getLogger(__name__)

RENEWED = 5.0  # seconds between two signs of life of a claim
ABANDONED = 60.0  # seconds without one after which it is free, as seen by the one who waits
LONG_AGO = 600.0  # and by the clocks, which differ from machine to machine
_DIGEST = 16  # bytes
_SUFFIXES = (".scan", ".claim", ".partial")
_STOP = "stop"
_WHAT = "what reading the data gave, for other processes and later starts"


class SharedWork:
    """The pieces in one folder, as one process sees them. A context: leaving it frees the claims.

    Where the folder cannot be written, the process does all pieces itself.

    Args:
        folder: Where claims and results are; made when needed, and free to be deleted at any time.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder, SharedWork(Path(folder)) as mine, SharedWork(Path(folder)) as other:
        ...     print(mine.claim(0), other.claim(0))
        ...     mine.put(0, b"result")
        ...     print(other.get(0))
        True False
        b'result'
    """  # noqa: E501

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_usable = True
        self._held: dict[int, Path] = {}
        self._watched: dict[int, tuple[int, float]] = {}  # a claim's time, and since when it has that
        self._left = threading.Event()
        self._heart: threading.Thread | None = None

    def __enter__(self) -> SharedWork:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        for number in list(self._held):
            self.release(number)

    def claim(self, number: int) -> bool:
        """Take a piece; False while another process is at it."""
        path = self._path(number, ".claim")
        try:
            with Writing(path, _WHAT):
                self._folder.mkdir(parents=True, exist_ok=True)
                if not _made(path, f"{socket.gethostname()} {os.getpid()}"):
                    if not self._is_abandoned(number, path):
                        return False
                    path.unlink(missing_ok=True)
                    if not _made(path, f"{socket.gethostname()} {os.getpid()}"):
                        return False
        except OSError as error:
            self._do_without(error)
            return True
        self._held[number] = path
        if self._heart is None:
            self._heart = threading.Thread(target=self._beat, daemon=True)
            self._heart.start()
        return True

    def release(self, number: int) -> None:
        """Leave a piece to whoever wants it."""
        if (path := self._held.pop(number, None)) is not None:
            remove(path)

    def put(self, number: int, result: bytes) -> None:
        """Store a piece's result, whole or not at all, and release the piece."""
        try:
            if self._is_usable:
                self._write(f"{number:05d}.scan", xxhash.xxh3_128_digest(result) + result)
        except OSError as error:
            self._do_without(error)
        finally:
            self.release(number)

    def get(self, number: int) -> bytes | None:
        """A piece's result; None where there is none, or a damaged one."""
        try:
            stored = self._path(number, ".scan").read_bytes()
        except OSError:
            return None
        result = stored[_DIGEST:]
        return result if xxhash.xxh3_128_digest(result) == stored[:_DIGEST] else None

    def stop_after(self, number: int) -> None:
        """Tell all that pieces past this one will not be needed."""
        self.release(number)
        known = self.last_wanted()
        if known is None or number < known:
            try:
                self._write(_STOP, str(number).encode())
            except OSError as error:
                self._do_without(error)

    def last_wanted(self) -> int | None:
        """The last piece that is needed, where someone has told; None: all are. A hint, no more."""
        try:
            return int((self._folder / _STOP).read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None

    def go_on(self) -> None:
        """Take back that pieces are not needed."""
        remove(self._folder / _STOP)

    def _path(self, number: int, suffix: str) -> Path:
        return self._folder / f"{number:05d}{suffix}"

    def _is_abandoned(self, number: int, path: Path) -> bool:
        """Whether nobody is at a piece any more that someone has claimed."""
        try:
            with path.open(encoding="utf-8") as file:  # opened: a network file system then looks again
                host, _, process = file.read().partition(" ")
                renewed = os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return True
        if host == socket.gethostname() and process.isdecimal() and not _runs(int(process)):
            return True
        if time.time() - renewed / 1e9 > LONG_AGO:
            return True
        now = time.monotonic()
        if self._watched.get(number, (0, 0.0))[0] != renewed:
            self._watched[number] = (renewed, now)
        return now - self._watched[number][1] > ABANDONED

    def _beat(self) -> None:
        while not self._left.wait(RENEWED):
            for path in list(self._held.values()):
                try:
                    os.utime(path)
                except OSError:
                    continue  # someone deleted it: another may do the piece as well

    def _do_without(self, error: OSError) -> None:
        if self._is_usable:
            logger.warning(
                "%s Until then nothing is lost, but each process and each start reads the data itself.", error
            )
        self._is_usable = False

    def _write(self, name: str, content: bytes) -> None:
        write_file(self._folder / name, content, _WHAT)


def remove_work(folder: Path) -> None:
    """Delete a folder of shared work, and nothing else that may be in it.

    Example:
        >>> remove_work(Path("no/such/folder"))
    """
    for path in [*folder.glob("*"), *folder.glob(".*")] if folder.is_dir() else []:
        if path.suffix in _SUFFIXES or path.name == _STOP:
            remove(path)
    try:
        folder.rmdir()
    except OSError:
        return  # not there, not empty, or another process has just put something there


def unused_for(folder: Path) -> float:
    """Seconds since anything was put into a folder, or claimed there."""
    try:
        return time.time() - folder.stat().st_mtime
    except OSError:
        return 0.0


def _made(path: Path, content: str) -> bool:
    """Whether this process made the file, and no other had."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
    except OSError:
        remove(path)  # or the others would wait for a process that nobody knows
        raise
    return True


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True


def scan_to_bytes(scan: Scan) -> bytes:
    """A scan as bytes, from which :func:`scan_from_bytes` makes an equal one.

    Args:
        scan: Without an error: what stops a run is found again, and never stored.
    """
    assert scan.error is None
    rest = {
        "rows": scan.rows,
        "marks": scan.marks,
        "dropped_tokens": scan.dropped_tokens,
        "unused": [[one.row, vars(one.dropped), one.message, one.is_bad, one.files] for one in scan.unused],
    }
    text = np.frombuffer(json.dumps(rest).encode(), dtype=np.uint8)
    file = BytesIO()
    np.savez_compressed(file, documents=scan.documents, parts=scan.parts, rest=text)
    return file.getvalue()


def scan_from_bytes(content: bytes) -> Scan:
    """The scan that :func:`scan_to_bytes` wrote.

    Example:
        >>> scan = Scan(np.ones((1, 12), np.int32), np.ones((1, 5), np.int32), rows=1)
        >>> scan_from_bytes(scan_to_bytes(scan)).rows
        1
    """
    with np.load(BytesIO(content), allow_pickle=False) as stored:
        rest = json.loads(stored["rest"].tobytes())
        return Scan(
            documents=stored["documents"],
            parts=stored["parts"],
            rows=rest["rows"],
            marks=Counter(rest["marks"]),
            dropped_tokens=Counter(rest["dropped_tokens"]),
            unused=[
                BadRow(row, Dropped(**dropped), message, is_bad, tuple(FileState(*file) for file in files))
                for row, dropped, message, is_bad, files in rest["unused"]
            ],
        )


WORTH_WORKERS = 1.0  # seconds of reading; to start workers takes a part of one
_LOOKS = (0.05, 1.0)  # seconds between two looks at what other processes do, at first and at last


class Scanner(Protocol):
    """Reads the pieces of a source by number, in any process."""

    def __len__(self) -> int: ...

    def __getitem__(self, piece: int) -> Scan: ...

    @property
    def watched(self) -> Watched:
        """Which row each worker is at."""
        ...

    def holds(self, scan: Scan) -> bool:
        """Whether a scan that was stored is still true."""
        ...


class OrderedScans:
    """The scans of a source's pieces, in order: the same whatever the number of processes. A context.

    Args:
        scanner: Reads a piece.
        num_proc: Workers to read with, where enough is left to read; 0: none.
        folder: Where processes share the work, and results stay; None: this process reads all.
        timeout: Seconds in which a worker must read another row; 0: any time.
    """

    def __init__(
        self, scanner: Scanner, num_proc: int, folder: Path | None = None, timeout: float = 0
    ) -> None:
        self._scanner = scanner
        self._num_proc = num_proc
        self._timeout = timeout
        self._work = None if folder is None else SharedWork(folder)
        self._found: dict[int, Scan] = {}
        self._first = 0  # the first piece that is still wanted

    def __enter__(self) -> OrderedScans:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._work is not None:
            self._work.__exit__(kind, error, trace)

    def __len__(self) -> int:
        return len(self._scanner)

    def __iter__(self) -> Iterator[Scan]:
        own = self._own()
        pause, longest = _LOOKS
        for number in range(len(self)):
            self._first = number
            while not self._is_found(number):
                if next(own, None) is not None:
                    pause = _LOOKS[0]
                elif self._is_open(number):
                    self._enter(number, self._scanner[number])
                    own = self._own()  # more may be free than the last look saw
                else:
                    time.sleep(pause)
                    pause = min(1.5 * pause, longest)
            yield self._found.pop(number)

    def _is_found(self, number: int) -> bool:
        """Whether a scan is here, or another process has stored it since."""
        if number not in self._found and self._work is not None:
            stored = self._work.get(number)
            scan = None if stored is None else scan_from_bytes(stored)
            # Media that did not fail are not looked at.
            if scan is not None and self._scanner.holds(scan):
                self._found[number] = scan
        return number in self._found

    def _is_open(self, number: int) -> bool:
        """Whether this process has to read a piece that it waits for."""
        if self._work is None or self._work.last_wanted() == number:
            return True  # what stops one process stops each: nobody stores it
        return self._claimed(number)

    def _claimed(self, number: int) -> bool:
        """Claim a piece, unless another process is at it or has just finished it."""
        assert self._work is not None
        if not self._work.claim(number):
            return False
        if self._is_found(number):
            self._work.release(number)
            return False
        return True

    def _free(self) -> Iterator[int]:
        """The pieces that nobody has read or is reading, claimed one by one as they are asked for."""
        for number in range(self._first, len(self)):
            if self._work is None:
                yield number
                continue
            last = self._work.last_wanted()
            if last is not None and number > last:
                return
            if not self._is_found(number) and self._claimed(number):
                yield number

    def _own(self) -> Iterator[int]:
        """Read free pieces: here, and with workers once they are worth their start."""
        free = self._free()
        start = time.perf_counter()
        for number in free:
            self._enter(number, self._scanner[number])
            yield number
            left = (time.perf_counter() - start) * (len(self) - number - 1)
            if self._num_proc and left > WORTH_WORKERS:
                break
            start = time.perf_counter()
        else:
            return
        pieces = DataLoader(
            _Numbered(self._scanner),
            batch_size=None,
            sampler=free,
            collate_fn=_unchanged,
            num_workers=self._num_proc,
            # No more pieces are claimed than are being read, and none waits for a slower one.
            prefetch_factor=1,
            in_order=False,
        )
        # A piece may take longer than a batch of a run, but no row of it.
        with Workers(self._timeout, lambda: [self._scanner.watched], while_still=True) as workers:
            for number, scan in workers.batches(pieces):
                self._enter(number, scan)
                yield number

    def _enter(self, number: int, scan: Scan) -> None:
        self._found[number] = scan
        if self._work is None:
            return
        if scan.error is not None:
            self._work.stop_after(number)
            return
        self._work.put(number, scan_to_bytes(scan))
        if self._work.last_wanted() == number:
            self._work.go_on()  # what was wrong there has been put right


class _Numbered(Dataset[tuple[int, Scan]]):
    """Pieces with their number, for workers finish them in any order."""

    def __init__(self, scanner: Scanner) -> None:
        self._scanner = scanner

    def __getitem__(self, number: int) -> tuple[int, Scan]:
        return number, self._scanner[number]


def _unchanged(scan: T) -> T:
    """In place of the default, which would make tensors of the arrays."""
    return scan
