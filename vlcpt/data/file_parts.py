"""Bytes of a file by their place: the ground that the walks over containers stand on."""

from __future__ import annotations

import os
from typing import BinaryIO

MAX_PARTS = 1_000_000
_CHUNK = 1 << 16


class BrokenFileError(Exception):
    """What is wrong with a file, without its name."""


class FileParts:
    """An open file that says which of its parts is missing.

    Args:
        file: Open for reading, and able to seek.

    Example:
        >>> from io import BytesIO
        >>> FileParts(BytesIO(b"abc")).read(1, 4, "the header")
        Traceback (most recent call last):
        ...
        vlcpt.data.file_parts.BrokenFileError: it ends after 3 bytes, inside the header
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = file.seek(0, os.SEEK_END)
        self._parts = 0

    def read(self, start: int, count: int, what: str) -> bytes:
        """Exactly ``count`` bytes from ``start``, which belong to ``what``."""
        self.need(start + count, what)
        self._file.seek(start)
        return self._file.read(count)

    def need(self, stop: int, what: str) -> None:
        """Raise if the file ends before byte ``stop``, the end of ``what``."""
        if stop > self.size:
            raise BrokenFileError(f"it ends after {self.size:,} bytes, inside {what}")

    def part(self) -> None:
        """Count one more part, so that no file keeps a walk busy for long."""
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise BrokenFileError(f"it has over {MAX_PARTS:,} parts")

    def find(self, wanted: bytes, start: int) -> int:
        """The first place of two or fewer bytes at or after ``start``; -1 if there is none."""
        while start < self.size:
            self._file.seek(start)
            chunk = self._file.read(_CHUNK + len(wanted) - 1)
            if (found := chunk.find(wanted)) >= 0:
                return start + found
            start += _CHUNK
        return -1

    def has_after(self, wanted: bytes, start: int) -> bool:
        """Whether ``wanted`` occurs at or after ``start``; looked for from the end, where it mostly is."""
        stop = self.size
        while stop > start:
            begin = max(start, stop - _CHUNK)
            self._file.seek(begin)
            if wanted in self._file.read(min(stop + len(wanted) - 1, self.size) - begin):
                return True
            stop = begin
        return False
