"""SIGINT, SIGTERM, SIGHUP: answered at once with one line, obeyed at the next chance; a second one ends it.

Python runs handlers of signals between two of its instructions, and one call into torch may take minutes. So
the line is written, and a second signal obeyed, by a thread that the system's own handler wakes
(``signal.set_wakeup_fd``).
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from types import FrameType
from typing import NoReturn

# The system sends SIGHUP when a terminal closes, and a shell sends it once more to its jobs.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# One press of Ctrl-C may come as two signals: from the terminal, and from a launcher, some time later.
_SAME_SIGNAL, _SAME_OF_LAUNCHER = 0.25, 2.0  # seconds


class _Answers:
    """What this process answers; one for all, as its handlers are."""

    def __init__(self) -> None:
        self.process = 0
        self.line = ""
        self.since: float | None = None  # since when a signal is obeyed
        self.is_hangup = False  # whether that is SIGHUP
        self.once = threading.Lock()  # held from the first answer on
        self.act: Callable[[int], object] = interrupt
        self.is_final = False  # whether what is inside cannot take its place

    def signalled(self, number: int) -> None:
        """In the thread."""
        now = time.monotonic()
        if self.since is None:
            self.since = now
            if number == signal.SIGHUP:
                _leave_terminal()
            self.answer(number)
        elif number != signal.SIGHUP and now - self.since > (
            _SAME_OF_LAUNCHER if "LOCAL_RANK" in os.environ else _SAME_SIGNAL
        ):
            _end(number)

    def answer(self, number: int) -> None:
        """Say the line, once: whichever thread comes first."""
        if self.once.acquire(blocking=False):
            _say(number, self.line)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, between two instructions."""
        if os.getpid() == self.process:
            if number == signal.SIGHUP:
                self.is_hangup = True
                _leave_terminal()
            self.answer(number)  # before what it raises ends the work, and another line holds
            self.act(number)
        elif number == signal.SIGTERM:  # a process that was forked since, as a loader's worker
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def answered(line: str, act: Callable[[int], object], *, is_final: bool = False) -> Iterator[None]:
    """Around work that these signals interrupt; one inside another takes its place for so long.

    Elsewhere than in the main thread nothing is changed, for Python cannot.

    Args:
        line: What the first of them is answered with, on stderr, and by rank 0 alone.
        act: Called in the main thread with its number.
        is_final: Whether those inside do not take its place: what they would save is of no use.

    Example:
        >>> received = []
        >>> with answered("ending", received.append):
        ...     os.kill(os.getpid(), signal.SIGTERM)
        >>> received
        [<Signals.SIGTERM: 15>]
    """
    if threading.current_thread() is not threading.main_thread() or _answers.is_final:
        yield
        return
    before = _answers.line, _answers.act
    _answers.line, _answers.act = line, lambda number: act(signal.Signals(number))
    _answers.is_final = is_final
    try:
        if _answers.process == os.getpid():
            yield
        else:
            with _woken():
                yield
    finally:
        _answers.line, _answers.act = before
        _answers.is_final = False


@contextmanager
def finished_first(what: str) -> Iterator[None]:
    """Around a save: a signal that comes meanwhile acts when it is done.

    Example:
        >>> try:
        ...     with finished_first("the model"):
        ...         os.kill(os.getpid(), signal.SIGTERM)
        ...         print("saved")
        ... except SystemExit as ended:
        ...     print(ended)
        saved
        143
    """
    received: list[int] = []
    with answered(f"saving {what}, then ending", received.append):
        yield
    if received:
        interrupt(received[0])


def interrupt(number: int) -> NoReturn:
    """Raise what a signal stands for: KeyboardInterrupt, or SystemExit with 143, of SIGHUP as well."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + signal.SIGTERM)


def ended_by() -> str:
    """The signal for which a run exits with 143, by name; SIGTERM where another rank got it.

    Example:
        >>> ended_by()
        'SIGTERM'
    """
    return "SIGHUP" if _answers.is_hangup else "SIGTERM"


# Added up over ranks, these show whether any rank got one of them, and which.
_CODES = {signal.SIGTERM: 1.0, signal.SIGHUP: 1.0, signal.SIGINT: 4096.0}


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
        self._received: list[int] = []

    @property
    def is_requested(self) -> bool:
        """Whether this process got a signal."""
        return bool(self._received)

    @property
    def code(self) -> float:
        """What ranks add up to let each other know; 0 without a signal."""
        return _CODES[signal.Signals(self._received[0])] if self._received else 0.0

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch these signals; elsewhere than in the main thread Python cannot, and they act as always."""
        self._received.clear()
        with answered("stopping after this step, saving a checkpoint", self._received.append):
            yield


def signal_of(code: float) -> int:
    """The signal to end by, of a sum of :attr:`Interruption.code` over ranks: SIGTERM if any got it.

    Example:
        >>> signal_of(2.0), signal_of(8192.0)
        (<Signals.SIGTERM: 15>, <Signals.SIGINT: 2>)
    """
    return signal.SIGTERM if code % _CODES[signal.SIGINT] else signal.SIGINT


@contextmanager
def none_left() -> Iterator[None]:
    """Let no process that was started in here outlive a failure.

    Python waits at its end for each that multiprocessing has started, and one that is stopped never ends.
    """
    before = active_children()
    try:
        yield
    except BaseException:
        for child in active_children():
            if child not in before:
                child.kill()
        raise


@contextmanager
def _woken() -> Iterator[None]:
    """Set up handlers, and the thread that the system's handler wakes."""
    # A job that a shell has put into the background does not get the terminal's Ctrl-C; one under nohup
    # outlives its terminal.
    numbers = [one for one in _SIGNALS if signal.getsignal(one) != signal.SIG_IGN]
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    _answers.process, _answers.once = os.getpid(), threading.Lock()
    _answers.since, _answers.is_hangup = None, False
    thread = threading.Thread(target=_listen, args=(reader,), name="signals", daemon=True)
    thread.start()
    handlers = {number: signal.signal(number, _answers.handle) for number in numbers}
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _answers.process = 0
        # Ends the thread. To close the other end would not: processes that were forked hold copies of it.
        reader.shutdown(socket.SHUT_RDWR)
        thread.join()
        reader.close()
        writer.close()


def _listen(reader: socket.socket) -> None:
    while found := reader.recv(64):
        for number in found:
            if number in _SIGNALS:  # others with a handler, SIGCHLD for one, come here as well
                _answers.signalled(number)


def _say(number: int, line: str) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    again = "press Ctrl-C again" if number == signal.SIGINT else "send it again"
    # Past sys.stderr: the main thread may be in the middle of a write to it.
    try:
        os.write(2, f"\nvlcpt: {signal.Signals(number).name}: {line}; {again} to end at once\n".encode())
    except OSError:  # nobody reads it any more
        return


def _leave_terminal() -> None:
    """Write nowhere instead of to a terminal that is closed: the error would end the run before it saves."""
    for descriptor in (1, 2):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:
            if error.args[0] == errno.EIO:  # of a file or a pipe it is another
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


def _end(number: int) -> None:
    """End at once, wherever the main thread is; the next start finds what was begun unfinished."""
    for child in active_children():
        child.kill()
    os._exit(128 + number)


def _forget() -> None:
    """In a process that was forked: it wakes nobody, or its parent would take its signals for its own."""
    if _answers.process:
        signal.set_wakeup_fd(-1)


_answers = _Answers()
os.register_at_fork(after_in_child=_forget)
