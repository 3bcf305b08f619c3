"""Which item each loader worker is at: one that dies or hangs is then named with its documents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import get_worker_info

MAX_WORKERS = 256


class WorkerWatch:
    """A board in shared memory: worker w writes the item that it reads into place w.

    Example:
        >>> watch = WorkerWatch()
        >>> with watch.working_on(7):
        ...     watch.busy()
        {0: 7}
        >>> watch.busy()
        {}
    """

    def __init__(self) -> None:
        self._items = torch.full((MAX_WORKERS,), -1, dtype=torch.int64).share_memory_()

    @contextmanager
    def working_on(self, item: int) -> Iterator[None]:
        """Note the item while it is read; a process that dies leaves its note."""
        worker = get_worker_info()
        place = min(worker.id if worker else 0, MAX_WORKERS - 1)
        self._items[place] = item
        try:
            yield
        finally:
            self._items[place] = -1

    def busy(self) -> dict[int, int]:
        """The item of each worker that is reading one."""
        return {worker: item for worker, item in enumerate(self._items.tolist()) if item >= 0}
