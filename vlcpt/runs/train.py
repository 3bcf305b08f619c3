"""A run from its configuration: what the commands and the demo do, step by step."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from vlcpt.config.packages import require_packages
from vlcpt.config.precision import autocast_type, slow_products, used_devices
from vlcpt.config.yaml import Configs, dump_config
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.documents import DocumentError
from vlcpt.data.encode.encoder import DocumentEncoder
from vlcpt.data.formats.unread import list_unread
from vlcpt.data.plan.cache import remove_plans
from vlcpt.data.plan.ledger import Ledger, list_reasons
from vlcpt.data.plan.split import split_stream
from vlcpt.data.prepared.fingerprints import require_same_encoding
from vlcpt.data.sources import open_sources
from vlcpt.errors import ConfigError
from vlcpt.file_writes import WriteError, write_file
from vlcpt.folder_locks import hold
from vlcpt.hub.push import open_repository, push_run, without_pushes
from vlcpt.interrupts import finished_first
from vlcpt.model.loading import (
    check_evaluated,
    check_model,
    load_for_evaluation,
    load_model,
    load_processor,
    read_config,
    resolve_dtype,
    with_native_dtype,
)
from vlcpt.model.tuning import tower_table
from vlcpt.report.check import unread_lines
from vlcpt.report.screen import Screen
from vlcpt.report.terminal import document_lines, ledger_table, legend, results_table, towers_table
from vlcpt.runs.data import encoding_options, evaluation_sets, shown, source_options, train_dataset
from vlcpt.runs.folder import PLANS, prepare_output, write_json
from vlcpt.training.checkpoints.files import find_checkpoint
from vlcpt.training.engine import require_media
from vlcpt.training.evaluate import SetResult, evaluate_sets
from vlcpt.training.guards import check_launch, check_packed
from vlcpt.training.ranks import RankWatch, first_rank_only, require_equal
from vlcpt.training.trainer import CPTTrainer


def train_run(
    configs: Configs, console: Console | None = None, *, config_path: Path | None = None
) -> CPTTrainer:
    """Train, from reading the data to saving the model.

    Raises:
        ConfigError: Before anything is read, if the output folder is not free, or another run's.
        ValueError: If the data or the run failed.
    """
    console = console or Screen()
    training = configs.training
    require_packages({**vars(configs.model), **vars(training)})
    check_launch(training)
    output = Path(str(training.output_dir))
    ranks = RankWatch(training)
    with ExitStack() as held:
        with ranks.watched():
            first_rank_only(training, lambda: held.enter_context(hold(output)))
        return _train_held(configs, console, ranks, config_path)


def _train_held(configs: Configs, console: Console, ranks: RankWatch, config_path: Path | None) -> CPTTrainer:
    """The run, in an output folder into which no other one writes."""
    training = configs.training
    output = Path(str(training.output_dir))
    is_main = training.process_index == 0
    repo_id: str | None = None

    def open_outputs() -> None:
        nonlocal repo_id
        if gone := prepare_output(configs, config_path):
            console.print(f"overwrite: deleted {', '.join(gone)}", highlight=False, soft_wrap=True)
        # Told before the data is read; the trainer looks again, and reads all of it.
        find_checkpoint(training.resume_from_checkpoint, output, hashes=False, tell=lambda message: None)
        repo_id = open_repository(configs) if training.push_to_hub else None

    if training.overwrite and training.local_process_index == 0:
        remove_plans(output / PLANS)  # also where machines do not share the folder
    with ranks.watched():
        first_rank_only(training, open_outputs)
        trainer = _prepare_trainer(configs, console, ranks)
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
            console.print(f"saved in {output}")
    if repo_id is not None:
        console.print(f"pushed to {push_run(configs, repo_id).url}", highlight=False, soft_wrap=True)
    return trainer


def tell_unread(ledger: Ledger, console: Console) -> None:
    """Say what of each source was not read."""
    for line in unread_lines(ledger):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _account_failures(dataset: CPTDataset, output: Path, console: Console) -> None:
    """The ledger once more, where it is another than before training."""
    is_failing = sys.exc_info()[0] is not None
    count = len(dataset.failures)
    documents = f"{count:,} document{'s' * (count != 1)}"
    console.print(f"{documents} failed in training, see dropped.jsonl. The ledger is now:")
    console.print(ledger_table(dataset.ledger))
    try:
        dataset.ledger.write(output)
    except WriteError as error:
        if not is_failing:
            raise
        # What ended the run is the error to report.
        console.print(str(error), style="yellow", markup=False, highlight=False, soft_wrap=True)


def _prepare_trainer(configs: Configs, console: Console, ranks: RankWatch) -> CPTTrainer:
    """Read the data, load the model, write what is known before step 1."""
    training = configs.training
    output = Path(str(training.output_dir))
    is_main = training.process_index == 0
    quiet_libraries()
    processor = load_processor(configs.model.model_name_or_path)
    configs = replace(
        configs, model=with_native_dtype(configs.model, emulates_bf16=used_devices(training).emulates_bf16)
    )
    precision = str(autocast_type(training) or torch.float32)
    require_equal(training, precision, f"the type of products ({precision}, see bf16)")
    if configs.model.tuning == "qlora":
        stored = resolve_dtype(configs.model.dtype, read_config(configs.model.model_name_or_path))
        check_packed(stored, training)
    check_model(configs.model)
    ranks.at(0, "reading the data")
    track = shown(console)  # one rank reads, whichever that is
    dataset = train_dataset(configs, processor, track, plans=output / PLANS)
    require_equal(training, dataset.digest, "the plan of train_data")
    if is_main:
        write_file(output / "config.yaml", dump_config(configs, output), "the run's configuration")
        dataset.ledger.write(output)
        console.print(ledger_table(dataset.ledger))
        tell_unread(dataset.ledger, console)
    require_media(configs.model.trained_towers, dataset)
    ranks.at(0, "loading the model")
    model = load_model(configs.model, seed=training.seed)
    if is_main:
        console.print(towers_table([asdict(row) for row in tower_table(model)]))
    ranks.at(0, "reading the evaluation data")
    evaluates = training.eval_on_start or str(training.eval_strategy) not in ("no", "IntervalStrategy.NO")
    sets = evaluation_sets(configs, processor, track, plans=output / PLANS) if evaluates else {}
    for name, one in sets.items():
        require_equal(training, one.digest, f"the plan of {name}")
    dataset.ledger.unmeasured = [dropped for one in sets.values() for dropped in one.ledger.dropped]
    if is_main:
        tell_unmeasured(sets, console)
        for one in sets.values():
            tell_unread(one.ledger, console)
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
    return trainer


def eval_run(
    configs: Configs, checkpoint: Path, output: Path | None = None, console: Console | None = None
) -> dict[str, SetResult]:
    """Measure a checkpoint on ``eval_data`` and ``retention_data``."""
    console = console or Screen()
    if not configs.data.eval_data and not configs.data.retention_data:
        raise ConfigError("eval_data and retention_data are missing: there is nothing to measure. Add one.")
    if not checkpoint.is_dir():
        raise ConfigError(f"--checkpoint {checkpoint}: no such folder. Give a checkpoint or a saved model.")
    if output and (output.is_dir() or (output.parent.exists() and not output.parent.is_dir())):
        raise ConfigError(f"--output {output}: not a file that can be written. Give a file's name.")
    quiet_libraries()
    processor = load_processor(configs.model.model_name_or_path)
    check_evaluated(configs.model, str(checkpoint))
    sets = evaluation_sets(configs, processor, shown(console))
    tell_unmeasured(sets, console)
    device = configs.training.device
    used = used_devices(configs.training)
    if (slow := slow_products(configs.training, used)) is not None:
        console.print(slow, style="yellow", markup=False, highlight=False, soft_wrap=True)
    model, base = load_for_evaluation(
        with_native_dtype(configs.model, emulates_bf16=used.emulates_bf16), str(checkpoint)
    )
    for one in (model, base):
        # 4-bit weights are put on their device while they load.
        if one is not None and not getattr(one, "is_quantized", False):
            torch.nn.Module.to(one, device)  # transformers hides the type of its own
    results = evaluate_sets(
        model,
        sets,
        processor,
        base=base,
        batch_size=configs.training.per_device_eval_batch_size,
        num_workers=configs.training.dataloader_num_workers,
        timeout=configs.training.dataloader_timeout,
        autocast=autocast_type(configs.training),
        track=shown(console),
    )
    console.print(results_table(results))
    for name, dataset in sets.items():
        if dataset.has_media and not dataset.can_shuffle:
            console.print(
                f"{name}: no loss with another document's images or videos: only one document has one.",
                markup=False,
                highlight=False,
            )
    if output:
        write_json(output, {"sets": results}, "what was measured")
        console.print(f"written to {output}")
    return results


def inspect_run(configs: Configs, rows: slice, console: Console | None = None) -> None:
    """Show which tokens of the first documents of each training source are trained."""
    console = console or Screen()
    quiet_libraries()
    processor = load_processor(configs.model.model_name_or_path)
    data, options = configs.data, encoding_options(configs.data)
    encoder = DocumentEncoder(processor, options)
    sources = [
        source
        for role in ("train_data", "replay_data")
        for entry in getattr(data, role)
        for source in open_sources(
            source_options(entry), data.untagged, role=role, max_row_bytes=data.max_row_bytes
        )
    ]
    require_same_encoding(sources, processor, data.untagged, options)
    if not any(range(*rows.indices(len(source))) for source in sources):
        most = max(len(source) for source in sources)
        raise ConfigError(f"--rows {rows.start}: no source has so many documents; the longest has {most:,}.")
    console.print(legend(console), end="\n\n")
    for source in sources:
        numbers = range(*rows.indices(len(source)))
        unread: Counter[str] = Counter(source.left_out())
        if not numbers:
            console.print(f"{source.name} has {len(source):,} documents, none of them in --rows.")
        for number in numbers:
            try:
                document = source.document(number)
                unread.update(document.not_read)
                stream = encoder.tokens(document)
                parts = split_stream(
                    stream,
                    configs.training.max_length,
                    on_overlong=data.on_overlong,
                    source=document.source,
                )
            except DocumentError as error:
                is_dropped = error.kind == "overlong" and data.on_overlong == "drop"
                stops = not is_dropped and (data.on_bad_data == "error" or error.kind == "overlong")
                what = "training would stop here" if stops else "not used"
                console.print(f"{what}: {error}\n", style="red", markup=False, highlight=False)
                continue
            for line in document_lines(document.name, stream, parts, processor.tokenizer, console):
                console.print(line)
        if unread:
            told = f"{source.name}: {list_unread(dict(unread.most_common()))}"
            console.print(told, markup=False, highlight=False, soft_wrap=True)


def tell_unmeasured(sets: Mapping[str, CPTDataset], console: Console) -> None:
    """Say which documents of an evaluation set are not measured, and why."""
    for name, dataset in sets.items():
        total = dataset.ledger.total
        if not total.dropped_documents:
            continue
        reasons = list_reasons(dict(sorted(total.dropped_documents.items())))
        console.print(
            f"{name}: {total.dropped_documents.total()} of {total.documents['read']} documents are not "
            f"measured ({reasons}):",
            highlight=False,
        )
        for one in dataset.ledger.dropped[:5]:
            console.print(f"  {one.source}:{one.line}: {one.detail}", markup=False, highlight=False)


def quiet_libraries() -> None:
    """No bars while weights load: a run shows its own. And no search for a GPU that is not there."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
