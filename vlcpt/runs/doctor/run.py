"""``vlcpt doctor``: every check on this machine, with the run's own kernels, type, batch size and ranks."""

from __future__ import annotations

import gc
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from vlcpt.config.rules import missing_packages
from vlcpt.config.yaml import Configs, EarlyConfig
from vlcpt.errors import ConfigError, refuse
from vlcpt.file_writes import write_json
from vlcpt.interrupts import answered, interrupt
from vlcpt.model.attention import attention_for
from vlcpt.model.loading import check_model, load_processor, read_config, resolve_dtype
from vlcpt.report.doctor import Diagnosis, Line, cause_lines, doctor_table, verdict_line
from vlcpt.report.environment import facts
from vlcpt.report.screen import Screen, say
from vlcpt.runs.data import quiet_libraries, shown, with_native_model
from vlcpt.runs.doctor.base import prepare_base
from vlcpt.runs.doctor.batches import equal_calls, media_untrained, own_positions, packed_as_alone
from vlcpt.runs.doctor.features import cached_as_computed
from vlcpt.runs.doctor.measures import foreseen_memory, speed
from vlcpt.runs.doctor.outcomes import Outcomes
from vlcpt.runs.doctor.steps import (
    any_split,
    fast_as_plain,
    frozen_untouched,
    remove,
    resumed_as_uninterrupted,
)
from vlcpt.runs.doctor.subject import Subject, forget_engine, release
from vlcpt.training.guards import asked_stage, check_launch
from vlcpt.training.ranks import RankWatch, first_rank_only

logger = logging.getLogger(__name__)
Check = Callable[[Subject, str], Line]

# In the order in which they run; the towers' calls before anything that waits for another rank.
CHECKS: tuple[tuple[str, Check], ...] = (
    ("positions = the model's own", own_positions),
    ("media are never targets", media_untrained),
    ("packed = alone", packed_as_alone),
    ("every rank calls the towers equally", equal_calls),
    ("fast paths = plain", fast_as_plain),
    ("cached features = computed", cached_as_computed),
    ("step = any split of it", any_split),
    ("frozen towers are untouched", frozen_untouched),
    ("save and resume = uninterrupted", resumed_as_uninterrupted),
    ("memory as foreseen", foreseen_memory),
    ("speed", speed),
)
# In these no rank waits for another one; in all others each does.
_APART = (own_positions, media_untrained, packed_as_alone)


def doctor_run(
    early: EarlyConfig,
    configs: Configs,
    output: Path,
    *,
    quick: bool = False,
    console: Console | None = None,
    is_given: bool = True,
) -> Diagnosis:
    """Examine this machine; print a table, and write a JSON file for a bug report.

    Args:
        early: The configuration before its settings were made: they are made again, changed.
        configs: The same, complete.
        output: The JSON file.
        quick: Two minutes on two cores: few steps, few layers of a large model.
        is_given: Whether the configuration is the user's.

    Raises:
        ConfigError: For a configuration that no run could start with, or an output that is no file.
    """
    started = time.monotonic()
    console = console or Screen()
    training = configs.training
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: not a file in a folder that is there. Give another one.")
    refuse(missing_packages({**vars(configs.model), **vars(training)}))
    check_launch(training)
    quiet_libraries()
    ranks = RankWatch(training)
    # Its trainings have no checkpoint that anybody could use: they end at once.
    with answered("ending without a report", interrupt, is_final=True), ranks.watched():
        made = first_rank_only(
            training, lambda: tempfile.mkdtemp(prefix=".vlcpt-doctor-", dir=output.absolute().parent)
        )
        folder = Path(str(made))
        try:
            with _quiet():
                subject = _subject(early, configs, folder, quick=quick)
                diagnosed = partial(
                    _diagnosed, subject, _described(subject, configs, is_given=is_given), started
                )

                def report(lines: Sequence[Line]) -> None:
                    remove(folder)
                    console.show_cursor()  # a bar hides it
                    _show(diagnosed([*lines, *_not_run(len(lines))]), output, console)

                with Outcomes(training, report) as outcomes:
                    lines = _examined(subject, ranks, outcomes, console)
            try:
                if training.process_index == 0:
                    report(lines)
            finally:
                outcomes.finish()
        finally:
            if training.process_index == 0:
                remove(folder)
    return diagnosed(lines)


def _diagnosed(
    subject: Subject, run: Mapping[str, object], started: float, lines: Sequence[Line]
) -> Diagnosis:
    memory = subject.notes.get("memory")
    return Diagnosis(
        machine=facts(),
        run=run,
        lines=lines,
        speed=subject.notes.get("speed"),
        memory=None if memory is None else {key: int(one or 0) for key, one in memory.items()},
        seconds=time.monotonic() - started,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what a training logs of itself: doctor has ten of them, and a table."""
    ours, theirs = logging.getLogger("vlcpt"), logging.getLogger("transformers")
    before = ours.level, theirs.level
    gc.freeze()  # what the imports made takes a second to search, again after each model
    ours.setLevel(max(ours.getEffectiveLevel(), logging.WARNING))
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        gc.unfreeze()
        ours.setLevel(before[0])
        theirs.setLevel(before[1])


def _subject(early: EarlyConfig, configs: Configs, folder: Path, *, quick: bool) -> Subject:
    """What is examined: the run, with the base that stands for its own."""
    training = configs.training
    processor = load_processor(configs.model.model_name_or_path)
    config = with_native_model(configs).model

    def prepare() -> object:
        forget_engine()
        return prepare_base(config, processor, folder, training.device, quick=quick)

    base = first_rank_only(training, prepare)
    if base.folder != config.model_name_or_path:  # type: ignore[attr-defined]
        # A saved adapter is of the base's own shapes.
        config = replace(config, model_name_or_path=base.folder, adapter_name_or_path=None)  # type: ignore[attr-defined]
    check_model(config)
    return Subject(early, training, config, base, processor, folder, quick)  # type: ignore[arg-type]


def _examined(subject: Subject, ranks: RankWatch, outcomes: Outcomes, console: Console) -> list[Line]:
    """The lines of the table, each of what all ranks found."""
    lines: list[Line] = []
    is_shared = True
    for number, (name, check) in enumerate(shown(console)(CHECKS, "examining")):
        ranks.at(0, name)
        if not is_shared:
            return [*lines, *_not_run(number)]
        outcomes.begin(name, apart=check in _APART)
        mine, raised = _one(subject, name, check)
        found = outcomes.exchange(mine, raised=raised)
        lines.append(found.line)
        # A rank that raised alone in a check of its own has missed no collective.
        is_shared = found.is_shared or check in _APART
        if check is equal_calls and found.line.status == "failed":
            is_shared = False
    return lines


def _not_run(first: int) -> list[Line]:
    """The lines of the checks from this number on, after ranks have lost each other."""
    return [
        Line(name, "not run", detail="a rank would wait for another one, see above")
        for name, _ in CHECKS[first:]
    ]


def _one(subject: Subject, name: str, check: Check) -> tuple[Line, bool]:
    """A line, and whether the check raised."""
    start = time.monotonic()
    try:
        return check(subject, name), False
    # Whatever a kernel, a driver or a library raises here is what doctor is there to report.
    except Exception as error:
        logger.debug("%s", name, exc_info=True)
        first = f"{type(error).__name__}: {(str(error).strip() or repr(error)).splitlines()[0]}"
        return Line(name, "failed", detail=first), True
    finally:
        release()
        logger.debug("%s took %.1f s", name, time.monotonic() - start)


def _described(subject: Subject, configs: Configs, *, is_given: bool) -> dict[str, object]:
    """What was examined and how it runs. No path is in it."""
    training, base = configs.training, subject.base
    found = read_config(subject.config.model_name_or_path)
    stage = asked_stage(training)
    return {
        "base": Path(configs.model.model_name_or_path).name if is_given else "vlcpt demo",
        "weights": base.weights,
        "parameters": base.parameters,
        "layers": list(base.layers),
        "of_layers": list(base.all_layers),
        "tuning": configs.model.tuning,
        "trained": list(configs.model.trained_towers),
        "attention": attention_for(found, configs.model.attn_implementation),
        "dtype": str(resolve_dtype(subject.config.dtype, found)).removeprefix("torch."),
        "products": str(subject.autocast or resolve_dtype(subject.config.dtype, found)).removeprefix(
            "torch."
        ),
        "batch_size": training.per_device_train_batch_size,
        "accumulation": training.gradient_accumulation_steps,
        "max_length": training.max_length,
        "activation_checkpointing": training.recomputes_activations,
        "ranks": subject.ranks,
        "engine": "DDP"
        if stage is None and subject.ranks > 1
        else None
        if stage is None
        else f"ZeRO-{stage}",
        "device": _device_name(subject.device),
        "quick": subject.quick,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' if threads > 1 else ''}"


def _show(diagnosis: Diagnosis, output: Path, console: Console) -> None:
    run = diagnosis.run
    layers = "" if run["layers"] == run["of_layers"] else f", {run['layers']} of {run['of_layers']} layers"
    parts = [
        f"{run['base']} ({run['weights']} weights{layers})",
        run["tuning"],
        run["products"],
        run["attention"],
    ]
    parts += [f"batch {run['batch_size']}", f"ranks {run['ranks']}", run["device"]]
    say(console, ", ".join(map(str, parts)))
    console.print(doctor_table(diagnosis.lines, console.width))
    for line in cause_lines(diagnosis.lines):
        say(console, line, "bold red", is_result=True)
    write_json(output, diagnosis.as_json(), "what was found")
    use = "" if diagnosis.passed else ", for a bug report"
    say(
        console,
        f"{verdict_line(diagnosis.lines)}. {diagnosis.seconds:.0f} s; written to {output}{use}",
        "green" if diagnosis.passed else "bold red",
        is_result=True,
    )
