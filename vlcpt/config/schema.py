"""The three dataclasses that a run is configured by, each checked before data or weights are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import timedelta
from os import PathLike, fspath
from pathlib import PurePath
from typing import Literal, get_args, get_origin, get_type_hints

import torch
from transformers import TrainingArguments

from vlcpt.config import precision as config_precision
from vlcpt.config import trainer_args
from vlcpt.config.values import build
from vlcpt.data.formats.detect import check_format
from vlcpt.data.rows.open import default_name
from vlcpt.errors import ConfigError as ConfigError


@dataclass(frozen=True)
class SourceConfig:
    """One entry of ``train_data`` and its like.

    Example:
        >>> SourceConfig("books/train.jsonl").name
        'train'
    """

    path: str = field(metadata={"help": "A file, a folder, or a data set's name on the Hub."})
    split: str | None = field(default=None, metadata={"help": "Split of a data set; files have none."})
    format: str = field(
        default="auto", metadata={"help": "How rows are read. auto: chosen by the fields of the first rows."}
    )
    media_root: str | None = field(
        default=None, metadata={"help": "Folder that media must lie in. Default: the data file's."}
    )
    name: str = field(
        default="", metadata={"help": "Its name in ledger and results. Default: the last part of path."}
    )
    share: float | None = field(
        default=None, metadata={"help": "Its part of all targets, up to 1; of train_data, all or none."}
    )
    targets: str | None = field(
        default=None,
        metadata={"help": "What trains of formats without spans: assistant, last, all. Default: theirs."},
    )
    chat_template: bool = field(
        default=False, metadata={"help": "Keep the model's turn markers, of replayed chats for example."}
    )
    ignore_fields: tuple[str, ...] = field(
        default=(), metadata={"help": "Fields that are not read on purpose: nothing is said of them."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.ignore_fields, str):
            object.__setattr__(self, "ignore_fields", (self.ignore_fields,))
        if not self.name:
            object.__setattr__(self, "name", default_name(self.path))
        check_source(self)


SourceLike = str | PathLike[str] | Mapping[str, object] | SourceConfig
"""What a Python caller may write for a source: a path, its fields as a mapping, or the thing itself."""


def as_sources(value: SourceLike | Sequence[SourceLike]) -> tuple[SourceConfig, ...]:
    """Turn what a caller may write for a list of sources into that list.

    Raises:
        ValueError: For a mapping with an unknown field, with the nearest known one.

    Example:
        >>> [source.name for source in as_sources(["a.jsonl", {"path": "b.jsonl", "name": "books"}])]
        ['a', 'books']
    """
    sources = []
    for item in [value] if isinstance(value, str | PathLike | Mapping | SourceConfig) else value:
        if isinstance(item, Mapping):
            sources.append(build(SourceConfig, item))
        else:
            sources.append(item if isinstance(item, SourceConfig) else SourceConfig(fspath(item)))
    return tuple(sources)


Tower = Literal["vision", "merger", "language"]


@dataclass(frozen=True)
class ModelConfig:
    """Which model is trained, and which of its parts.

    Example:
        >>> ModelConfig("Qwen/Qwen2.5-VL-3B-Instruct", train_merger=True).adapter_towers
        ('merger', 'language')
    """

    model_name_or_path: str = field(metadata={"help": "A Qwen2.5-VL model: a folder, or a name on the Hub."})
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "Go on training this LoRA adapter. Default: a new one."}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Type of frozen weights; trained ones are float32."}
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = field(
        default="auto",
        metadata={
            "help": "auto: each document attends to itself alone, without a mask, on torch's own kernel for "
            "GPUs where that is right."
        },
    )
    tuning: Literal["full", "lora", "qlora"] = field(
        default="lora", metadata={"help": "Train all weights, adapters, or adapters on 4-bit weights."}
    )
    train_language: bool = field(default=True, metadata={"help": "Train the language tower."})
    train_merger: bool = field(
        default=False, metadata={"help": "Train the merger: image patches become tokens."}
    )
    train_vision: bool = field(default=False, metadata={"help": "Train the vision tower."})
    train_embeddings: bool = field(
        default=False, metadata={"help": "Train token embeddings and output head, always in full."}
    )
    lora_towers: tuple[Tower, ...] | None = field(
        default=None,
        metadata={"help": "Trained towers that get adapters; others train in full. Default: all."},
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: float = field(default=32, metadata={"help": "Adapters are scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout before the adapters, from 0 to below 1."}
    )
    lora_target_modules: tuple[str, ...] | None = field(
        default=None,
        metadata={"help": "Layers that get adapters, in lora_towers. Default: every linear one."},
    )
    use_dora: bool = field(
        default=False, metadata={"help": "Learn size and direction of weights apart (DoRA)."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale adapters by lora_alpha / sqrt(lora_r)."})

    def __post_init__(self) -> None:
        check_choices(self)
        check_model(self)

    @property
    def trained_towers(self) -> tuple[Tower, ...]:
        """The towers that train, by adapters or in full, in the order of the data."""
        trained = {"vision": self.train_vision, "merger": self.train_merger, "language": self.train_language}
        return tuple(tower for tower in get_args(Tower) if trained[tower])

    @property
    def adapter_towers(self) -> tuple[Tower, ...]:
        """The trained towers that get adapters; none with ``tuning: full``."""
        if self.tuning == "full":
            return ()
        return tuple(t for t in self.trained_towers if self.lora_towers is None or t in self.lora_towers)


@dataclass(frozen=True)
class DataConfig:
    """Which documents are read, and what is made of them.

    In Python a source may be a path or a mapping of :class:`SourceConfig` fields, and one needs no list.

    Example:
        >>> DataConfig(train_data="train.jsonl").train_data[0].name
        'train'
    """

    train_data: tuple[SourceConfig, ...] = field(
        metadata={"help": "Documents to learn from, each at least once an epoch."}
    )
    eval_data: tuple[SourceConfig, ...] = field(
        default=(), metadata={"help": "Held-out documents; each source is measured apart."}
    )
    retention_data: tuple[SourceConfig, ...] = field(
        default=(), metadata={"help": "Documents of what the model knew before, to see what it forgets."}
    )
    replay_data: tuple[SourceConfig, ...] = field(
        default=(), metadata={"help": "Documents of what it knew before, mixed in so that it forgets less."}
    )
    replay_share: float = field(
        default=0.0, metadata={"help": "Part of all targets drawn from replay_data, below 1."}
    )
    untagged: Literal["train", "mask", "error"] = field(
        default="train", metadata={"help": "Without <trainable_text>: train all text, none, or stop."}
    )
    train_eos: Literal["auto", "always", "never"] = field(
        default="auto", metadata={"help": "End of text. auto: a target where the last text is one."}
    )
    on_overlong: Literal["split", "drop", "error"] = field(
        default="split", metadata={"help": "Longer than max_length: train in parts, drop and count, or stop."}
    )
    on_bad_data: Literal["error", "skip"] = field(
        default="error", metadata={"help": "An unreadable document: stop, or skip, count and name it."}
    )
    max_bad_fraction: float = field(
        default=0.01,
        metadata={
            "help": "With skip, stop when more of a source's rows are bad, before or while training, from "
            "0 to 1. 100 in a row stop the run as well."
        },
    )
    min_pixels: int | None = field(
        default=None, metadata={"help": "Enlarge smaller images and frames. Default: the processor's."}
    )
    max_pixels: int | None = field(
        default=None, metadata={"help": "Shrink larger images and frames. Default: the processor's."}
    )
    fps: float | None = field(
        default=None, metadata={"help": "Video frames used per second. Default: the processor's, 2."}
    )
    max_frames: int | None = field(
        default=None, metadata={"help": "Most frames used of a video. Default: the processor's."}
    )
    max_row_bytes: int = field(
        default=256 * 2**20,
        metadata={"help": "Refuse a row (a line, a record of a CSV, a text file) of more bytes."},
    )
    max_file_bytes: int = field(default=4 * 2**30, metadata={"help": "Refuse larger media files, in bytes."})
    max_image_pixels: int = field(
        default=100_000_000,
        metadata={"help": "Refuse images and frames of more pixels, as stored; see max_pixels."},
    )
    max_video_frames: int = field(
        default=500_000, metadata={"help": "Refuse longer videos, in stored frames; see max_frames."}
    )
    max_video_pixels: int = field(
        default=1_000_000_000,
        metadata={"help": "Refuse to use more pixels of one video, over its used frames."},
    )

    def __post_init__(self) -> None:
        for name in ("train_data", "eval_data", "retention_data", "replay_data"):
            object.__setattr__(self, name, as_sources(getattr(self, name)))
        check_choices(self)
        check_data(self)


@dataclass(repr=False)  # TrainingArguments has a __repr__ that hides tokens; a generated one would print them
class CPTConfig(TrainingArguments):
    """``transformers.TrainingArguments`` with what continued pre-training adds, and other defaults.

    Example:
        >>> CPTConfig(output_dir="out", use_cpu=True).per_device_train_batch_size
        1
    """

    max_length: int = field(
        default=4096, metadata={"help": "Tokens per packed sequence, media included. See on_overlong."}
    )
    packing: bool = field(
        default=True, metadata={"help": "Join samples up to max_length; they cannot see each other."}
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the vision tower. Default: learning_rate."}
    )
    merger_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the merger. Default: learning_rate."}
    )
    embedding_learning_rate: float | None = field(
        default=None, metadata={"help": "Of embeddings and output head. Default: learning_rate."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Start afresh in an output_dir that is not empty."}
    )
    # Wider than in TrainingArguments, where nothing reads it; Trainer.train takes true and a path as well.
    resume_from_checkpoint: bool | str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "false, true, a path, or auto: fresh only if there is no checkpoint."},
    )
    trust_checkpoint: bool = field(
        default=False,
        metadata={
            "help": "Let DeepSpeed unpickle a checkpoint that this run did not write: it may hold code."
        },
    )
    # Wider than in TrainingArguments: None is what nobody has said.
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Compute in bfloat16. Default: true on a GPU that has it in hardware, unless fp16 or the "
            "DeepSpeed config says otherwise."
        },
    )
    per_device_train_batch_size: int = field(
        default=1, metadata={"help": "Packs (or samples) per device in one forward pass."}
    )
    per_device_eval_batch_size: int = field(
        default=1, metadata={"help": "The same in evaluation; no result depends on it."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Steps from one log line to the next."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide a loss that is not a number. Off: it must be seen."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Stays false: true drops loss_weights."}
    )
    dataloader_num_workers: int = field(
        default=2, metadata={"help": "Processes per device that read media; 0: none."}
    )
    dataloader_persistent_workers: bool = field(
        default=True, metadata={"help": "Keep them from epoch to epoch."}
    )
    dataloader_timeout: int = field(
        default=1800,
        metadata={
            "help": "Seconds to wait for a worker's next batch; then the run stops and names the documents. "
            "0: for ever."
        },
    )
    deepspeed: dict[str, object] | str | None = field(
        default=None, metadata={"help": "A DeepSpeed config: path, or name of a shipped one (zero2, zero3)."}
    )

    def __post_init__(self) -> None:
        if self.resume_from_checkpoint in ("true", "false"):  # in quotes, or from a launcher
            self.resume_from_checkpoint = self.resume_from_checkpoint == "true"
        trainer_args.check_training(self)
        _check_run(self)
        checkpointing = trainer_args.checkpointing_kwargs(self)
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = torch.cuda.is_available() and not self.use_cpu
        if self.activation_checkpointing or self.gradient_checkpointing:
            self.activation_checkpointing_kwargs = checkpointing
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith("perplexity"):
            self.greater_is_better = False  # Trainer knows it of a loss only
        if self.dataloader_num_workers == 0:
            self.dataloader_persistent_workers = False  # torch refuses it without workers
        written = self.deepspeed
        sharding = trainer_args.read_deepspeed(written)
        asked = config_precision.read_asked(self, sharding)
        precision = config_precision.choose_precision(asked, config_precision.device_facts())
        # Both are asked for only where the user did so, which transformers refuses.
        self.bf16, self.fp16 = precision == "bf16", self.fp16 or precision == "fp16"
        if sharding is not None:
            self.deepspeed = config_precision.with_precision(sharding)
        super().__post_init__()
        self.deepspeed = written  # so that no path of this installation gets into a saved configuration
        trainer_args.check_accelerator(self)
        if self.use_cpu and torch.distributed.is_initialized():
            # transformers 5.23 gives ddp_timeout to every group but that of CPUs, which then waits for 30
            # minutes; tests/training/test_ranks.py tells whether it is kept.
            torch.distributed.set_timeout(timedelta(seconds=self.ddp_timeout))


def check_choices(config: ModelConfig | DataConfig) -> None:
    """Raise ValueError where a field with fixed choices holds something else."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ValueError(f"{name} {value!r} is none of its choices: {', '.join(get_args(hint))}.")


def check_model(model: ModelConfig) -> None:
    """Raise ValueError where towers, tuning and adapters contradict each other."""
    if not (model.trained_towers or model.train_embeddings):
        raise ValueError(
            "nothing would be trained. Set train_language, train_merger or train_vision to true."
        )
    if model.tuning == "full":
        _check_no_lora(model)
        return
    trained = ", ".join(model.trained_towers) or "none"
    if untrained := [tower for tower in model.lora_towers or () if tower not in model.trained_towers]:
        wanted = ", ".join(f"train_{tower}: true" for tower in untrained)
        raise ValueError(
            f"lora_towers lists {', '.join(untrained)}, but the trained towers are: {trained}. "
            f"Set {wanted}, or shorten the list."
        )
    if not model.adapter_towers:
        raise ValueError(
            f"tuning: {model.tuning} has no tower to put adapters on (trained towers: {trained}). "
            "Train a tower and leave it in lora_towers, or use tuning: full."
        )
    if model.tuning == "qlora" and model.train_language and "language" not in model.adapter_towers:
        raise ValueError(
            "tuning: qlora holds the language tower in 4 bits, which cannot train in full. Put language into "
            "lora_towers, set train_language: false, or use tuning: lora."
        )
    if model.lora_target_modules == ():
        raise ValueError(
            "lora_target_modules is empty. Name layers, or remove the key for every linear layer."
        )
    if word := _every(model.lora_target_modules):
        raise ValueError(
            f"lora_target_modules: {word} is the default here: every linear layer of lora_towers, and "
            "none of another tower. Remove the key."
        )
    if model.lora_r < 1 or model.lora_alpha <= 0:
        raise ValueError(f"lora_r {model.lora_r} and lora_alpha {model.lora_alpha} must be above 0.")
    if not 0 <= model.lora_dropout < 1:
        raise ValueError(f"lora_dropout {model.lora_dropout} must be from 0 to below 1.")


def _every(names: tuple[str, ...] | None) -> str | None:
    """The word that peft and others have for every linear layer, where it is given."""
    return next((name for name in names or () if name in ("all-linear", "all")), None)


def _check_no_lora(model: ModelConfig) -> None:
    if model.adapter_name_or_path is not None:
        raise ValueError(
            "adapter_name_or_path needs tuning: lora or qlora. To train all weights from there, merge the "
            "adapter first (vlcpt merge) and give the result as model_name_or_path."
        )
    if changed := _changed_lora(model):
        raise ValueError(
            f"{', '.join(changed)} would not be used by tuning: full. Remove, or set tuning: lora."
        )


def _changed_lora(model: ModelConfig) -> list[str]:
    """Fields that shape a new adapter and are not at their defaults."""
    lora = [field for field in fields(model) if field.name.startswith(("lora_", "use_"))]
    return [field.name for field in lora if getattr(model, field.name) != field.default]


def check_source(source: SourceConfig) -> None:
    """Raise ValueError for a source without path or name, or with an unknown option or impossible share."""
    check_format(source.format, source.targets, source.chat_template)
    if not source.path:
        raise ValueError("path is empty. Give a file, a folder, or a data set's name on the Hub.")
    if not source.name:
        raise ValueError(f"path {source.path} gives no name for this source. Add one with name.")
    if source.share is not None and not 0 < source.share <= 1:
        raise ValueError(f"share {source.share} must be above 0 and at most 1: it is a part of all targets.")


def check_data(data: DataConfig) -> None:
    """Raise ValueError where sources, shares and limits contradict each other."""
    if not data.train_data:
        raise ValueError("train_data is empty. Give a file, or a list of sources.")
    _check_names("train_data and replay_data", data.train_data, data.replay_data)
    _check_names("eval_data and retention_data", data.eval_data, data.retention_data)
    _check_shares(data)
    sizes = ("min_pixels", "max_pixels", "fps", "max_frames")
    for name in (
        *sizes,
        "max_row_bytes",
        "max_file_bytes",
        "max_image_pixels",
        "max_video_frames",
        "max_video_pixels",
    ):
        value = getattr(data, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name} {value} must be above 0.")
    if data.max_frames is not None and data.max_frames < 2:
        raise ValueError(f"max_frames {data.max_frames} must be 2 or more: the model sees frames in pairs.")
    if data.min_pixels is not None and data.max_pixels is not None and data.min_pixels > data.max_pixels:
        raise ValueError(f"min_pixels {data.min_pixels} is above max_pixels {data.max_pixels}. Lower it.")
    if not 0 <= data.max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction {data.max_bad_fraction} must be from 0 to 1.")


def _check_names(lists: str, sources: tuple[SourceConfig, ...], others: tuple[SourceConfig, ...]) -> None:
    """Names are keys in the ledger and in results, so two sources cannot share one."""
    # What vlcpt prepare wrote holds sources of both lists, by their own names.
    twice = {source.path for source in sources if _may_be_prepared(source)}
    both = sources + tuple(source for source in others if not _is_again(source, twice))
    for name, count in Counter(source.name for source in both).items():
        if count > 1:
            paths = ", ".join(source.path for source in both if source.name == name)
            raise ValueError(f"{lists} have {count} sources named {name} ({paths}). Give each its own name.")


def _is_again(source: SourceConfig, paths: set[str]) -> bool:
    return source.path in paths and _may_be_prepared(source)


def _may_be_prepared(source: SourceConfig) -> bool:
    """Whether it is no data file, and has no name of its own."""
    return source.name == default_name(source.path) == PurePath(source.path).name


def _check_shares(data: DataConfig) -> None:
    if not 0 <= data.replay_share < 1:
        raise ValueError(f"replay_share {data.replay_share} must be from 0 to below 1.")
    if data.replay_data and not data.replay_share:
        raise ValueError("replay_data needs replay_share, 0.2 for example. Set it, or remove replay_data.")
    if data.replay_share and not data.replay_data:
        raise ValueError(
            f"replay_share {data.replay_share} needs replay_data. Give some, or remove replay_share."
        )
    for name in ("eval_data", "retention_data", "replay_data"):
        if any(source.share is not None for source in getattr(data, name)):
            raise ValueError(f"{name} has a source with a share, which only train_data takes. Remove it.")
    shares = [source.share for source in data.train_data if source.share is not None]
    if shares and (len(shares) < len(data.train_data) or abs(sum(shares) - 1) > 1e-6):
        raise ValueError(
            f"train_data has {len(data.train_data)} sources and the shares {shares}. "
            "Give every source a share, with the sum 1, or give none."
        )


def check_together(model: ModelConfig, data: DataConfig, training: CPTConfig) -> None:
    """Raise ValueError where one part of a configuration asks for what another does not give."""
    for part in ("vision", "merger", "embedding"):
        trained = {
            "vision": model.train_vision,
            "merger": model.train_merger,
            "embedding": model.train_embeddings,
        }
        if getattr(training, f"{part}_learning_rate") is not None and not trained[part]:
            switch = "train_embeddings" if part == "embedding" else f"train_{part}"
            raise ValueError(f"{part}_learning_rate would not be used. Set {switch}: true, or remove it.")
    check_evaluation(data, training)
    trainer_args.check_optimizer(training)
    if model.adapter_name_or_path is not None and (changed := _changed_lora(model)):
        raise ValueError(
            f"{', '.join(changed)} would not be used with adapter_name_or_path: the adapter brings its own. "
            "Remove what you set, or start a new adapter."
        )


def _check_run(training: CPTConfig) -> None:
    if training.overwrite and training.resume_from_checkpoint:
        raise ValueError(
            "overwrite would delete the checkpoints that resume_from_checkpoint goes on from. "
            "Remove one of them."
        )
    if training.max_length < 2:
        raise ValueError(f"max_length {training.max_length} must be 2 or more: a first token has no context.")


def name_best_metric(data: DataConfig, training: CPTConfig) -> None:
    """Let the best model be that with the least loss on the first set, where nothing else was asked for.

    Trainer's own default, ``loss``, is never measured here: each set's numbers bear its name.
    """
    sets = data.eval_data + data.retention_data
    # Trainer fills in its default wherever it needs one, but for save_strategy: best.
    is_needed = training.metric_for_best_model is not None or training.save_strategy == "best"
    if sets and is_needed:
        training.metric_for_best_model = f"eval_{sets[0].name}_loss"
        training.greater_is_better = bool(training.greater_is_better)


def check_evaluation(data: DataConfig, training: CPTConfig) -> None:
    """Raise ValueError for an evaluation that will not take place, or a number that none of them gives."""
    sets = data.eval_data + data.retention_data
    if (training.eval_strategy != "no" or training.eval_on_start) and not sets:
        raise ValueError("eval_strategy and eval_on_start need documents: give eval_data, or remove them.")
    if training.eval_strategy == "no":
        needs = "save_strategy: best" if training.save_strategy == "best" else "metric_for_best_model"
        if training.metric_for_best_model is not None or training.save_strategy == "best":
            raise ValueError(f"{needs} needs eval_strategy: steps or epoch. Set it, or remove the key.")
    metric = training.metric_for_best_model
    measured = [f"eval_{one.name}_{number}" for one in sets for number in ("loss", "perplexity")]
    if metric is not None and metric not in measured and f"eval_{metric}" not in measured:
        raise ValueError(
            f"metric_for_best_model {metric!r} is not measured. Measured are: {', '.join(measured)}."
        )
    if metric is not None and training.greater_is_better:
        raise ValueError("greater_is_better: less loss is better, and less perplexity. Remove the key.")
