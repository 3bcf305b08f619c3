"""``vlcpt train``: from reading the data to saving the model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text
from transformers import IntervalStrategy, ProcessorMixin

from vlcpt.config.precision import autocast_type
from vlcpt.config.rules import missing_packages
from vlcpt.config.yaml import Configs, dump_config
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.plan.kept_scans import remove_plans
from vlcpt.errors import refuse
from vlcpt.eval_names import measured_in
from vlcpt.file_writes import WriteError, write_file, write_json
from vlcpt.folder_locks import hold
from vlcpt.hub.push import open_repository, push_run, without_pushes
from vlcpt.interrupts import finished_first
from vlcpt.model.loading import (
    check_model,
    load_model,
    load_processor,
    read_config,
    resolve_dtype,
)
from vlcpt.model.tuning import tower_table
from vlcpt.report.environment import facts
from vlcpt.report.screen import WARNING, Screen, say, visible
from vlcpt.report.summary import RunSummary, next_commands, summarise, summary_table
from vlcpt.report.terminal import ledger_table, towers_table
from vlcpt.report.verdict import CommandPaths, verdict_of_run
from vlcpt.run_files import FACTS, PAGE, PLANS, asks_to_resume, duration, require_empty
from vlcpt.runs.data import (
    RunData,
    quiet_libraries,
    retention_names,
    show_unmeasured,
    show_unread,
    shown,
    with_native_model,
)
from vlcpt.runs.evaluate import Evaluation, evaluate_trained
from vlcpt.runs.memory import choose_checkpointing
from vlcpt.runs.page import RunPage
from vlcpt.training.checkpoints.files import RECORD, delete_checkpoint, find_checkpoint, list_checkpoints
from vlcpt.training.guards import asked_stage, check_launch, check_packed
from vlcpt.training.ranks import RankWatch, first_rank_only, require_equal
from vlcpt.training.step import require_media
from vlcpt.training.trainer import CPTTrainer

# What a run writes, and --overwrite deletes first: a model beside an older adapter would load with it.
RUN_FILES = (
    *("config.yaml", "ledger.json", "dropped.jsonl", "train_log.jsonl", "eval.json", FACTS, PAGE, RECORD),
    *("adapter_config.json", "adapter_model.safetensors", "config.json", "generation_config.json"),
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
)


def train_run(
    configs: Configs,
    console: Console | None = None,
    *,
    config_path: Path | None = None,
    command: str = "",
    is_overridden: bool = False,
) -> CPTTrainer:
    """Train, from reading the data to saving the model.

    Args:
        config_path: The file that the configuration was read from.
        command: What was typed, for the run's page; see :func:`vlcpt.runs.page.typed`.
        is_overridden: Whether keys were given beside the file, so that it does not repeat the run alone.

    Raises:
        ConfigError: Before anything is read, if the output folder is not free, or another run's.
        ValueError: If the data or the run failed.
    """
    console = console or Screen()
    training = configs.training
    refuse(missing_packages({**vars(configs.model), **vars(training)}))
    check_launch(training)
    output = Path(str(training.output_dir))
    ranks = RankWatch(training)
    with ExitStack() as held:
        with ranks.watched():
            first_rank_only(training, lambda: held.enter_context(hold(output)))
        page = RunPage(output, is_main=training.process_index == 0, command=command)
        with page.kept():
            trainer, evaluation = _train_held(configs, console, ranks, config_path, page)
            if page.is_main:
                settings = None if is_overridden else config_path
                _show_summary(trainer, configs, console, settings, evaluation, page.resumed_at)
            return trainer


def _train_held(
    configs: Configs, console: Console, ranks: RankWatch, config_path: Path | None, page: RunPage
) -> tuple[CPTTrainer, Evaluation | None]:
    """The run, in an output folder into which no other one writes, and what came of it."""
    training = configs.training
    output = Path(str(training.output_dir))
    is_main = training.process_index == 0
    repo_id: str | None = None

    def open_outputs() -> None:
        nonlocal repo_id
        if gone := prepare_output(configs, config_path):
            say(console, f"overwrite: deleted {', '.join(gone)}")
        # Reported before the data is read; the trainer looks again, and reads all of it.
        find_checkpoint(training.resume_from_checkpoint, output, hashes=False)
        repo_id = open_repository(configs) if training.push_to_hub else None

    if training.overwrite and training.local_process_index == 0:
        remove_plans(output / PLANS)  # also where machines do not share the folder
    with ranks.watched():
        first_rank_only(training, open_outputs)
        if is_main:  # before anything is read, so that what fails then has its page
            page.begin(
                resumes=asks_to_resume(training.resume_from_checkpoint),
                versions={**facts(), "processes": str(training.world_size)},
            )
        trainer = _prepare_trainer(configs, console, ranks, page)
    dataset = trainer.train_dataset
    assert isinstance(dataset, CPTDataset)
    try:
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    finally:
        if is_main and len(dataset.failures):
            _account_failures(dataset, output, console)
    with finished_first("the model"):
        trainer.save_model()
        trainer.accelerator.wait_for_everyone()  # or a launcher could end rank 0 while it saves
        if is_main:
            say(console, f"saved in {output}", is_result=True)
    evaluation = _judge(trainer, configs, console if is_main else Console(quiet=True), ranks)
    if evaluation and is_main:
        write_json(output / "eval.json", evaluation.as_json(), "what was measured")
    if repo_id is not None:
        say(console, f"pushed to {push_run(configs, repo_id).url}", is_result=True)
    return trainer, evaluation


def _judge(trainer: CPTTrainer, configs: Configs, console: Console, ranks: RankWatch) -> Evaluation | None:
    """What came of a run, measured as ``vlcpt eval`` does while the model is there.

    None where it is not to be measured at its end, and under ZeRO-3, where no rank holds the whole model.
    """
    training, sets = configs.training, trainer.eval_dataset
    if not training.eval_on_end or not isinstance(sets, Mapping) or asked_stage(training) == 3:
        return None
    processor, model = trainer.processing_class, trainer.model
    assert isinstance(processor, ProcessorMixin) and model is not None
    start = [measured_in(line) for line in trainer.state.log_history if line["step"] == 0]
    before = {name: one["loss"] for line in start for name, one in line.items()}
    own = {name: one for name, one in sets.items() if isinstance(one, CPTDataset)}
    return evaluate_trained(model, own, processor, configs, console, ranks, before=before)


def _show_summary(
    trainer: CPTTrainer,
    configs: Configs,
    console: Console,
    config_path: Path | None,
    evaluation: Evaluation | None,
    resumed_at: int,
) -> None:
    """From where to where the run came, and what a person would do next."""
    summary = summarise(trainer.state.log_history)
    console.print(summary_table(summary))
    output = Path(str(configs.training.output_dir))
    paths = CommandPaths.of(config_path or output / "config.yaml", output)
    said = verdict_of_run(trainer.state.log_history, retention_names(configs.data), paths)
    if said := replace(evaluation, paths=paths).verdict if evaluation is not None else said:
        console.print(said, soft_wrap=not console.is_terminal)
    say(console, f"{_course(summary, resumed_at)}. Its page: {output / PAGE}. Next:")
    sets = configs.data.eval_data or configs.data.retention_data
    # Nobody else has a base that is a folder.
    merges = configs.model.tuning != "full" and Path(configs.model.model_name_or_path).is_dir()
    judged = evaluation is not None
    for line in next_commands(
        config_path, output, evaluates=bool(sets), is_judged=judged, merges_first=merges
    ):
        # A line to copy: unbroken, however narrow the terminal.
        console.print(Text(f"  {visible(line)}"), soft_wrap=True)


def _course(summary: RunSummary, resumed_at: int) -> str:
    """How many steps a run took, and in how long; its time is of the last start, so its steps are as well.

    Example:
        >>> _course(RunSummary(16, None, {}, 61.0), 0), _course(RunSummary(16, None, {}, 61.0), 12)
        ('16 steps in 1 min 01 s', '12 + 4 steps, 1 min 01 s since the resume')
    """
    time = "" if summary.seconds is None else duration(summary.seconds)
    if resumed_at:
        new = summary.steps - resumed_at
        return f"{resumed_at:,} + {new:,} step{'s' * (new != 1)}{time and f', {time} since the resume'}"
    return f"{summary.steps:,} step{'s' * (summary.steps != 1)}{time and f' in {time}'}"


def prepare_output(configs: Configs, config_path: Path | None = None) -> list[str]:
    """Refuse an output folder that holds another run's work, or empty it if that is asked for.

    Args:
        config_path: See :func:`require_empty`.

    Returns:
        The checkpoints that were deleted.
    """
    output = Path(str(configs.training.output_dir))
    require_empty(output, config_path, vars(configs.training))
    if not configs.training.overwrite:
        return []
    deleted = list_checkpoints(output)
    for folder in deleted:
        delete_checkpoint(folder)
    for path in (path for name in RUN_FILES for path in output.glob(name)):
        if path.is_file():
            path.unlink()
    remove_plans(output / PLANS)
    return [folder.name for folder in deleted]


def _account_failures(dataset: CPTDataset, output: Path, console: Console) -> None:
    """The ledger once more, where it is another than before training."""
    is_failing = sys.exc_info()[0] is not None
    count = len(dataset.failures)
    documents = f"{count:,} document{'s' * (count != 1)}"
    say(console, f"{documents} failed in training, see dropped.jsonl. The ledger is now:")
    console.print(ledger_table(dataset.ledger))
    try:
        dataset.ledger.write(output)
    except WriteError as error:
        if not is_failing:
            raise
        # What ended the run is the error to report.
        say(console, str(error), WARNING)


def _prepare_trainer(configs: Configs, console: Console, ranks: RankWatch, page: RunPage) -> CPTTrainer:
    """Read the data, load the model, write what is known before step 1."""
    training = configs.training
    output = Path(str(training.output_dir))
    is_main = training.process_index == 0
    quiet_libraries()
    processor = load_processor(configs.model.model_name_or_path)
    configs = with_native_model(configs)
    precision = str(autocast_type(training) or torch.float32)
    require_equal(precision, f"the type of products ({precision}, see bf16)")
    if configs.model.tuning == "qlora":
        stored = resolve_dtype(configs.model.dtype, read_config(configs.model.model_name_or_path))
        check_packed(stored, training)
    check_model(configs.model)
    ranks.at(0, "reading the data")
    # One rank reads, whichever that is.
    data = RunData(configs, processor, shown(console), plans=output / PLANS)
    dataset = data.train()
    require_equal(dataset.digest, "the plan of train_data")
    chosen = choose_checkpointing(configs, dataset, processor.image_processor.merge_size**2)
    require_equal(str(training.activation_checkpointing), "activation_checkpointing")
    if is_main:
        write_file(output / "config.yaml", dump_config(configs, output), "the run's configuration")
        dataset.ledger.write(output)
        console.print(ledger_table(dataset.ledger))
        show_unread(dataset.ledger, console)
        if chosen is not None:
            page.note(memory=vars(chosen))
            say(console, chosen.said)
    require_media(configs.model.trained_towers, dataset)
    ranks.at(0, "loading the model")
    model = load_model(configs.model, seed=training.seed)
    if is_main:
        towers = tower_table(model)
        console.print("", towers_table(towers))
        page.note(towers=[vars(one) for one in towers])
    ranks.at(0, "reading the evaluation data")
    every = training.eval_strategy != IntervalStrategy.NO
    sets = data.evaluations() if every or training.eval_on_start or training.eval_on_end else {}
    for name, one in sets.items():
        require_equal(one.digest, f"the plan of {name}")
    dataset.ledger.unmeasured = [dropped for one in sets.values() for dropped in one.ledger.dropped]
    if is_main:
        show_unmeasured(sets, console)
        dataset.ledger.write(output)
    ranks.at(0, "setting training up")
    trainer = CPTTrainer(
        model=model,
        args=without_pushes(training),
        train_dataset=dataset,
        eval_dataset=sets or None,
        processing_class=processor,
        console=console,
    )
    trainer.add_callback(page)  # after those that write the log
    return trainer
