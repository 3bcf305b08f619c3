"""SIGTERM and SIGINT end a run between two steps, with a checkpoint; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from vlcpt.data.waiting import LoadingError

# Added up over ranks, these tell of each whether any rank got it.
_CODES = {signal.SIGTERM: 1.0, signal.SIGINT: 4096.0}
# Ctrl-C in a terminal reaches a process, and torchrun sends it once more.
_SAME_SIGNAL = 2.0  # seconds


class Interruption:
    """Remembers a signal until the step is done. ``enable_jit_checkpoint`` of transformers 5.24 is no help.

    It knows SIGTERM alone and one rank alone, waits three seconds, and saves in the middle of a step.

    Example:
        >>> interruption = Interruption()
        >>> with interruption.caught():
        ...     os.kill(os.getpid(), signal.SIGTERM)
        ...     interruption.is_requested, interruption.code
        (True, 1.0)
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._received: int | None = None
        self._since = 0.0
        self._process = os.getpid()

    @property
    def is_requested(self) -> bool:
        """Whether this process got a signal."""
        return self._received is not None

    @property
    def code(self) -> float:
        """What ranks add up to tell each other; 0 without a signal."""
        return 0.0 if self._received is None else _CODES[signal.Signals(self._received)]

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch both signals; elsewhere than in the main thread Python cannot, and they act as always."""
        self._reset()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in _CODES}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def while_loading(self) -> Iterator[None]:
        """Around the wait for a batch, which ends where a signal to all processes ended the workers."""
        try:
            yield
        except LoadingError:
            if not self.is_requested:
                raise

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's worker, forked since
            if number == signal.SIGTERM:
                _end(number)
            return
        if self._received is not None:
            if time.monotonic() - self._since > _SAME_SIGNAL:
                _end(number)
            return
        self._received, self._since = number, time.monotonic()


def end_interrupted(code: float, message: str) -> NoReturn:
    """End with 143 after SIGTERM, and as Ctrl-C does after SIGINT: 130.

    Args:
        code: The sum of :attr:`Interruption.code` over all ranks.
        message: What was saved.

    Example:
        >>> end_interrupted(2.0, "saved")
        Traceback (most recent call last):
        SystemExit: 143
    """
    if code % _CODES[signal.SIGINT]:
        raise SystemExit(128 + signal.SIGTERM)
    raise KeyboardInterrupt(message)


def _end(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
