"""The ranks of a run: what they do together, and which one keeps the others waiting."""

from __future__ import annotations

import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TypedDict, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)
T = TypeVar("T")


class CollectiveError(ValueError):
    """What another rank reported, or did not: this one cannot continue."""


def first_rank_only(training: TrainingArguments, work: Callable[[], T]) -> T:
    """What rank 0 returns from some work, on all ranks; what it raises, all raise.

    Args:
        training: The configuration of the run.
        work: Takes moments: the others wait in a collective, which has a timeout.

    Example:
        >>> first_rank_only(TrainingArguments("out", use_cpu=True), lambda: 7)
        7
    """
    outcome: list[object] = [None]
    if training.process_index == 0:
        try:
            outcome = [work()]
        except (ValueError, OSError, RuntimeError) as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return cast(T, outcome[0])


def together(work: Callable[[], None]) -> None:
    """Do something on each rank, wait for all of them, and raise on all what one has raised.

    Example:
        >>> together(lambda: print("done"))
        done
    """
    failed: Exception | None = None
    try:
        work()
    except Exception as error:  # whatever it is: the others must not wait for this rank
        failed = error
    _raise_on_all(failed)


def _raise_on_all(failed: Exception | None) -> None:
    """Raise, on each rank, what it has failed with, or what another one has. All call it."""
    reasons = gather_object([None if failed is None else str(failed)])
    if failed is not None:
        raise failed
    if others := [f"rank {rank}: {one}" for rank, one in enumerate(reasons) if one is not None]:
        raise CollectiveError(others[0])


def add_up(mine: torch.Tensor, failed: Exception | None = None) -> torch.Tensor:
    """Σ over all ranks, in one collective; a second one only where a rank has failed.

    Args:
        mine: What this rank has.
        failed: What it has failed with.

    Raises:
        CollectiveError: On the ranks that have not failed themselves, if another one has.

    Example:
        >>> add_up(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    sums = reduce(torch.cat([mine.flatten(), mine.new_tensor([failed is not None])]), "sum")
    if sums[-1]:
        _raise_on_all(failed)
    return sums[:-1].reshape(mine.shape)


class HostSums:
    """Adds plain numbers up over all ranks on their CPUs: a sum on the devices waits for what they compute.

    It takes a process group of gloo beside that of the run. Where ranks do not find each other by gloo, which
    may look for them in another network than NCCL does, it falls back to the devices and says so once.

    Args:
        args: Those of the run.

    Example:
        >>> HostSums(TrainingArguments("out", use_cpu=True)).add([1.5, 2])
        [1.5, 2.0]
    """

    def __init__(self, args: TrainingArguments) -> None:
        self._device, self._world, self._timeout = args.device, args.world_size, float(args.ddp_timeout)
        self._group: dist.ProcessGroup | None = None

    def connect(self) -> None:
        """Set the group up, once in a process. All ranks call it together, before the first sum."""
        if self._world > 1 and dist.is_initialized():
            self._group = _host_group(dist.group.WORLD)
        if self._group is not None:
            # It was made with less patience; a rank may read for longer.
            dist.set_timeout(timedelta(seconds=self._timeout), self._group)

    def add(self, mine: Sequence[float]) -> list[float]:
        """Σ over all ranks of each number.

        Args:
            mine: Those of this rank; all ranks give equally many.
        """
        if self._world == 1:
            return [float(one) for one in mine]
        if self._group is None:
            return reduce(torch.tensor(mine, dtype=torch.float32, device=self._device), "sum").tolist()
        sums = np.array(mine, dtype=np.float64)
        dist.all_reduce(torch.from_numpy(sums), group=self._group)  # into the same memory
        return [float(one) for one in sums]


@cache
def _host_group(world: dist.ProcessGroup) -> dist.ProcessGroup | None:
    """A group of gloo of the same ranks; None on all of them if one of them cannot reach the others."""
    PartialState().wait_for_everyone()  # what follows has a limit of its own
    group, reason = None, ""
    try:
        group = dist.new_group(timeout=timedelta(seconds=_MEETING), backend="gloo")
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
    reasons: list[str] = gather_object([reason])
    if not any(reasons):
        return cast(dist.ProcessGroup, group)  # torch types it for ranks that are not in it, too
    if PartialState().process_index == 0:
        found = [f"rank {rank}: {one}" for rank, one in enumerate(reasons) if one]
        logger.warning(
            "gloo does not connect the ranks, so each step waits once more for the device, for the counts of "
            "all ranks. GLOO_SOCKET_IFNAME names the network interface that it is to use. (%s)",
            "; ".join(found[:_SHOWN]),
        )
    return None


def require_equal(found: str, name: str) -> None:
    """Raise on every rank if they do not all have the same, for they would train on other items.

    Args:
        found: What this rank has.
        name: What it is, for the message.

    Raises:
        ValueError: If ranks differ.

    Example:
        >>> require_equal("0f3a", "the plan of train_data")
    """
    everywhere = gather_object([found])
    if other := [rank for rank, one in enumerate(everywhere) if one != everywhere[0]]:
        raise ValueError(
            f"{name} is another on rank {other[0]} than on rank 0: their files or configuration differ, or "
            "were changed while they were read. Give all machines the same, and start again with --overwrite."
        )


def on_any_rank(mine: bool) -> bool:
    """Whether something is so on any rank; what follows is then the same on all. All call it.

    Example:
        >>> on_any_rank(False)
        False
    """
    return any(gather_object([mine]))


class Alarm:
    """Says that a rank has failed to those that work apart until their next collective, so that they end too.

    On one process it says nothing. All ranks make one for the same work.

    Example:
        >>> alarm = Alarm(ranks=1)
        >>> alarm.ring()
        >>> alarm.rings()
        False
    """

    _numbers = itertools.count()

    def __init__(self, ranks: int) -> None:
        self._key = store_key(f"failed/{next(self._numbers)}")  # none is taken for that of work before
        self._store = connect() if ranks > 1 and "MASTER_ADDR" in os.environ else None

    def ring(self) -> None:
        """This rank has failed."""
        if self._store is not None:
            self._store.set(self._key, "failed")

    def rings(self) -> bool:
        """Whether any rank has; costs a question to the store."""
        return self._store is not None and bool(self._store.check([self._key]))


_MEETING = 60.0  # seconds in which ranks find each other by gloo, which they begin together
_ANSWERS = 10.0  # seconds in which the store does, at most
_PERIOD = 1.0  # seconds from one sign of life to the next
_SILENT = 4 * _PERIOD  # without one a process counts as dead
_SHOWN = 8  # ranks that a message names at most
# How the backends begin, or what they say, when another rank did not come.
_TIMED_OUT = ("gloo", "NCCL", "Timed out waiting", "Connection closed by peer", "Connection reset by peer")


class Place(TypedDict):
    """What a rank does: at which step, what, on which documents, since and at when (Unix time, its own)."""

    step: int
    what: str
    documents: str
    since: float
    seen: float


class RankWatch(TrainerCallback):
    """Reports to the other ranks where this one is, and to a person where all are when a collective fails.

    On one process it does nothing.

    Args:
        args: Those of the run, whose process group is set up.
        documents: What this process reads at the moment, for a person; may be empty.

    Example:
        >>> watch = RankWatch(TrainingArguments("out", use_cpu=True))
        >>> with watch.watched():
        ...     watch.at(3, "reading documents")
    """

    def __init__(self, args: TrainingArguments, documents: Callable[[], str] = lambda: "") -> None:
        self._rank, self._world = args.process_index, args.world_size
        self._timeout = float(args.ddp_timeout)
        self._documents = documents
        self._is_watching = False
        self.at(0, "starting")

    def at(self, step: int, what: str) -> None:
        """Note what this rank begins to do; ``step`` counts from 1, 0 is before the first."""
        now = time.time()
        # Replaced as one value: the thread reads it.
        self._place = Place(step=step, what=what, documents="", since=now, seen=now)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around all that waits for other ranks.

        Raises:
            CollectiveError: In place of what a backend raises when they do not come.
        """
        if self._is_watching or self._world == 1 or "MASTER_ADDR" not in os.environ:
            yield
            return
        ended = threading.Event()
        threading.Thread(target=self._report, args=(ended,), name="rank watch", daemon=True).start()
        self._is_watching = True
        try:
            yield
        except RuntimeError as error:
            if not any(word in str(error) for word in _TIMED_OUT):
                raise
            reason = str(error).strip().splitlines()[0][:200]
            raise CollectiveError(
                f"rank {self._rank} timed out waiting for the other ranks, {_step_name(self._place)}: "
                f"{self.others()}. Look at the output of the rank named first. If it was only slow, "
                f"--ddp_timeout (now {self._timeout:.0f} seconds) allows more time. ({reason})"
            ) from error
        finally:
            self._is_watching = False
            ended.set()

    def others(self) -> str:
        """Where the other ranks are, those that are behind first; takes four seconds, to see who lives."""
        ranks = [rank for rank in range(self._world) if rank != self._rank]
        try:
            store = connect(self._timeout)
            before = {rank: _read(store, rank) for rank in ranks}
            time.sleep(_SILENT)
            now = {rank: _read(store, rank) for rank in ranks}
        except (RuntimeError, OSError):  # it was in the process that is gone
            return "rank 0, or the launcher, does not answer any more"
        # No clocks are compared: machines may differ in time.
        lives = {rank: now[rank] != before[rank] for rank in ranks}
        order = sorted(ranks, key=lambda rank: (lives[rank], *_behind(now[rank])))
        shown = [f"rank {rank} {_describe(now[rank], lives[rank])}" for rank in order[:_SHOWN]]
        return "; ".join(shown) + (f"; and {len(order) - _SHOWN} more" if len(order) > _SHOWN else "")

    def _report(self, ended: threading.Event) -> None:
        """The thread: a sign of life each second, and one line before a collective's time is over."""
        reported = None
        try:
            store = connect(self._timeout)
            while not ended.wait(_PERIOD):
                current = self._place
                now: Place = {**current, "documents": self._documents(), "seen": time.time()}
                store.set(store_key(self._rank), json.dumps(now))
                if now["seen"] - now["since"] > 0.9 * self._timeout and reported is not current:
                    reported = current
                    # By a thread of its own, or this rank would seem dead.
                    threading.Thread(target=self._warn, args=(now,), daemon=True).start()
        except (RuntimeError, OSError):
            return  # the store is gone, and with it the run

    def _warn(self, place: Place) -> None:
        """NCCL ends the process itself when a collective's time is over: nothing could be reported then."""
        logger.error(
            "rank %d is %s for %.0f seconds; a collective ends after %.0f (ddp_timeout). The others: %s",
            self._rank,
            _step_name(place),
            place["seen"] - place["since"],
            self._timeout,
            self.others(),
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """A step's documents are read; what follows is forward and backward."""
        self.at(state.global_step + 1, "computing")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """What follows a step, or an evaluation."""
        what = "evaluating" if control.should_evaluate else "saving" if control.should_save else "ending it"
        self.at(state.global_step, what)

    on_evaluate = on_step_end

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """An evaluation takes long, and each of its batches is a sign of life."""
        self.at(state.global_step, "evaluating")


def connect(timeout: float = _ANSWERS) -> dist.TCPStore:
    """The store at which the ranks met: the launcher's, or rank 0's."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = timedelta(seconds=min(timeout, _ANSWERS))
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=wait)


def store_key(name: object) -> str:
    """What the store calls a value of this start of the run: a launcher that starts again keeps its store."""
    return f"vlcpt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"


def _read(store: dist.TCPStore, rank: int) -> Place | None:
    key = store_key(rank)
    return json.loads(store.get(key)) if store.check([key]) else None


def _behind(place: Place | None) -> tuple[float, float]:
    """Those at the smallest step first, then those longest at what they do."""
    return (-1.0, 0.0) if place is None else (float(place["step"]), place["since"] - place["seen"])


def _describe(place: Place | None, lives: bool) -> str:
    if place is None:
        return "never reported where it was"
    where = _step_name(place)
    documents = f", {place['documents']}" if place["documents"] else ""
    if lives:
        return f"is {where} for {place['seen'] - place['since']:.0f} seconds{documents}"
    return f"gives no sign of life, and was {where}{documents}"


def _step_name(place: Place) -> str:
    step = f"at step {place['step']}" if place["step"] else "before step 1"
    return f"{step} ({place['what']})"
