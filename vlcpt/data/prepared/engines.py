"""Runs one function over numbered pieces of work: in processes of this machine, or on a cluster with Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Literal, Protocol, TypeVar

from torch.utils.data import Dataset

from vlcpt.data.documents import DocumentError
from vlcpt.data.plan.ledger import BadDataError
from vlcpt.data.plan.plan import Track
from vlcpt.data.workers import Watched, read_by_workers
from vlcpt.file_writes import WriteError

T = TypeVar("T")
Engine = Literal["local", "ray"]
Failed = DocumentError | BadDataError | WriteError
Pieces = dict[str, Sequence[int]]
_LOOKS = 0.3  # seconds between two looks at how far it is


class Work(Protocol):
    """What is done to a piece."""

    def __call__(self, pieces: Pieces) -> Pieces:
        """Do ``{"piece": [number, …]}`` and give it back, in whatever process, or on whatever machine."""
        ...

    @property
    def watched(self) -> Watched:
        """Which row each process is at."""
        ...


def run_pieces(work: Work, pieces: Sequence[int], engine: Engine, num_proc: int, timeout: float = 0) -> None:
    """Do all pieces, in any order, each once.

    Args:
        work: Goes to other processes, or machines.
        pieces: Their numbers.
        engine: ``local``: this machine's processes; ``ray``: Ray Data's ``map_batches``.
        num_proc: Processes of the local engine; 0 and 1: this one.
        timeout: Seconds in which each of them must come to another row; 0: any time.

    Raises:
        DocumentError, BadDataError, WriteError: As the work raised them.
        LoadingError: If a process died, or stands still.
    """
    if engine == "ray":
        if pieces:
            _run_ray(work, pieces)
    elif num_proc > 1 and len(pieces) > 1:
        done = read_by_workers(_Done(work), pieces, num_proc, timeout, work.watched, in_order=False)
        with closing(done):  # so that the workers end with an error
            for failed in done:
                if failed is not None:
                    raise failed
    else:
        for piece in pieces:
            work({"piece": [piece]})


class _Done(Dataset[Failed | None]):
    """Item n: None once piece n is done, or its error, into whose text torch would put a trace."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def __getitem__(self, piece: int) -> Failed | None:
        try:
            self._work({"piece": [piece]})
        except (DocumentError, BadDataError, WriteError) as error:
            return error
        return None


def _run_ray(work: Work, pieces: Sequence[int]) -> None:
    import logging

    import ray

    started = not ray.is_initialized()
    if started:  # RAY_ADDRESS names a cluster; without it one is started here
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    context = ray.data.DataContext.get_current()
    before = (context.enable_progress_bars, context.raise_original_map_exception)
    context.enable_progress_bars, context.raise_original_map_exception = False, True
    try:
        cpus = int(ray.cluster_resources().get("CPU", 1))
        # Blocks are dealt out as processors become free: several each, so that none waits for the last.
        blocks = min(len(pieces), 8 * cpus)
        numbers = ray.data.from_items([{"piece": piece} for piece in pieces], override_num_blocks=blocks)
        for _ in numbers.map_batches(work, batch_size=1).iter_batches(batch_size=None):
            pass
    except ray.exceptions.RayTaskError as error:
        # Ray's class derives from that of the work's error; its message is a whole trace.
        if isinstance(error.cause, DocumentError | BadDataError | WriteError):
            raise error.cause from None
        raise
    finally:
        context.enable_progress_bars, context.raise_original_map_exception = before
        if started:
            ray.shutdown()


@contextmanager
def progress(done: Callable[[], int], total: int, track: Track, description: str) -> Iterator[None]:
    """Show how many pieces are done while others, in whatever process, do them.

    Args:
        done: Counts those that are.
        total: All of them.
        track: What shows it.
        description: What is done.

    Example:
        >>> from vlcpt.data.plan.plan import untracked
        >>> with progress(lambda: 2, 2, untracked, "encoding"):
        ...     pass
    """
    counted = _Counted(done, total)
    watcher = threading.Thread(target=lambda: [None for _ in track(counted, description)], daemon=True)
    watcher.start()
    try:
        yield
    finally:
        counted.ended.set()
        watcher.join()


class _Counted:
    """Pieces, as they become done."""

    def __init__(self, done: Callable[[], int], total: int) -> None:
        self._done, self._total = done, total
        self.ended = threading.Event()

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[int]:
        shown = 0
        while shown < self._total:
            ended = self.ended.is_set()
            now = min(self._done(), self._total)
            yield from range(shown, now)
            shown = max(shown, now)
            if ended:
                return
            self.ended.wait(_LOOKS)
