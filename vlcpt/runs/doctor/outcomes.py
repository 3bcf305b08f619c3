"""What each rank found in a check, exchanged without a collective: a rank that failed comes to none."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Self

import torch.distributed as dist
from transformers import TrainingArguments

from vlcpt.report.doctor import Line, joined
from vlcpt.training.ranks import connect, store_key

GRACE = 10.0  # seconds in which the others end a check once a rank has failed in it; else they wait for it
_PERIOD = 0.2  # seconds from one question to the next
_SHOWN = 8  # ranks that a message names at most


@dataclass(frozen=True)
class Outcome:
    """How a check ended on one rank.

    Args:
        line: What it found.
        order: 0 if it ended by itself; else when it raised: 1 on the first rank, 2 on the next.
    """

    line: Line
    order: int = 0


@dataclass(frozen=True)
class Verdict:
    """How a check ended on all ranks.

    Args:
        line: That of the table.
        is_shared: Whether the ranks are at the same place still, so that they can wait for each other.
    """

    line: Line
    is_shared: bool


def verdict(name: str, found: Mapping[int, Outcome], ranks: int, timeout: float) -> Verdict:
    """How a check ended, by what each rank found.

    Args:
        name: That of the check.
        found: By rank; one that has not ended the check is missing.
        ranks: How many there are.
        timeout: Seconds that were waited where no rank raised.

    Example:
        >>> raised = Outcome(Line("speed", "failed", detail="out of memory"), order=1)
        >>> verdict("speed", {1: raised}, ranks=2, timeout=60).line.detail
        'rank 1: out of memory (rank 0 then waited for it)'
    """
    missing = [rank for rank in range(ranks) if rank not in found]
    raised = sorted((one.order, rank) for rank, one in found.items() if one.order)
    is_shared = not missing and len(raised) in (0, ranks)
    if raised:
        first = raised[0][1]
        waited = f" ({_named(missing)} then waited for it)" if missing else ""
        where = f"rank {first}: " if ranks > 1 else ""
        return Verdict(Line(name, "failed", detail=f"{where}{found[first].line.detail}{waited}"), is_shared)
    if missing:
        detail = f"{_named(missing)} did not end this check within {timeout:.0f} seconds (ddp_timeout)"
        return Verdict(Line(name, "failed", detail=detail), is_shared)
    return Verdict(joined([found[rank].line for rank in range(ranks)]), is_shared)


def _named(ranks: Sequence[int]) -> str:
    names = ", ".join(map(str, ranks[:_SHOWN]))
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {names}{more}"


class Outcomes:
    """Exchanges what ranks found at the store where they met; rank 0 decides, by :func:`verdict`.

    A rank that waits in a collective for one that has failed cannot be called back. A thread in it ends the
    process, on rank 0 after a report.

    Args:
        training: The configuration of the run.
        report: Called on rank 0, in the thread, with the lines so far, when the process is about to end.

    Example:
        >>> with Outcomes(TrainingArguments("out", use_cpu=True), print) as outcomes:
        ...     outcomes.begin("speed")
        ...     outcomes.exchange(Line("speed", "passed", 1.0), raised=False).line.status
        'passed'
    """

    def __init__(self, training: TrainingArguments, report: Callable[[Sequence[Line]], None]) -> None:
        self._rank, self._ranks = int(training.process_index), int(training.world_size)
        self._timeout = float(training.ddp_timeout)
        self._report = report
        self._store = connect() if self._ranks > 1 else None
        self._lines: list[Line] = []
        self._lock = threading.Lock()
        self._check: str | None = None  # the one that the main thread is in
        self._are_apart = False
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        if self._store is not None:
            threading.Thread(target=self._attend, name="doctor", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def begin(self, name: str, *, apart: bool = False) -> None:
        """A check begins.

        Args:
            apart: Whether ranks wait for each other nowhere in it.
        """
        with self._lock:
            self._check, self._are_apart = name, apart

    def exchange(self, mine: Line, *, raised: bool) -> Verdict:
        """How the check ended on all ranks, once each has ended it or does not come.

        Args:
            mine: What it found on this rank.
            raised: Whether it raised.
        """
        with self._lock:  # never released where the thread is about to end the process
            name, self._check = mine.name, None
        if self._store is None:
            found = verdict(name, {0: Outcome(mine, int(raised))}, 1, self._timeout)
        else:
            order = self._store.add(self._key("raised"), 1) if raised else 0
            self._store.set(self._key(self._rank), json.dumps([asdict(mine), order]))
            self._store.add(self._key("ended"), 1)
            decide = self._decide if self._rank == 0 else self._decided
            found = decide(name, self._store)
        self._lines.append(found.line)
        return found

    def finish(self) -> None:
        """Rank 0 has reported; the others wait for that, because a launcher ends it when one of them ends."""
        store = self._store
        if store is not None and self._rank == 0:
            store.set(_key("done"), "done")
        elif store is not None:
            with suppress(RuntimeError):  # rank 0 has ended, and the store with it
                _until(lambda: store.check([_key("done")]), self._timeout)

    def _decide(self, name: str, store: dist.TCPStore) -> Verdict:
        """On rank 0."""
        limit = _Countdown()

        def is_over() -> bool:
            is_raised = not self._are_apart and store.check([self._key("raised")])
            return store.add(self._key("ended"), 0) == self._ranks or limit.is_over(begins=is_raised)

        _until(is_over, self._timeout)
        found = verdict(name, self._found(store), self._ranks, self._timeout)
        store.set(self._key("verdict"), json.dumps([asdict(found.line), found.is_shared]))
        return found

    def _decided(self, name: str, store: dist.TCPStore) -> Verdict:
        """On the other ranks."""
        key = self._key("verdict")
        if not _until(lambda: store.check([key]), 2 * self._timeout):
            detail = f"rank 0 did not end this check within {2 * self._timeout:.0f} seconds"
            return Verdict(Line(name, "failed", detail=detail), is_shared=False)
        line, is_shared = json.loads(store.get(key))
        return Verdict(Line(**line), is_shared)

    def _found(self, store: dist.TCPStore) -> dict[int, Outcome]:
        """What the ranks have found that have ended the check."""
        found = {}
        for rank in range(self._ranks):
            if store.check([self._key(rank)]):
                line, order = json.loads(store.get(self._key(rank)))
                found[rank] = Outcome(Line(**line), order)
        return found

    def _attend(self) -> None:
        """The thread: end the process if its main thread does not come out of a check any more."""
        try:
            store = connect()
            limit, number = _Countdown(), -1
            while not self._ended.wait(_PERIOD):
                if number != len(self._lines):
                    limit, number = _Countdown(), len(self._lines)
                is_lost = (
                    limit.is_over(begins=not self._are_apart and store.check([self._key("raised")]))
                    if self._rank == 0
                    else store.check([_key("done")])
                )
                if is_lost:
                    self._leave(store, number)
        except (RuntimeError, OSError):
            return  # the store is gone, and with it the launcher or rank 0

    def _leave(self, store: dist.TCPStore, number: int) -> None:
        """End the process, unless the main thread is out of the check of this number."""
        with self._lock:
            if self._check is None or number != len(self._lines):
                return
            try:
                if self._rank == 0:
                    found = verdict(self._check, self._found(store), self._ranks, self._timeout)
                    store.set(self._key("verdict"), json.dumps([asdict(found.line), False]))
                    self._report([*self._lines, found.line])
                    store.set(_key("done"), "done")
                    time.sleep(5 * _PERIOD)  # the store may be in this process
            except Exception:  # in a thread nobody else would show it
                logging.getLogger(__name__).exception("the report could not be written")
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(1)

    def _key(self, name: object) -> str:
        """The lines of the current check: each adds one, on every rank."""
        return _key(f"{len(self._lines)}/{name}")


class _Countdown:
    """Whether others had the time to end a check, since it was first known that a rank has failed."""

    def __init__(self) -> None:
        self._since: float | None = None

    def is_over(self, *, begins: bool) -> bool:
        if begins and self._since is None:
            self._since = time.monotonic()
        return self._since is not None and time.monotonic() - self._since > GRACE


def _until(is_over: Callable[[], bool], seconds: float) -> bool:
    """Ask again and again; whether it came to be in time."""
    end = time.monotonic() + seconds
    while not is_over():
        if time.monotonic() > end:
            return False
        time.sleep(_PERIOD / 2)
    return True


def _key(name: str) -> str:
    return store_key(f"doctor/{name}")
