"""Loader workers: which item each is at, and an end by name for one that dies or does not answer."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType, TracebackType
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vlcpt.file_writes import Writing

T = TypeVar("T")
logger = logging.getLogger(__name__)

MAX_WORKERS = 256
_SHARED = Path("/dev/shm")
_TODO = "In a container, start it with more: docker --shm-size 8g, or --ipc host."
_PROCESS, _ITEM, _BUSY, _CHANGES = range(4)
_TORCH = "torch.utils.data._utils.signal_handling"
_SHOWN = 10  # documents of a worker that a message names at most
_SETTLES = 2.0  # seconds from a connection that breaks to the exit code of the process behind it
_ENDS = 15.0  # seconds that a killed process takes at most to be gone

_MEMORY = (
    "Fewer workers need less memory: --dataloader_num_workers 1. In a container or a job, allow more (docker "
    "--memory, sbatch --mem)."
)
_SHARED_MEMORY = (
    "Batches come through /dev/shm: make it larger (docker --shm-size 8g or --ipc host), or use fewer "
    "workers: --dataloader_num_workers 1."
)
_ZERO = "--dataloader_num_workers 0 shows what happens."
_CRASH = f"Look at these documents' media: vlcpt check --decode reads each. {_ZERO}"


class LoadingError(ValueError):
    """A loader worker died or did not answer."""


class Note(NamedTuple):
    """What a worker does.

    Args:
        worker: Its number.
        process: Its process.
        item: What it reads, or read last.
        is_busy: Whether it still reads it.
        changes: Another number with every note of this worker.
    """

    worker: int
    process: int
    item: int
    is_busy: bool
    changes: int


class WorkerBoard:
    """A board in shared memory: worker w writes the item that it reads into place w.

    Args:
        names: Those of the documents of an item.

    Example:
        >>> board = WorkerBoard(lambda item: [f"train.jsonl:{item}"])
        >>> with board.working_on(7):
        ...     board.in_flight()
        ['worker 0 was reading train.jsonl:7']
        >>> board.in_flight()
        []
    """

    def __init__(self, names: Callable[[int], Sequence[str]]) -> None:
        self._names = names
        board = torch.zeros((MAX_WORKERS, 4), dtype=torch.int64)
        with Writing(_SHARED, "memory that processes share", needed=board.nbytes, todo=_TODO):
            self._board = board.share_memory_()

    def at(self, item: int | None) -> None:
        """Note the item that is being read now; None: it was read."""
        worker = get_worker_info()
        own = self._board.numpy()[min(worker.id if worker else 0, MAX_WORKERS - 1)]
        own[_BUSY] = item is not None
        if item is not None:
            own[_PROCESS], own[_ITEM] = os.getpid(), item
        own[_CHANGES] += 1

    @contextmanager
    def working_on(self, item: int) -> Iterator[None]:
        """Note the item while it is read; a process that dies leaves its note."""
        self.at(item)
        try:
            yield
        finally:
            self.at(None)

    def notes(self) -> list[Note]:
        """What each worker noted that has read anything, by its number."""
        return [
            Note(worker, process, item, bool(is_busy), changes)
            for worker, (process, item, is_busy, changes) in enumerate(self._board.tolist())
            if changes
        ]

    def in_flight(self, dead: Iterable[int] = ()) -> list[str]:
        """What each worker is reading, and what the dead processes had read last, for a message."""
        found = []
        for note in self.notes():
            if note.is_busy or note.process in dead:
                verb = "was reading" if note.is_busy else "had read, last,"
                names = self._names(note.item)
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                found.append(f"worker {note.worker} {verb} {', '.join(names[:_SHOWN])}{more}")
        return found


T_co = TypeVar("T_co", covariant=True)


class Loader(Protocol[T_co]):
    """What a ``DataLoader`` is to who reads from it."""

    def __iter__(self) -> Iterator[T_co]: ...

    def __len__(self) -> int: ...


class Workers:
    """The loader workers that are started while this context is open, as the process that waits for them.

    Args:
        timeout: Seconds that a wait may take; 0: any time.
        boards: Those of these workers.
        while_still: Whether only seconds count in which a worker notes nothing new.

    Example:
        >>> with Workers(timeout=60) as workers:
        ...     list(workers.batches([1, 2]))
        [1, 2]
    """

    def __init__(
        self,
        timeout: float,
        boards: Callable[[], Sequence[WorkerBoard]] = lambda: (),
        *,
        while_still: bool = False,
    ) -> None:
        self._timeout = timeout
        self._boards = boards
        self._while_still = while_still
        self._since: float | None = None  # since when this process waits
        self._late = ""  # why this has ended the workers
        self._before: list[BaseProcess] = []
        self._known: dict[int, BaseProcess] = {}
        self._retired: set[int] = set()  # process numbers of those that have done their part

    def __enter__(self) -> Workers:
        self._before = active_children()
        self._ended = threading.Event()
        self._late, self._known, self._retired = "", {}, set()
        self._is_outer = not _held.holds
        _hold_back()
        if self._timeout:
            threading.Thread(
                target=self._guard, args=(self._ended,), name="worker guard", daemon=True
            ).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if error is not None:
            self.end()  # the loader may live as long as the error's trace does
        if self._is_outer:
            _let_act()

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """Pass on what a loader gives.

        Raises:
            LoadingError: If one of its workers died, or did not answer in time.
        """
        with self._awaited():
            iterator = iter(loader)
        while True:
            with self._awaited():
                try:
                    batch = next(iterator)
                except StopIteration:
                    self._retire()
                    return
            yield batch

    def awaited(self, loader: Loader[T]) -> AwaitedLoader[T]:
        """The loader, with :meth:`batches` in the place of its iterator."""
        return AwaitedLoader(loader, self)

    def end(self) -> None:
        """Kill these workers: a stopped one reacts to nothing else."""
        children = self._children()
        for child in children:
            child.kill()
        for child in children:
            child.join(_ENDS)

    @contextmanager
    def _awaited(self) -> Iterator[None]:
        _hold_back()
        self._since, outer = time.monotonic(), _held.waits
        _held.waits = True
        try:
            self._look()  # one may have died since the last wait
            yield
            _hold_back()  # while what torch's handler raises, if it is there again, is still caught here
        except MemoryError as error:
            raise LoadingError(
                f"no memory was left to read a document{self._documents()}. {_MEMORY}"
            ) from error
        except (RuntimeError, OSError, EOFError) as error:
            _held.waits = outer
            message = self._message(error)
            if message is None:
                raise
            raise LoadingError(message) from error
        finally:
            self._since, _held.waits = None, outer
            _hold_back()
            self._known |= {child.pid or 0: child for child in self._children()}

    def _look(self) -> None:
        """Raise, in torch's words, if a worker has died."""
        _held.look()
        for pid, child in self._known.items():
            # Torch itself ends workers by SIGTERM that were slow to end when they had done their part.
            if child.exitcode not in (None, 0, -signal.SIGTERM):
                raise RuntimeError(f"DataLoader worker (pid {pid}) is dead")

    def _retire(self) -> None:
        """Forget workers that have ended with their loader: nothing that breaks later is their doing."""
        ended = {pid for pid, child in self._known.items() if child.exitcode is not None}
        self._retired |= ended
        self._known = {pid: child for pid, child in self._known.items() if pid not in ended}

    def _children(self) -> list[BaseProcess]:
        return [child for child in active_children() if child not in self._before]

    def _guard(self, ended: threading.Event) -> None:
        """The thread: what keeps this process waiting is ended, and the wait with it."""
        moved: dict[int, tuple[int, float]] = {}
        while not ended.wait(min(1.0, self._timeout / 10)):
            since, now = self._since, time.monotonic()
            notes = self._notes() if self._while_still else []
            for place, note in enumerate(notes):
                if moved.get(place, (0, 0.0))[0] != note.changes:
                    moved[place] = (note.changes, now)
            if since is None:
                continue
            quiet = [now - max(since, moved[place][1]) for place in range(len(notes))]
            busy = [one for one, note in zip(quiet, notes, strict=True) if note.is_busy]
            if max([min(quiet, default=now - since), *busy]) < self._timeout or self._since != since:
                continue
            if children := self._children():
                # Once: a large process takes longer to die than this sleeps, and is then stopped no more.
                self._late = self._late or self._late_message(children)
                for child in children:
                    child.kill()

    def _late_message(self, children: list[BaseProcess]) -> str:
        stopped = {child.pid or 0 for child in children if _is_stopped(child)}
        what = f"loading timed out after {self._timeout:g} seconds (dataloader_timeout)"
        if stopped:
            return (
                f"{what}: stopped, as by kill -STOP or a debugger: {self._named(stopped)}"
                f"{self._documents(stopped)}. Start the run again."
            )
        return (
            f"{what}{self._documents()}. Look at these documents' media, and at the disk; "
            f"--dataloader_timeout allows more time. {_ZERO}"
        )

    def _message(self, error: Exception) -> str | None:
        """What happened, as a person should read it; None if it is no worker's end."""
        text = str(error)
        if isinstance(error, OSError | EOFError) and not self._late:
            text = self._broken_by()
        if self._late:
            return self._late
        if "unable to " in text and "shm" in text:
            return f"no shared memory is left for a batch{self._documents()}. {_SHARED_MEMORY}"
        if "Too many open files" in text or "received 0 items of ancdata" in text:
            return "too many files are open to take a batch from a worker. Raise the limit: ulimit -n 65536."
        if not text.startswith(("DataLoader worker", "Pin memory thread")):
            return None
        dead = {
            int(pid) for part in re.findall(r"\(pid(?:\(s\))? ([\d, ]+)\)", text) for pid in part.split(",")
        }
        codes = [self._known[pid].exitcode for pid in dead if pid in self._known]
        code = next(filter(None, codes), None) or _code_of(text)
        what, todo = _end_of(code)
        return f"a process that read documents {what}: {self._named(dead)}{self._documents(dead)}. {todo}"

    def _named(self, processes: Iterable[int]) -> str:
        workers = {note.process: f"worker {note.worker} " for note in self._notes()}
        return ", ".join(f"{workers.get(pid, '')}(pid {pid})" for pid in sorted(processes))

    def _broken_by(self) -> str:
        """What is known of the worker whose end broke a connection; empty if none has ended."""
        end = time.monotonic() + _SETTLES
        while time.monotonic() < end:
            try:
                self._look()
            except RuntimeError as error:
                return str(error)
            # An exit code of 0 is no failure to torch, but whoever has it hands nothing over any more.
            live = {child.pid for child in active_children()}
            noted = {note.process for note in self._notes()} - {os.getpid()}
            if gone := (noted | self._known.keys()) - live - self._retired:
                return f"DataLoader worker (pid {', '.join(map(str, gone))}) is dead"
            time.sleep(0.05)
        return ""

    def _notes(self) -> list[Note]:
        return [note for board in self._boards() for note in board.notes()]

    def _documents(self, dead: Iterable[int] = ()) -> str:
        found = [one for board in self._boards() for one in board.in_flight(dead)]
        return f"; {'; '.join(found)}" if found else "; no worker was reading a document"


def read_by_workers(
    items: Dataset[T],
    numbers: Sequence[int],
    num_proc: int,
    timeout: float,
    board: WorkerBoard,
    *,
    in_order: bool = True,
) -> Generator[T]:
    """Items by their numbers, read by processes of their own.

    Args:
        items: Read in the other processes; what they give is handed over as it is.
        numbers: Those of the items.
        num_proc: Processes to start at most.
        timeout: Seconds in which each of them must note something new; 0: any time.
        board: That of these processes.
        in_order: Whether items come in the order of the numbers; otherwise none waits for a slower one.

    Raises:
        LoadingError: If a process died, or stands still.
    """
    loader = DataLoader(
        items,
        batch_size=None,
        sampler=numbers,
        num_workers=min(num_proc, len(numbers)),
        prefetch_factor=4 if in_order else 1,
        in_order=in_order,
    )
    with Workers(timeout, lambda: [board], while_still=True) as workers:
        yield from workers.batches(loader)


class AwaitedLoader(Generic[T]):
    """A loader whose batches are waited for by :class:`Workers`."""

    def __init__(self, loader: Loader[T], workers: Workers) -> None:
        self._loader = loader
        self._workers = workers

    def __iter__(self) -> Iterator[T]:
        return self._workers.batches(self._loader)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)


def end_persistent_workers(loader: object) -> None:
    """Let the workers of a loader go that keeps them; the next to iterate over it gets new ones.

    They hold memory until Python collects the loader as garbage, together with the queues by which torch
    would tell them to end: it then waits 5 seconds for each.
    """
    inner = getattr(loader, "base_dataloader", loader)  # of what accelerate wraps
    if isinstance(inner, DataLoader) and inner._iterator is not None:
        inner._iterator = None


class _Held:
    """torch's handler of SIGCHLD, while it is held back."""

    def __init__(self) -> None:
        self.handler: Callable[[int, FrameType | None], object] | None = None
        self.waits = False

    @property
    def holds(self) -> bool:
        return signal.getsignal(signal.SIGCHLD) is _child_ended

    def look(self) -> None:
        """Raise if a worker has died."""
        if self.handler is not None:
            self.handler(signal.SIGCHLD, None)


_held = _Held()


def _child_ended(number: int, frame: FrameType | None) -> None:
    if _held.waits:
        _held.look()


def _hold_back() -> None:
    """Put this module's handler in the place of torch's, which is there once a loader has started workers."""
    if threading.current_thread() is not threading.main_thread():
        return
    handler = signal.getsignal(signal.SIGCHLD)
    if callable(handler) and handler.__module__ == _TORCH:
        _held.handler = handler
        signal.signal(signal.SIGCHLD, _child_ended)


def _let_act() -> None:
    """Put torch's handler back, for loaders that are not of this package."""
    if _held.holds and _held.handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, _held.handler)


def _code_of(text: str) -> int | None:
    """The exit code of a worker by torch's message, minus the number of a signal; None if it names none.

    Example:
        >>> _code_of("DataLoader worker (pid 7) is killed by signal: Aborted. ")
        -6
    """
    if found := re.search(r"killed by signal: (.+?)\.", text):
        ended_by = {signal.strsignal(one): one for one in signal.Signals}
        return -ended_by[found[1]] if found[1] in ended_by else None
    found = re.search(r"exit code (\d+)", text)
    return int(found[1]) if found else None


def _end_of(code: int | None) -> tuple[str, str]:
    """How a worker ended, and what to do."""
    if not code:
        return "ended unexpectedly", f"Look at memory, and at these documents' media. {_ZERO}"
    if code > 0:
        return f"ended with exit code {code}", f"What it printed stands above. {_ZERO}"
    names = {one.value: one.name for one in signal.Signals}
    name = names.get(-code, f"signal {-code}")  # most real-time signals have none
    if -code == signal.SIGKILL:
        return f"was killed ({name}), most likely by the system, for want of memory", _MEMORY
    if -code == signal.SIGBUS:
        return f"crashed ({name}), most likely because shared memory is full", _SHARED_MEMORY
    if -code in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return f"was ended ({name}) from outside", "Start the run again."
    return f"crashed ({name})", _CRASH


def _is_stopped(child: BaseProcess) -> bool:
    try:
        stat = Path(f"/proc/{child.pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # it has just ended, or this is no Linux
        return False
    return stat.rpartition(")")[2].split()[0] == "T"
