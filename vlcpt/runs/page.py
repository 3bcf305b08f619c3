"""The page that a run writes about itself: while it trains, for little of its time, and after any end."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlcpt.config.values import is_secret
from vlcpt.file_writes import write_file, write_json
from vlcpt.interrupts import ended_by
from vlcpt.run_files import FACTS, PAGE, read_mapping

logger = logging.getLogger(__name__)
SHARE = 0.01  # of a run's time that its page may take
_ONCE, _EACH = 0.2, 0.1  # seconds that are thought to go into imports, and into a page
_MESSAGE = 2000  # characters of an error's message


@dataclass
class Budget:
    """Lets work be done as long as all of it takes a small share of the time, the last of it included.

    Args:
        share: That of the time since this was made.
        clock: Seconds, from anywhere.

    Example:
        >>> now = [0.0]
        >>> budget = Budget(clock=lambda: now[0])
        >>> now[0] = 500.0
        >>> with budget.spent():
        ...     now[0] += 1.0
        >>> budget.allows  # 1 second is spent of 5, and two more are wanted: this time, and at the end
        True
        >>> now[0] = 250.0
        >>> budget.allows
        False
    """

    share: float = SHARE
    clock: Callable[[], float] = time.monotonic
    seconds: float = 0.0
    _last: float = _EACH
    _once: float = _ONCE
    _start: float = field(init=False)

    def __post_init__(self) -> None:
        self._start = self.clock()

    @property
    def elapsed(self) -> float:
        """Seconds since this was made."""
        return self.clock() - self._start

    @property
    def allows(self) -> bool:
        """Whether there is time for once more now, and once at the end."""
        return self.seconds + self._once + 2 * self._last <= self.share * self.elapsed

    @contextmanager
    def spent(self, *, once: bool = False) -> Iterator[None]:
        """Around the work, also where it fails.

        Args:
            once: Whether it is what only the first time needs.
        """
        start = self.clock()
        try:
            yield
        finally:
            seconds, self._once = self.clock() - start, 0.0
            self.seconds += seconds
            if not once:
                self._last = seconds


class RunPage(TrainerCallback):
    """Keeps ``run.json`` and ``report.html`` of a run. What goes wrong with them is a warning, no more.

    Args:
        output: The run's folder.
        is_main: Whether this process is the one that writes.
        command: As a person typed it, see :func:`typed`; empty from Python.
        clock: Seconds, from anywhere.
    """

    def __init__(
        self,
        output: Path,
        *,
        is_main: bool = True,
        command: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget = Budget(clock=clock)
        self.is_main, self.resumed_at = is_main, 0
        self._output = output
        self._facts: dict[str, object] = (
            {"state": "running", "command": command} if command else {"state": "running"}
        )
        self._has_begun = self._has_warned = self._has_page = False
        self._before = 0.0
        self._step = 0

    def begin(self, *, resumes: bool = False, **facts: object) -> None:
        """Begin to write: the folder is this run's from now on.

        Args:
            resumes: Whether an earlier run in it may be resumed.
            facts: Those of the run, for ``run.json``.
        """
        before = read_mapping(self._output / FACTS)
        starts, seconds = before.get("starts"), before.get("seconds")
        # Only what is resumed has a log left: another start in this folder begins anew.
        goes_on = resumes and (self._output / "train_log.jsonl").is_file()
        self._before = float(seconds) if goes_on and isinstance(seconds, int | float) else 0.0
        self._facts["starts"] = 1 + (starts if goes_on and isinstance(starts, int) else 0)
        self._facts["started"] = _now()
        self._has_begun = True
        self.note(**facts)

    def note(self, **facts: object) -> None:
        """Add to ``run.json``."""
        self._facts |= facts
        if self.is_main and self._has_begun:
            self._attempt(self._write_facts)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Around the whole run: whatever its end, it is noted, and the page is complete."""
        try:
            yield
        except BaseException as error:
            # Where a disk is full, the run has said so; its page would say it again.
            self._has_warned = self._has_warned or isinstance(error, OSError)
            self._end(*self._what_ended(error))
            raise
        self._end("finished", "")

    def draw(self) -> None:
        """Write the page anew."""
        with self.budget.spent(once=True):
            from vlcpt.report.pages.run import run_page
        with self.budget.spent():
            self._has_page = True
            self._write_facts()
            write_file(self._output / PAGE, run_page(self._output), "the page of the run")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Note how long the run will be, and after which step it goes on."""
        self.resumed_at = state.global_step
        self.note(steps_planned=state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._step = state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Write the page, if there is time for it; losses, evaluations and their steps are all logged.

        The first line has a page in any case: a run that is killed early leaves one.
        """
        self._draw_in_time()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._draw_in_time()

    def _draw_in_time(self) -> None:
        if self.is_main and self._has_begun and (self.budget.allows or not self._has_page):
            self._attempt(self.draw)

    def _what_ended(self, error: BaseException) -> tuple[str, str]:
        """The state after an error, and what there is to say."""
        step = f"after step {self._step:,}" if self._step else "before step 1"
        if isinstance(error, KeyboardInterrupt):
            return "interrupted", f"By Ctrl-C (SIGINT), {step}."
        if isinstance(error, SystemExit):
            return "interrupted", f"By {ended_by()}, {step}." if error.code == 143 else f"Ended {step}."
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        return "failed", f"{f'{kind}{error}'[:_MESSAGE]} ({step})"

    def _end(self, state: str, message: str) -> None:
        if not (self.is_main and self._has_begun):
            return
        self._facts |= {"state": state, "message": message, "ended": _now()}
        self._attempt(self.draw)
        self._attempt(self._write_facts)  # once more, with the seconds of the last page

    def _write_facts(self) -> None:
        times = {
            "seconds": round(self._before + self.budget.elapsed, 1),
            "page_seconds": round(self.budget.seconds, 2),
            "written": _now(),
        }
        write_json(self._output / FACTS, {**self._facts, **times}, "what is known of the run")

    def _attempt(self, work: Callable[[], None]) -> None:
        """Do what may fail without the run failing."""
        try:
            work()
        # Whatever is wrong with a picture or a disk: the model is worth more than its page.
        except Exception as error:
            if not self._has_warned:
                logger.warning(
                    "%s cannot be written: %s. The run is not affected; `vlcpt report %s` makes it later.",
                    self._output / PAGE,
                    f"{type(error).__name__}: {error}",
                    shlex.quote(str(self._output)),
                )
            self._has_warned = True


def typed(words: Sequence[str]) -> str:
    """A command as it was typed, without secrets.

    Example:
        >>> typed(["vlcpt", "train", "my run.yaml", "--hub-token", "hf_abc", "--hub_token=hf_abc"])
        "vlcpt train 'my run.yaml' --hub-token … --hub_token=…"
    """
    shown, hides = [], False
    for word in words:
        key, equals, _ = word.removeprefix("--").partition("=")
        is_key = word.startswith("--")
        secret = is_key and is_secret(key.replace("-", "_"))
        if hides and not is_key:
            shown.append("…")
        else:
            shown.append(f"--{key}=…" if secret and equals else shlex.quote(word))
        hides = secret and not equals
    return " ".join(shown)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
