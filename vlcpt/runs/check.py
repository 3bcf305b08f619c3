"""``vlcpt check``: what a run would do with its data, and the memory of its device, before it starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, ProcessorMixin

from vlcpt.config.precision import slow_products
from vlcpt.config.schema import DataConfig
from vlcpt.config.yaml import Configs
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.families import Tower
from vlcpt.data.plan.kept_scans import source_key
from vlcpt.data.plan.ledger import BadDataError, Ledger
from vlcpt.data.prepared.read import prepared_from
from vlcpt.data.rows.open import SourceConfig
from vlcpt.data.sources import members_of, open_source
from vlcpt.file_writes import free_bytes, human_size
from vlcpt.folder_locks import holder
from vlcpt.model.counting import TowerParameters, count_towers, empty_model
from vlcpt.model.loading import load_processor
from vlcpt.report.check import (
    Course,
    Speed,
    course_table,
    hints,
    loading_line,
    memory_table,
    problem_lines,
    speed_lines,
)
from vlcpt.report.findings import Findings, Foreseen, count_lost, say_lost
from vlcpt.report.screen import WARNING, Screen, say, visible
from vlcpt.report.terminal import ledger_table
from vlcpt.runs.data import (
    RunData,
    evaluation_entries,
    quiet_libraries,
    show_unread,
    shown,
    with_native_model,
)
from vlcpt.runs.memory import foresee
from vlcpt.runs.speed import Machine, foresee_speed, read_machine, seconds_to_load, this_machine
from vlcpt.training.features import stored_type
from vlcpt.training.step import require_media

LONGEST = 5


def check_run(
    configs: Configs,
    *,
    decode: bool = False,
    num_processes: int | None = None,
    gpu: str | None = None,
    console: Console | None = None,
) -> Findings:
    """Read all data of a run and show what would become of it. No weight is loaded.

    Every bad row is counted, whatever ``on_bad_data`` says. The ledger goes to ``output_dir``, or where a
    run has left its own there, to its folder ``check``.

    Args:
        decode: Decode every medium, too.
        num_processes: That will share the work; default: the launcher's ``WORLD_SIZE``, or 1.
        gpu: The name of theirs, or a ``doctor.json``; default: that of this machine. Where it is known this
            says how long an epoch takes and how many workers that needs; else how many keep up with a step
            of a second. Some packs are loaded for that.

    Raises:
        DocumentError: If a source cannot be opened at all.
        ValueError: If the model's configuration cannot be read.
        RuntimeError: If the ledger does not balance.
    """
    console = console or Screen()
    machine = this_machine() if gpu is None else read_machine(gpu, configs)
    quiet_libraries()
    devices = num_processes or int(os.environ.get("WORLD_SIZE", 1))
    processor = load_processor(configs.model.model_name_or_path)
    configs = with_native_model(configs)
    model = empty_model(configs.model)  # before the data: a wrong model is reported at once
    towers = count_towers(model, configs.model)
    lenient = replace(configs, data=_lenient(configs.data))
    data = RunData(lenient, processor, shown(console), check="pixels" if decode else "container")
    dataset, ledger = _planned(data.train)
    held_out = {
        entry.name: _planned(partial(data.evaluation, entry))[1] for entry in evaluation_entries(lenient.data)
    }
    verdict = _verdict(count_lost(ledger, held_out))
    # First as well as last: what comes between fills more than a screen.
    console.print(verdict)
    console.print(ledger_table(ledger))
    for name, one in held_out.items():
        say(console, f"{name}: {_to_measure(one)}")
    for one in (ledger, *held_out.values()):
        show_unread(one, console)
    for name, one in {"the training data": ledger, **held_out}.items():
        _show_problems(name, one, console)
    foreseen = speed = None
    if dataset is not None:
        console.print()
        foreseen = _show_plan(configs, dataset, model, towers, processor, devices, console)
        speed = _show_speed(configs, dataset, model, towers, processor, machine, devices, console)
    if configs.training.vision_cache is not None:
        _show_cache(configs, (ledger, *held_out.values()), model, console)
    ledger.unmeasured = [one for held in held_out.values() for one in held.dropped]
    folder = _write(ledger, Path(str(configs.training.output_dir)), console)
    if dataset is not None:
        require_media(configs.model.trained_towers, dataset)
    findings = Findings(ledger, held_out, foreseen, speed, str(folder))
    say(console, verdict.plain, str(verdict.style), is_result=True)
    return findings


def _verdict(lost: int) -> Text:
    return Text(say_lost(lost), WARNING if lost else "green")


def _show_cache(
    configs: Configs, ledgers: Iterable[Ledger], model: PreTrainedModel, console: Console
) -> None:
    """What the features of all media take, beside what is free."""
    training, vision = configs.training, model.config.vision_config
    weights = model.dtype
    assert isinstance(weights, torch.dtype)
    tokens = sum(one.total.tokens["media"] for one in ledgers)
    dtype = stored_type(weights, training)
    folder = Path(str(training.vision_cache))
    need = tokens * vision.out_hidden_size * dtype.itemsize
    say(
        console,
        f"vision_cache: {human_size(need)} at most in {folder} ({tokens:,} tokens × "
        f"{vision.out_hidden_size:,} numbers × {dtype.itemsize} bytes); {human_size(free_bytes(folder))} are "
        "free there.",
        WARNING if need > free_bytes(folder) else "",
    )


def _lenient(data: DataConfig) -> DataConfig:
    """The same data, but no bad row stops the reading: a person sees them all at once."""
    on_overlong: Literal["split", "drop"] = "split" if data.on_overlong == "split" else "drop"
    return replace(data, on_bad_data="skip", max_bad_fraction=1.0, on_overlong=on_overlong)


def _planned(plan: Callable[[], CPTDataset]) -> tuple[CPTDataset | None, Ledger]:
    """A data set and its ledger; the ledger alone where no document can be used."""
    try:
        dataset = plan()
    except BadDataError as error:
        if error.ledger is None:
            raise
        return None, error.ledger
    return dataset, dataset.ledger


def _show_plan(
    configs: Configs,
    dataset: CPTDataset,
    model: PreTrainedModel,
    towers: Mapping[Tower, TowerParameters],
    processor: ProcessorMixin,
    devices: int,
    console: Console,
) -> Foreseen:
    """Packs and steps, memory, and what to change."""
    training, data, ledger = configs.training, configs.data, dataset.ledger
    course = Course(
        items=len(dataset),
        devices=devices,
        rows=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        epochs=training.num_train_epochs,
        max_steps=training.max_steps,
    )
    longest, packs = dataset.longest(LONGEST), dataset.pack_sizes()
    console.print(course_table(course, ledger, longest, training.max_length))
    merge = processor.image_processor.merge_size**2
    memory = foresee(configs, model, towers, packs, devices=devices, merge=merge)
    console.print("", memory_table(memory))
    if (slow := slow_products(training)) is not None:
        say(console, slow)
    advice = hints(
        ledger,
        max_length=training.max_length,
        longest=longest[0][1],
        mean_length=float(packs[:, 0].sum()) / ledger.samples,
        packing=training.packing,
        on_bad_data=data.on_bad_data,
        max_bad_fraction=data.max_bad_fraction,
        on_overlong=data.on_overlong,
        with_checkpointing=memory.get("checkpointing"),
        max_steps=course.max_steps,
        steps_per_epoch=course.steps_per_epoch,
        steps=course.steps,
        trained_too=_trained_too(data),
        markings=dataset.markings(),
    )
    if advice:
        console.print(Text("\nwhat to change", "italic"))
        _list(console, advice)
    return Foreseen(course, longest, memory, advice)


def _trained_too(data: DataConfig) -> list[str]:
    """The sets of held-out data that are trained, too, under any name: the same path and split, or prepared
    from the same rows."""

    def members(*roles: str) -> list[SourceConfig]:
        return [one for role in roles for entry in getattr(data, role) for one in members_of(entry, role)]

    trained, held_out = members("train_data", "replay_data"), members("eval_data", "retention_data")
    looks = any(prepared_from(one.path) for one in (*trained, *held_out))
    places = {place for one in trained for place in _places(one, data, looks)}
    return [one.name for one in held_out if places & set(_places(one, data, looks))]


def _places(source: SourceConfig, data: DataConfig, looks: bool) -> Iterator[tuple[str, str | None]]:
    """What tells that two sources are the same data.

    Args:
        looks: Whether some source is prepared: then the rows of the others are known as it knows its own.
    """
    path = Path(source.path)
    yield (str(path.resolve()) if path.exists() else source.path), source.split
    if not looks:
        return
    rows = prepared_from(source.path) or source_key(
        open_source(source, untagged=data.untagged, max_row_bytes=data.max_row_bytes)
    )
    if rows is not None:
        yield "rows", rows


def _show_problems(name: str, ledger: Ledger, console: Console) -> None:
    if ledger.dropped:
        console.print(Text(visible(f"\nof {name}, {len(ledger.dropped):,} would be lost"), "bold"))
    _list(console, problem_lines(ledger.dropped))


def _write(ledger: Ledger, output: Path, console: Console) -> Path:
    """Write the ledger where it takes nobody's place; the folder."""
    is_taken = (output / "config.yaml").exists() or holder(output) is not None
    folder = output / "check" if is_taken else output
    ledger.write(folder)
    instead = f", because {output} holds a run" if folder != output else ""
    say(console, f"\nledger.json and dropped.jsonl are in {folder}{instead}")
    return folder


def _to_measure(ledger: Ledger) -> str:
    """How much of a set will be evaluated."""
    used, targets = ledger.total.documents["used"], ledger.total.tokens["targets"]
    documents = f"{used:,} document{'s' * (used != 1)}"
    left = ledger.total.documents["not_drawn"]
    drawn = f", drawn from {used + left:,}" if left else ""
    return f"{documents} with {targets:,} target{'s' * (targets != 1)} to measure{drawn}"


def _show_speed(
    configs: Configs,
    dataset: CPTDataset,
    model: PreTrainedModel,
    towers: Mapping[Tower, TowerParameters],
    processor: ProcessorMixin,
    machine: Machine | None,
    devices: int,
    console: Console,
) -> Speed | None:
    """What loading takes here; and an epoch, where the machine that will train is known."""
    workers = configs.training.workers
    speed = None
    if machine is not None:
        speed = foresee_speed(configs, dataset, model, towers, processor, machine, devices)
        lines = speed_lines(speed, workers)
    else:
        one_step = configs.training.per_device_train_batch_size * configs.training.gradient_accumulation_steps
        loads = seconds_to_load(configs, dataset, model, processor)
        lines = [loading_line(loads, one_step, workers)]
    console.print(Text("\nspeed", "italic"))
    _list(console, lines)
    return speed


def _list(console: Console, lines: list[str]) -> None:
    """Print lines after arrows: indented in a terminal, unbroken in a file."""
    if not console.is_terminal:
        for line in lines:
            say(console, f"→ {line}")
        return
    grid = Table.grid(padding=(0, 1))
    grid.add_column()
    grid.add_column(overflow="fold")
    for line in lines:
        grid.add_row("→", Text(visible(line)))
    console.print(grid)
