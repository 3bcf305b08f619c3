"""Where the time of steps goes: waiting for data, forward, backward, the optimizer."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Literal, get_args

import torch

Phase = Literal["data_wait", "forward", "backward", "optimizer"]
PHASES: tuple[Phase, ...] = get_args(Phase)
_MOST = 1024  # ends of phases that are kept


class StepClock:
    """Adds up the time of each phase on the device, without waiting for it.

    On a GPU the phases are cut by events in its own queue: ``data_wait`` is then the time in which it has
    nothing to do, and no phase is blamed for what another one queued. DeepSpeed steps inside its backward
    pass, so its ``backward`` holds both.

    Args:
        device: That of the run.

    Example:
        >>> clock = StepClock(torch.device("cpu"))
        >>> clock.start()
        >>> clock.end("forward")
        >>> clock.take().keys() == set(PHASES)
        True
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spent: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._marks: list[tuple[Phase | None, torch.cuda.Event | float]] = []

    def start(self) -> None:
        """What was done since the last phase is of none."""
        self._mark(None)

    def end(self, phase: Phase) -> None:
        """What was done since the last phase, or since the start, is of this one."""
        self._mark(phase)

    def take(self) -> dict[Phase, float]:
        """Seconds of each phase since this was last called; waits for the device."""
        self._add_up()
        found, self._spent = self._spent, dict.fromkeys(PHASES, 0.0)
        return found

    def _mark(self, phase: Phase | None) -> None:
        if len(self._marks) >= _MOST:  # of a run that never asks
            self._add_up()
        if self._device.type != "cuda":
            self._marks.append((phase, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append((phase, event))

    def _add_up(self) -> None:
        marks, self._marks = self._marks, self._marks[-1:]
        if marks and isinstance(last := marks[-1][1], torch.cuda.Event):
            last.synchronize()
        for (_, before), (phase, after) in pairwise(marks):
            if phase is not None:
                self._spent[phase] += _seconds(before, after)


def _seconds(before: torch.cuda.Event | float, after: torch.cuda.Event | float) -> float:
    if isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
        return before.elapsed_time(after) / 1000
    assert isinstance(before, float)
    assert isinstance(after, float)
    return after - before
