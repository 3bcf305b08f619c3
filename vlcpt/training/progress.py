"""What a run logs and shows: one line a logging step, in the terminal and in ``train_log.jsonl``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlcpt.data.encode.encoder import IGNORE_INDEX
from vlcpt.file_writes import append_lines, write_file
from vlcpt.run_files import read_log
from vlcpt.training.clock import PHASES, StepClock
from vlcpt.training.cost import PeakShare
from vlcpt.training.loss import BatchTensors

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
        self._bar: Progress | None = None
        self._reset()

    def _reset(self) -> None:
        self.targets, self.tokens, self.rows, self._steps = 0, 0, 0, 0
        self._learning_rates: dict[str, float] = {}
        self._since = time.monotonic()

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line as it is, however narrow the terminal."""
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
        if self._bar:
            self._bar.update(self._task, completed=state.global_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Take the bar away, also when a run is interrupted: it hides the cursor."""
        if self._bar:
            self._bar.stop()
            self._bar = None

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
        if "loss" in logs:
            seconds = max(time.monotonic() - self._since, 1e-9)
            logs["targets_per_second"] = round(self.targets * args.world_size / seconds, 1)
            if self._max_length and self.rows:
                logs["fill"] = round(self.tokens / (self.rows * self._max_length), 4)
            if self.peak_share:
                logs["mfu"] = round(self.peak_share.take(seconds), 4)
            times = self.clock.take()
            logs |= {
                f"seconds/{phase}": round(spent / max(self._steps, 1), 4) for phase, spent in times.items()
            }
            logs |= {f"learning_rate/{name}": rate for name, rate in self._learning_rates.items()}
            self._reset()
        # What was spent on an evaluation is no time of the steps around it.
        self._since += sum(
            value for key, value in logs.items() if key.startswith("eval") and key.endswith("_runtime")
        )
        if not state.is_world_process_zero:
            return
        line = json.dumps({"step": state.global_step, **logs}) + "\n"
        append_lines(Path(str(args.output_dir)) / LOG_NAME, line, "the log of the run", todo=GO_ON)
        if shown := _line(state, logs):
            self.say(shown)


def _line(state: TrainerState, logs: dict[str, float]) -> str | None:
    """One line for people; None for what is only logged."""
    at = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
    if "loss" in logs:
        parts = [f"loss {logs['loss']:.4f}", f"{logs['targets_per_second']:,.0f} targets/s"]
        spent = {phase: logs.get(f"seconds/{phase}", 0.0) for phase in PHASES}
        if total := sum(spent.values()):
            parts.append(
                " ".join(
                    f"{phase.removeprefix('data_')} {value / total:.0%}" for phase, value in spent.items()
                )
            )
        if "mfu" in logs:
            parts.append(f"mfu {logs['mfu']:.0%}")
        if "fill" in logs:
            parts.append(f"fill {logs['fill']:.0%}")
        rates = {key.split("/")[1]: value for key, value in logs.items() if key.startswith("learning_rate/")}
        if len(set(rates.values())) == 1:
            rates = {"": next(iter(rates.values()))}
        parts.append("lr " + " ".join(f"{name} {rate:.2e}".strip() for name, rate in rates.items()))
        return "  ".join([at, *parts])
    losses = {key: value for key, value in logs.items() if key.startswith("eval") and key.endswith("loss")}
    if losses:
        return "  ".join([at, *(f"{key} {value:.4f}" for key, value in losses.items())])
    return None
