"""Runs one function over numbered pieces of work: on this machine with datasets, or on a cluster with Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from vlcpt.data.documents import DocumentError
from vlcpt.data.planning import BadDataError, Track
from vlcpt.file_writes import WriteError

Engine = Literal["local", "ray"]
Pieces = dict[str, Sequence[int]]
_LOOKS = 0.3  # seconds between two looks at how far it is


def run_pieces(
    work: Callable[[Pieces], Pieces], pieces: Sequence[int], engine: Engine, num_proc: int
) -> None:
    """Do all pieces, in any order, each once.

    Args:
        work: Does ``{"piece": [number, …]}`` and gives it back. Goes to other processes, or machines.
        pieces: Their numbers.
        engine: ``local``: ``datasets.map``; ``ray``: Ray Data's ``map_batches``.
        num_proc: Processes of the local engine; 0 and 1: this one.

    Raises:
        DocumentError, BadDataError, WriteError: As the work raised them.
        ValueError: If a process died.

    Example:
        >>> run_pieces(lambda batch: batch, [0, 1], "local", 0)
    """
    if pieces:
        (_run_local if engine == "local" else _run_ray)(work, pieces, num_proc)


def _run_local(work: Callable[[Pieces], Pieces], pieces: Sequence[int], num_proc: int) -> None:
    import datasets

    had_bars = datasets.utils.are_progress_bars_disabled() is False
    datasets.utils.disable_progress_bars()  # of pieces; there is one of our own
    try:
        datasets.Dataset.from_dict({"piece": list(pieces)}).map(
            work,
            batched=True,
            batch_size=1,
            num_proc=min(num_proc, len(pieces)) if num_proc > 1 and len(pieces) > 1 else None,
            keep_in_memory=True,
            new_fingerprint="pieces",  # else it would hash the function, and look for a result in its cache
            load_from_cache_file=False,
        )
    except RuntimeError as error:
        if "died" not in str(error):
            raise
        raise ValueError(
            "a process that encoded documents was killed, most likely for its memory. Start it again: it "
            "goes on where it stopped. Fewer processes need less: --dataloader_num_workers 1."
        ) from error
    finally:
        if had_bars:
            datasets.utils.enable_progress_bars()


def _run_ray(work: Callable[[Pieces], Pieces], pieces: Sequence[int], num_proc: int) -> None:
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
        >>> from vlcpt.data.planning import untracked
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
