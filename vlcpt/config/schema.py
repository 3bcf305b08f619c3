"""The three dataclasses that a run is configured by, each checked before data or weights are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from os import PathLike, fspath
from typing import Literal, get_args

import torch
from transformers import TrainingArguments

from vlcpt.config import checks, trainer_args
from vlcpt.config import precision as config_precision
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
        default="auto", metadata={"help": "The schema of the rows. auto: told from the first rows."}
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
        checks.check_source(self)


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
            sources.append(checks.build(SourceConfig, item))
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
        checks.check_choices(self)
        checks.check_model(self)

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
            "0 to 1. 100 on end stop the run as well."
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
        checks.check_choices(self)
        checks.check_data(self)


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
