"""Which item each loader worker is at: one that dies or hangs is then named with its documents."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

from vlcpt.file_writes import Writing

MAX_WORKERS = 256
_SHARED = Path("/dev/shm")
_TODO = "In a container, start it with more: docker --shm-size 8g, or --ipc host."
_PROCESS, _ITEM, _BUSY, _CHANGES = range(4)


class Note(NamedTuple):
    """What a worker does.

    Args:
        worker: Its number.
        process: Its process.
        item: What it reads, or read last.
        is_busy: Whether it still reads it.
        changes: Moves on with every note of this worker.
    """

    worker: int
    process: int
    item: int
    is_busy: bool
    changes: int


class WorkerWatch:
    """A board in shared memory: worker w writes the item that it reads into place w.

    Example:
        >>> watch = WorkerWatch()
        >>> with watch.working_on(7):
        ...     watch.busy()
        {0: 7}
        >>> watch.busy(), watch.notes()[0].item
        ({}, 7)
    """

    def __init__(self) -> None:
        board = torch.zeros((MAX_WORKERS, 4), dtype=torch.int64)
        with Writing(_SHARED, "memory that processes share", needed=board.nbytes, todo=_TODO):
            self._board = board.share_memory_()

    def at(self, item: int) -> None:
        """Note that an item is being read now."""
        own = self._own()
        own[_PROCESS], own[_ITEM], own[_BUSY] = os.getpid(), item, 1
        own[_CHANGES] += 1

    def done(self) -> None:
        """Note that it was read."""
        own = self._own()
        own[_BUSY] = 0
        own[_CHANGES] += 1

    @contextmanager
    def working_on(self, item: int) -> Iterator[None]:
        """Note the item while it is read; a process that dies leaves its note."""
        self.at(item)
        try:
            yield
        finally:
            self.done()

    def notes(self) -> list[Note]:
        """What each worker noted that has read anything, by its number."""
        return [
            Note(worker, process, item, bool(is_busy), changes)
            for worker, (process, item, is_busy, changes) in enumerate(self._board.tolist())
            if changes
        ]

    def busy(self) -> dict[int, int]:
        """The item of each worker that is reading one."""
        return {note.worker: note.item for note in self.notes() if note.is_busy}

    def _own(self) -> np.ndarray:
        worker = get_worker_info()
        place = min(worker.id if worker else 0, MAX_WORKERS - 1)
        own: np.ndarray = self._board.numpy()[place]
        return own
