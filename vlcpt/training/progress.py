"""What a run logs and shows: a line for each logging step, in the terminal and in ``train_log.jsonl``."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlcpt.data.encode.encoder import IGNORE_INDEX
from vlcpt.eval_names import UNNAMED, Number, measured_in
from vlcpt.file_writes import append_lines, write_file
from vlcpt.run_files import duration, read_log
from vlcpt.training.clock import PHASES, StepClock
from vlcpt.training.cost import PeakShare
from vlcpt.training.loss import BatchTensors

logger = logging.getLogger(__name__)

LOG_NAME = "train_log.jsonl"
CPU = torch.device("cpu")
GO_ON = "Then start again with --resume_from_checkpoint auto."


class RunProgress(TrainerCallback):
    """Counts what goes by, shows a bar with the time left, and writes the log.

    Args:
        max_length: Tokens of a row, for the fill; None unpacked.
        console: Where the lines go.
        device: What the time of steps is measured on.

    Example:
        >>> RunProgress(max_length=64).targets
        0
    """

    def __init__(
        self, max_length: int | None, console: Console | None = None, device: torch.device = CPU
    ) -> None:
        self.console = console or Console()
        self.clock = StepClock(device)
        self.peak_share: PeakShare | None = None
        self._max_length = max_length
        self._device = device
        self._bar: Progress | None = None
        # Steps and seconds of the last lines, for the time that is left.
        self._pace: deque[tuple[int, float]] = deque(maxlen=20)
        self._reset()

    def _reset(self) -> None:
        self.targets, self.tokens, self.rows, self._steps = 0, 0, 0, 0
        self._learning_rates: dict[str, float] = {}
        self._since = time.monotonic()

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line as it is, however narrow the terminal."""
        if self.console.quiet and style == "yellow":
            logger.warning("%s", text)  # a warning is shown with --quiet, too
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def count(self, batches: Sequence[BatchTensors]) -> None:
        """Note the batches of a step on this rank, before they are used."""
        for batch in batches:
            if self.peak_share:
                self.peak_share.count(batch)
            labels = batch["labels"]
            assert isinstance(labels, torch.Tensor)
            is_target = labels[:, 1:] != IGNORE_INDEX
            self.targets += int(is_target.sum())
            # A row ends with a target; what comes after its last one is padding.
            places = torch.arange(2, is_target.shape[1] + 2, device=labels.device)
            self.tokens += int((is_target * places).amax(dim=1).sum())
            self.rows += int(is_target.any(dim=1).sum())  # not those that only fill up an epoch

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start the bar, and forget what the log says of steps that will be run again."""
        self._reset()
        self._pace.clear()
        self.clock.take()
        if not state.is_world_process_zero:
            return
        log = Path(str(args.output_dir)) / LOG_NAME
        if log.is_file():
            # A start that failed may have left its evaluation before step 1, which is now made again.
            kept = [line for line, _ in read_log(log.parent, state.global_step or -1)]
            write_file(log, "".join(kept), "the log of the run", todo=GO_ON)
        if self.console.is_terminal and not args.disable_tqdm:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("steps, left"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Note the learning rates that this step uses; when the log is written they have moved on."""
        optimizer = kwargs.get("optimizer")
        for group in getattr(optimizer, "param_groups", []):
            self._learning_rates[group.get("name", "all")] = float(group["lr"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.clock.end("optimizer")
        self._steps += 1
        # A run with fewer steps than logging_steps would show no loss at all.
        logs_steps = args.logging_strategy == IntervalStrategy.STEPS
        if logs_steps and state.global_step == state.max_steps < state.logging_steps:
            control.should_log = True
        is_last = state.global_step == state.max_steps or control.should_training_stop
        if is_last and getattr(args, "eval_on_end", False):
            control.should_evaluate = True
        if self._bar:
            self._bar.update(self._task, completed=state.global_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Take the bar away, also when a run is interrupted: it hides the cursor."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def measures(
        self, args: TrainingArguments, state: TrainerState, loss: float, of_sources: Mapping[str, float]
    ) -> dict[str, float]:
        """What a log line says of the steps since the last one, besides their loss. Counting starts anew.

        Args:
            loss: The loss of these steps.
            of_sources: The same for each source.

        Returns:
            By the names that trackers and ``trainer.state.log_history`` get; docs/log.md lists them.
        """
        seconds = max(time.monotonic() - self._since, 1e-9)
        steps = max(self._steps, 1)
        found = _running_mean(state, loss)
        found |= {f"loss/{name}": round(value, 6) for name, value in of_sources.items()}
        found["targets_per_second"] = round(self.targets * args.world_size / seconds, 1)
        if self._max_length and self.rows:
            found["fill"] = round(self.tokens / (self.rows * self._max_length), 4)
        if self.peak_share:
            found["mfu"] = round(self.peak_share.take(seconds), 4)
        times = self.clock.take()
        found |= {f"seconds/{phase}": round(spent / steps, 4) for phase, spent in times.items()}
        if total := sum(times.values()):
            found["data_wait"] = round(times["data_wait"] / total, 4)
        found |= {f"learning_rate/{name}": rate for name, rate in self._learning_rates.items()}
        found["peak_memory_gib"] = round(_peak_memory(self._device) / 2**30, 3)
        self._pace.append((steps, seconds))
        pace = sum(spent for _, spent in self._pace) / sum(done for done, _ in self._pace)
        found["eta_seconds"] = round(pace * max(state.max_steps - state.global_step, 0), 1)
        self._reset()
        return found

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Write one line to the terminal and one to the log."""
        logs = dict(logs or {})
        if "train_runtime" in logs:
            return  # Trainer's closing summary: its mean loss is of the steps since a resume, not of the run
        # What was spent on an evaluation is no time of the steps around it.
        self._since += sum(
            value for key, value in logs.items() if key.startswith("eval") and key.endswith("_runtime")
        )
        if not state.is_world_process_zero:
            return
        line = json.dumps({"step": state.global_step, **logs}) + "\n"
        append_lines(Path(str(args.output_dir)) / LOG_NAME, line, "the log of the run", todo=GO_ON)
        if shown := _line(state, logs, self.console.width if self.console.is_terminal else None):
            self.say(shown)


_WINDOW = 10  # log lines in a running mean


def _running_mean(state: TrainerState, loss: float) -> dict[str, float]:
    """The mean loss of the last log lines, and how far it is from that of as many lines before them."""
    before = (float(line["loss"]) for line in reversed(state.log_history) if "loss" in line)
    losses = [loss, *islice(before, 2 * _WINDOW - 1)]
    count = min(_WINDOW, (len(losses) + 1) // 2)
    recent, earlier = losses[:count], losses[count : 2 * count]
    mean = sum(recent) / len(recent)
    found = {"loss_mean": round(mean, 6)}
    if earlier:
        found["loss_trend"] = round(mean - sum(earlier) / len(earlier), 6)
    return found


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a GPU; elsewhere the most that this process has held."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _line(state: TrainerState, logs: Mapping[str, float], width: int | None) -> str | None:
    """One line for people; None for what is only logged.

    Args:
        width: Columns of the terminal, of which what matters least is left out; None: no limit.
    """
    at = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
    if "loss" in logs:
        parts = _step_parts(logs)
        while width is not None and len(at) + sum(len(text) + 2 for _, text in parts) > width:
            worst = max(range(len(parts)), key=lambda number: parts[number][0])
            if parts[worst][0] == 0:
                break
            del parts[worst]
        return "  ".join([at, *(text for _, text in parts)])
    if found := measured_in(logs):
        return "  ".join([at, "evaluation", *(_of_set(name, one) for name, one in found.items())])
    return None


def _of_set(name: str, measured: Mapping[Number, float]) -> str:
    """An evaluation of a set for people.

    Example:
        >>> _of_set("new", {"loss": 1.25, "reliance": 0.5})
        'new 1.2500 (reliance +0.5000)'
    """
    loss = f"{name if name != UNNAMED else 'loss'} {measured['loss']:.4f}"
    return f"{loss} (reliance {measured['reliance']:+.4f})" if "reliance" in measured else loss


def _step_parts(logs: Mapping[str, float]) -> list[tuple[int, str]]:
    """What the line of a step says, in order, each part with a number: those with the highest go first."""
    mean = f" (mean {logs['loss_mean']:.4f}" if "loss_mean" in logs else ""
    trend = f" {logs['loss_trend']:+.4f})" if "loss_trend" in logs else ")" if mean else ""
    parts = [(0, f"loss {logs['loss']:.4f}"), (1, f"{mean}{trend}".strip())]
    sources = {key.partition("/")[2]: value for key, value in logs.items() if key.startswith("loss/")}
    parts.append((5, " ".join(f"{name} {value:.4f}" for name, value in sources.items())))
    if "targets_per_second" in logs:
        parts.append((3, f"{logs['targets_per_second']:,.0f} targets/s"))
    spent = {phase: logs.get(f"seconds/{phase}", 0.0) for phase in PHASES}
    if total := sum(spent.values()):
        shares = {phase.removeprefix("data_"): f"{value / total:.0%}" for phase, value in spent.items()}
        parts.append((4, f"wait {shares.pop('wait')}"))
        parts.append((8, " ".join(f"{phase} {share}" for phase, share in shares.items())))
    if "mfu" in logs:
        parts.append((6, f"mfu {logs['mfu']:.0%}"))
    if "fill" in logs:
        parts.append((7, f"fill {logs['fill']:.0%}"))
    rates = {key.split("/")[1]: value for key, value in logs.items() if key.startswith("learning_rate/")}
    if len(set(rates.values())) == 1:
        rates = {"": next(iter(rates.values()))}
    if rates:
        parts.append((6, "lr " + " ".join(f"{name} {rate:.2e}".strip() for name, rate in rates.items())))
    if "eta_seconds" in logs:
        parts.append((2, f"left {duration(logs['eta_seconds'])}"))
    return [(rank, text) for rank, text in parts if text]
