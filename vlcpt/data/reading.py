"""The scans of one source in order, whoever makes them: this process, its workers, or others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

from torch.utils.data import DataLoader, Dataset

from vlcpt.data.scan_files import scan_from_bytes, scan_to_bytes
from vlcpt.data.scanning import Scan
from vlcpt.data.shared_work import SharedWork
from vlcpt.data.waiting import Watched, Workers

WORTH_WORKERS = 1.0  # seconds of reading; to start workers takes a part of one
_LOOKS = (0.05, 1.0)  # seconds between two looks at what other processes do, at first and at last
T = TypeVar("T")


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
