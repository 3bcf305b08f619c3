"""Numbered pieces of work that processes share through a folder, on one machine or many.

Each piece is claimed by a file that nobody else can make, and its result is put beside it. No process
waits in a collective, so none can run into its timeout; a process that dies leaves its pieces to the
others; and one that starts again finds what was finished. Two that do the same piece after all, which a
slow file system cannot always prevent, do no harm: results depend on nothing but their number.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType

import xxhash

from vlcpt.file_writes import Writing, remove, write_file

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
