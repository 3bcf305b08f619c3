"""SIGTERM and SIGINT end a run between two steps, with a checkpoint; a second one ends it at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeVar

from vlcpt.data.workers import LoadingError
from vlcpt.interrupts import answered

T = TypeVar("T")
# Added up over ranks, these tell of each whether any rank got it.
_CODES = {signal.SIGTERM: 1.0, signal.SIGINT: 4096.0}


class Interruption:
    """Remembers a signal until the step is done. ``enable_jit_checkpoint`` of transformers 5.24 is no help.

    It knows SIGTERM alone and one rank alone, waits three seconds, and saves in the middle of a step.

    Example:
        >>> import os
        >>> interruption = Interruption()
        >>> with interruption.caught():
        ...     os.kill(os.getpid(), signal.SIGTERM)
        ...     interruption.is_requested, interruption.code
        (True, 1.0)
    """

    def __init__(self) -> None:
        self._received: int | None = None

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
        self._received = None
        with answered("stopping after this step, saving a checkpoint", self._receive):
            yield

    def batches(self, loader: Iterator[T]) -> Iterator[T]:
        """Pass on what a loader gives; none after a signal, which may also have ended its workers."""
        if self.is_requested:
            return
        try:
            yield from loader
        except LoadingError:
            if not self.is_requested:
                raise

    def _receive(self, number: int) -> None:
        if self._received is None:
            self._received = number


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
