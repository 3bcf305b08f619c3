"""Integers of a million documents in columns, each in as little memory as its numbers need."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

_AT_ONCE = 1 << 16  # lines
_KINDS = ("B", "H", "i")  # of one, two and four bytes


class Columns:
    """Lines of named 32-bit integers, to which more can be added.

    A column with one number throughout takes no memory, any other one, two or four bytes a line. Workers
    share it with the process that they were forked from.

    Args:
        names: Of the columns.

    Example:
        >>> columns = Columns(["row", "images"])
        >>> columns.extend({"row": np.arange(3), "images": np.zeros(3, np.int32)})
        >>> len(columns), columns["row"], columns.line(2)
        (3, array([0, 1, 2]), {'row': 2, 'images': 0})
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._columns = {name: _Column() for name in names}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def extend(self, lines: Mapping[str, np.ndarray]) -> None:
        """Add lines: of each column as many integers."""
        added = {len(lines[name]) for name in self._columns}
        if len(added) != 1:
            raise ValueError(f"columns of different lengths: {sorted(added)}")
        for name, column in self._columns.items():
            column.extend(lines[name])
        self._length += added.pop()

    def __getitem__(self, name: str) -> np.ndarray:
        """One column: int64 (N,)."""
        return self._columns[name].stored(self._length).astype(np.int64)

    def lines(self, numbers: np.ndarray | slice) -> dict[str, np.ndarray]:
        """Some lines: int64 (K,) of each column."""
        return {
            name: column.stored(self._length)[numbers].astype(np.int64)
            for name, column in self._columns.items()
        }

    def line(self, number: int) -> dict[str, int]:
        """One line."""
        return {name: int(column.stored(self._length)[number]) for name, column in self._columns.items()}

    def pieces(self) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
        """All lines, some at a time, with their place: in memory all would stand beside what they become."""
        for first in range(0, self._length, _AT_ONCE):
            some = slice(first, min(first + _AT_ONCE, self._length))
            yield some, self.lines(some)


class _Column:
    """One number for all lines, until there is a second one."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._numbers: array[int] | None = None
        self._length = 0

    def extend(self, numbers: np.ndarray) -> None:
        if not len(numbers):
            return
        least, most = int(numbers.min()), int(numbers.max())
        needed = _kind(least, most)
        if self._number is None:
            self._number = least
        if self._numbers is None and not least == most == self._number:
            self._numbers = array(_kind(self._number, self._number), [self._number]) * self._length
        self._length += len(numbers)
        if self._numbers is None:
            return
        kind = max(self._numbers.typecode, needed, key=_KINDS.index)
        if kind != self._numbers.typecode:
            self._numbers = array(
                kind, np.frombuffer(self._numbers, self._numbers.typecode).astype(kind).tobytes()
            )
        self._numbers.frombytes(numbers.astype(kind).tobytes())

    def stored(self, length: int) -> np.ndarray:
        if self._numbers is None:
            return np.broadcast_to(np.int32(self._number or 0), length)
        return np.frombuffer(self._numbers, self._numbers.typecode)


def _kind(least: int, most: int) -> str:
    """The smallest kind that holds numbers from ``least`` to ``most``."""
    for kind in _KINDS:
        limits = np.iinfo(kind)
        if limits.min <= least and most <= limits.max:
            return kind
    raise OverflowError(f"numbers from {least} to {most} take more than 32 bits")
