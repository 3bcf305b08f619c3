"""What a run has done, in a few lines at its end: losses from and to, time, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlcpt.eval_names import Number, measured_in
from vlcpt.report.numbers import loss_ends
from vlcpt.report.screen import Sheet

LogEntry = Mapping[str, object]


@dataclass(frozen=True)
class RunSummary:
    """The course of a run, from its log.

    Args:
        steps: Optimizer steps.
        loss: Mean over the first lines of the log and over the last ones, nats per target; None of a run
            that logged none.
        sets: By the name of each evaluation set its first and its last loss.
        reliance: The same of what blank images cost, of sets that were measured with them.
        seconds: Those of training since it was started last, evaluations included; None where it did not end.
    """

    steps: int
    loss: tuple[float, float] | None
    sets: Mapping[str, tuple[float, float]]
    seconds: float | None = None
    reliance: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def summarise(log: Iterable[LogEntry]) -> RunSummary:
    """The course of a run.

    Args:
        log: Its lines, as in ``train_log.jsonl`` and ``trainer.state.log_history``.

    Example:
        >>> log = [{"step": 0, "eval_new_loss": 6.0}, *({"step": n, "loss": 4.0 - n} for n in (1, 2, 3))]
        >>> summarise([*log, {"step": 3, "eval_new_loss": 2.0}])
        RunSummary(steps=3, loss=(3.0, 1.0), sets={'new': (6.0, 2.0)}, seconds=None, reliance={})
    """
    losses: list[float] = []
    ends: dict[Number, dict[str, tuple[float, float]]] = {"loss": {}, "reliance": {}}
    steps, seconds = 0, None
    for line in log:
        steps = line["step"] if isinstance(line.get("step"), int) else steps  # type: ignore[assignment]
        if isinstance(spent := line.get("train_runtime"), int | float):
            seconds = float(spent)
        if isinstance(loss := line.get("loss"), int | float):
            losses.append(float(loss))
        for name, measured in measured_in(line).items():
            for number, own in ends.items():
                if (value := measured.get(number)) is not None:
                    own[name] = own.get(name, (value, value))[0], value
    return RunSummary(steps, loss_ends(losses), ends["loss"], seconds, ends["reliance"])


def summary_table(summary: RunSummary) -> Sheet:
    """Losses from and to; of training over the first and the last lines of the log.

    Below a set stands how far its text relies on its images.
    """
    pairs = [("training", summary.loss)] if summary.loss else []
    for name, ends in summary.sets.items():
        pairs.append((name, ends))
        pairs += [("  reliance", summary.reliance[name])] if name in summary.reliance else []
    rows = [
        (label, [f"{first:.4f}", f"{last:.4f}", f"{last - first:+.4f}"]) for label, (first, last) in pairs
    ]
    said = ["training: mean of the first and last log lines"] if summary.loss else []
    said += ["reliance: cost of blank images"] if summary.reliance else []
    return Sheet("loss, nats per target", ["from", "to", "change"], rows, "; ".join(said))


def next_commands(
    config: Path | None, output: Path, *, evaluates: bool, is_judged: bool = False, merges_first: bool = False
) -> Sequence[str]:
    """What a person would type next, as typed.

    Args:
        config: The file that is the run's configuration alone; by default the resolved one in its folder.
        output: The run's folder.
        evaluates: Whether there is something to measure.
        is_judged: Whether the run has written ``eval.json`` itself.
        merges_first: Whether only a merged model can be pushed: an adapter whose base is a folder.

    Example:
        >>> for line in next_commands(Path("my.yaml"), Path("runs/manuals"), evaluates=True):
        ...     print(line)
        vlcpt eval my.yaml --checkpoint runs/manuals --output runs/manuals/eval.json
        vlcpt merge runs/manuals runs/manuals-merged
        vlcpt push runs/manuals OWNER/NAME --dry-run
    """
    run = shlex.quote(str(output))
    evaluation = shlex.quote(str(output / "eval.json"))
    merged = shlex.quote(f"{output}-merged")
    settings = config or output / "config.yaml"
    found = [f"vlcpt eval {shlex.quote(str(settings))} --checkpoint {run} --output {evaluation}"]
    if is_judged:  # the same again would say nothing new
        found = [
            f"vlcpt eval {shlex.quote(str(settings))} --checkpoint {run} --samples 5 --tokens tokens.html"
        ]
    pushed = f"{merged} OWNER/NAME --run {run}" if merges_first else f"{run} OWNER/NAME"
    return [
        *(found if evaluates else []),
        f"vlcpt merge {run} {merged}",
        f"vlcpt push {pushed} --dry-run",
    ]
