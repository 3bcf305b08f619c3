"""A run from its configuration: what the commands and the demo do, step by step."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import rich.progress
import torch
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, ProcessorMixin, set_seed

from vlcpt.config import ConfigError, DataConfig, ModelConfig, SourceConfig
from vlcpt.config_reading import Configs, dump_config
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.encoding import DocumentEncoder
from vlcpt.data.media import MediaLimits
from vlcpt.data.planning import Track, untracked
from vlcpt.data.readers.files import open_source
from vlcpt.data.splitting import split_stream
from vlcpt.model.loading import load_model, load_processor
from vlcpt.model.tuning import tower_table
from vlcpt.report.terminal import document_lines, ledger_table, results_table, towers_table
from vlcpt.training.checkpoints import find_checkpoint
from vlcpt.training.evaluation import SetResult, evaluate_sets
from vlcpt.training.trainer import CPTTrainer

# What a run writes beside the model's own files, and --overwrite takes away first.
RUN_FILES = ("config.yaml", "ledger.json", "dropped.jsonl", "train_log.jsonl")
CHECK_FILES = ("ledger.json", "dropped.jsonl")  # what a check leaves, where no run has been


def train_run(configs: Configs, console: Console | None = None) -> CPTTrainer:
    """Train, from reading the data to saving the model.

    Raises:
        ConfigError: Before anything is read, if the output folder is not free.
        ValueError: If the data or the run failed.
    """
    console = console or Console()
    training = configs.training
    output = Path(str(training.output_dir))
    is_main = training.process_index == 0
    if is_main:
        prepare_output(configs)
    checkpoint = find_checkpoint(training.resume_from_checkpoint, str(output))
    quiet_libraries()
    processor = load_processor(configs.model.model_name_or_path)
    dataset = train_dataset(configs, processor, shown(console))
    if is_main:
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.yaml").write_text(dump_config(configs, output), encoding="utf-8")
        dataset.ledger.write(output)
        console.print(ledger_table(dataset.ledger))
    set_seed(training.seed)  # Trainer seeds later than adapters are drawn
    model = load_model(configs.model)
    if is_main:
        console.print(towers_table([asdict(row) for row in tower_table(model)]))
    evaluates = str(training.eval_strategy) not in ("no", "IntervalStrategy.NO")
    trainer = CPTTrainer(
        model=model,
        args=training,
        train_dataset=dataset,
        eval_dataset=evaluation_sets(configs, processor) if evaluates else None,
        processing_class=processor,
        console=console,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if is_main:
        console.print(f"saved in {output}")
    return trainer


def eval_run(
    configs: Configs, checkpoint: Path, output: Path | None = None, console: Console | None = None
) -> dict[str, SetResult]:
    """Measure a checkpoint on ``eval_data`` and ``retention_data``."""
    console = console or Console()
    if not configs.data.eval_data and not configs.data.retention_data:
        raise ConfigError("eval_data and retention_data are missing: there is nothing to measure. Add one.")
    if not checkpoint.is_dir():
        raise ConfigError(f"--checkpoint {checkpoint}: no such folder. Give a checkpoint or a saved model.")
    quiet_libraries()
    processor = load_processor(configs.model.model_name_or_path)
    sets = evaluation_sets(configs, processor, shown(console))
    model, base = load_trained(configs.model, checkpoint)
    results = evaluate_sets(
        model,
        sets,
        processor,
        base=base,
        batch_size=configs.training.per_device_eval_batch_size,
        num_workers=configs.training.dataloader_num_workers,
        track=shown(console),
    )
    console.print(results_table(results))
    if output:
        write_json(output, {"sets": results})
        console.print(f"written to {output}")
    return results


def inspect_run(configs: Configs, rows: slice, console: Console | None = None) -> None:
    """Show which tokens of the first documents of each training source are trained."""
    console = console or Console()
    quiet_libraries()
    processor = load_processor(configs.model.model_name_or_path)
    encoder = DocumentEncoder(processor, **_encoding(configs.data))  # type: ignore[arg-type]
    for entry in (*configs.data.train_data, *configs.data.replay_data):
        source = open_source(untagged=configs.data.untagged, **_source(entry))  # type: ignore[arg-type]
        for number in range(*rows.indices(len(source))):
            document = source.document(number)
            stream = encoder.tokens(document)
            parts = split_stream(
                stream,
                configs.training.max_length,
                on_overlong=configs.data.on_overlong,
                source=document.source,
            )
            for line in document_lines(document.name, stream, parts, processor.tokenizer, console):
                console.print(line)


def prepare_output(configs: Configs) -> None:
    """Refuse an output folder that holds another run's work, or empty it if that is asked for."""
    training = configs.training
    output = Path(str(training.output_dir))
    if not output.exists():
        return
    if not output.is_dir():
        raise ConfigError(f"output_dir {output} is a file. Give a folder.")
    if training.overwrite:
        for path in [*output.glob("checkpoint-*"), *(output / name for name in RUN_FILES)]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    elif not training.resume_from_checkpoint and any(p.name not in CHECK_FILES for p in output.iterdir()):
        raise ConfigError(
            f"output_dir {output} is not empty. Give another folder, go on from its checkpoint with "
            "--resume_from_checkpoint true, or start afresh in it with --overwrite."
        )


def train_dataset(
    configs: Configs,
    processor: ProcessorMixin,
    track: Track = untracked,
    dataset: type[CPTDataset] = CPTDataset,
) -> CPTDataset:
    """The training data, planned."""
    data, training = configs.data, configs.training
    return dataset(
        [_source(entry) for entry in data.train_data],
        processor,
        replay_data=[_source(entry) for entry in data.replay_data],
        replay_share=data.replay_share,
        seed=training.data_seed if training.data_seed is not None else training.seed,
        track=track,
        **_planning(configs),  # type: ignore[arg-type]
    )


def evaluation_sets(
    configs: Configs, processor: ProcessorMixin, track: Track = untracked
) -> dict[str, CPTDataset]:
    """Held-out and retention data, each source a set of its own."""
    entries = (*configs.data.eval_data, *configs.data.retention_data)
    return {entry.name: evaluation_set(configs, entry, processor, track) for entry in entries}


def evaluation_set(
    configs: Configs,
    entry: SourceConfig,
    processor: ProcessorMixin,
    track: Track = untracked,
    dataset: type[CPTDataset] = CPTDataset,
) -> CPTDataset:
    """One source of held-out or retention data."""
    return dataset([_source(entry)], processor, track=track, **_planning(configs))  # type: ignore[arg-type]


def load_trained(
    config: ModelConfig, checkpoint: Path
) -> tuple[PreTrainedModel | PeftModel, PreTrainedModel | None]:
    """A trained model, and its base where that is not inside it with the adapter switched off."""
    if (checkpoint / "adapter_config.json").is_file():
        return load_model(replace(config, adapter_name_or_path=str(checkpoint))), None
    whole = replace(config, tuning="full", adapter_name_or_path=None, lora_towers=None)
    trained = load_model(replace(whole, model_name_or_path=str(checkpoint)))
    return trained, load_model(whole)  # type: ignore[return-value]


def shown(console: Console) -> Track:
    """A bar with the time left, gone when done; nothing where there is no terminal."""
    if not console.is_terminal:
        return untracked
    return partial(rich.progress.track, console=console, transient=True)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def quiet_libraries() -> None:
    """No bars while weights load: a run shows its own. And no search for a GPU that is not there."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _source(entry: SourceConfig) -> dict[str, object]:
    return {key: value for key, value in asdict(entry).items() if value is not None}


def _encoding(data: DataConfig) -> dict[str, object]:
    return {
        "train_eos": data.train_eos,
        "min_pixels": data.min_pixels,
        "max_pixels": data.max_pixels,
        "fps": data.fps,
        "max_frames": data.max_frames,
        "limits": MediaLimits(
            max_file_bytes=data.max_file_bytes,
            max_image_pixels=data.max_image_pixels,
            max_video_frames=data.max_video_frames,
            max_video_pixels=data.max_video_pixels,
        ),
    }


def _planning(configs: Configs) -> dict[str, object]:
    data = configs.data
    return {
        **_encoding(data),
        "max_length": configs.training.max_length,
        "packing": configs.training.packing,
        "untagged": data.untagged,
        "on_overlong": data.on_overlong,
        "on_bad_data": data.on_bad_data,
        "max_bad_fraction": data.max_bad_fraction,
    }
