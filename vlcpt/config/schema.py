"""What a run reads and trains: sources, data and model, each checked as it is made. Imports no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from os import PathLike, fspath
from pathlib import PurePath
from typing import Literal, get_args, get_origin, get_type_hints

from vlcpt.config.values import did_you_mean
from vlcpt.data.families import TOWERS, Tower
from vlcpt.data.formats.detect import check_format
from vlcpt.data.rows.open import SourceConfig, key, needed_key
from vlcpt.errors import refuse

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
    sources, known = [], get_type_hints(SourceConfig)
    for item in [value] if isinstance(value, str | PathLike | Mapping | SourceConfig) else value:
        if isinstance(item, Mapping):
            if unknown := [name for name in item if name not in known]:
                raise ValueError(f"SourceConfig has no field {unknown[0]}. {did_you_mean(unknown[0], known)}")
            source = SourceConfig(**item)  # type: ignore[arg-type]
        else:
            source = item if isinstance(item, SourceConfig) else SourceConfig(fspath(item))
        check_format(source.format, source.targets, source.chat_template)
        sources.append(source)
    return tuple(sources)


@dataclass(frozen=True)
class ModelConfig:
    """Which model is trained, and which of its parts.

    Example:
        >>> ModelConfig("Qwen/Qwen2.5-VL-3B-Instruct", train_merger=True).adapter_towers
        ('merger', 'language')
    """

    model_name_or_path: str = needed_key("A Qwen2.5-VL model: a folder, or its name on the Hub.")
    adapter_name_or_path: str | None = key(
        None, "Continue training this LoRA adapter: a folder, or its name on the Hub. Default: a new adapter."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto",
        "Type of the frozen weights; trained weights are float32. auto: the type in the model's files.",
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = key(
        "auto",
        "Attention kernel. auto: each document attends to itself alone, without a mask, on torch's kernel "
        "for GPUs where that is exact and no slower.",
    )
    tuning: Literal["full", "lora", "qlora"] = key(
        "lora", "full: train all weights. lora: train adapters. qlora: adapters on weights held in 4 bits."
    )
    train_language: bool = key(True, "Train the language tower.")
    train_merger: bool = key(False, "Train the merger, which turns image patches into tokens.")
    train_vision: bool = key(False, "Train the vision tower.")
    train_embeddings: bool = key(False, "Train token embeddings and output layer; always in full.")
    lora_towers: tuple[Tower, ...] | None = key(
        None, "Trained towers that get adapters; other trained towers train in full. Default: all of them."
    )
    lora_r: int = key(16, "Rank of the adapters.")
    lora_alpha: float = key(32, "Scale of the adapters: their output is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = key(0.0, "Dropout on the adapters' input, from 0 to below 1.")
    lora_target_modules: tuple[str, ...] | None = key(
        None, "Names of layers in lora_towers that get adapters, such as q_proj. Default: every linear layer."
    )
    use_dora: bool = key(False, "Train length and direction of each weight separately (DoRA).")
    use_rslora: bool = key(False, "Scale adapters by lora_alpha / sqrt(lora_r) instead.")

    def __post_init__(self) -> None:
        refuse([*_wrong_choices(self), *wrong_numbers(vars(self)), *_model_rules(self)])

    @property
    def trained_towers(self) -> tuple[Tower, ...]:
        """The towers that train, by adapters or in full, in the order of the data."""
        trained = {"vision": self.train_vision, "merger": self.train_merger, "language": self.train_language}
        return tuple(tower for tower in TOWERS if trained[tower])

    @property
    def adapter_towers(self) -> tuple[Tower, ...]:
        """The trained towers that get adapters; none with ``tuning: full``."""
        if self.tuning == "full":
            return ()
        return tuple(t for t in self.trained_towers if self.lora_towers is None or t in self.lora_towers)

    @property
    def changed_lora(self) -> str:
        """Keys that shape a new adapter and are not at their defaults, for a message."""
        lora = [one for one in fields(self) if one.name.startswith(("lora_", "use_"))]
        return ", ".join(one.name for one in lora if getattr(self, one.name) != one.default)


@dataclass(frozen=True)
class DataConfig:
    """Which documents are read, and how.

    In Python a source may be a path or a mapping of :class:`SourceConfig` fields, and one needs no list.

    Example:
        >>> DataConfig(train_data="train.jsonl").train_data[0].name
        'train'
    """

    train_data: tuple[SourceConfig, ...] = field(
        metadata={"help": "Sources to learn from. Each document is read at least once an epoch."}
    )
    eval_data: tuple[SourceConfig, ...] = key((), "Held-out documents; each source is measured separately.")
    retention_data: tuple[SourceConfig, ...] = key(
        (), "Documents of what the model knew before, to measure what it forgets."
    )
    eval_max_documents: int | None = key(
        512,
        "Documents of each source of eval_data and retention_data that are measured, drawn by data_seed or "
        "seed. null: all of them.",
    )
    replay_data: tuple[SourceConfig, ...] = key(
        (), "Documents of what the model knew before, mixed in so that it forgets less. Needs replay_share."
    )
    replay_share: float = key(0.0, "Part of all targets that is drawn from replay_data, from 0 to below 1.")
    untagged: Literal["train", "mask", "error"] = key(
        "train", "A document without <trainable_text>: train all of its text, train none, or stop."
    )
    train_eos: Literal["auto", "always", "never"] = key(
        "auto", "Train the end-of-text token. auto: where the document's last text is trained."
    )
    on_overlong: Literal["split", "drop", "error"] = key(
        "split", "A document longer than max_length: split it into parts, drop and count it, or stop."
    )
    on_bad_data: Literal["error", "skip"] = key(
        "error", "A document that cannot be read: stop, or skip, count and name it."
    )
    max_bad_fraction: float = key(
        0.01,
        "With on_bad_data: skip, the part of a source's rows that may be bad, from 0 to 1; above it the run "
        "stops. 100 bad rows in a row stop it as well.",
    )
    min_pixels: int | None = key(
        None, "Pixels of an image or frame below which it is enlarged. Default: the processor's."
    )
    max_pixels: int | None = key(
        None, "Pixels of an image or frame above which it is shrunk. Default: the processor's."
    )
    fps: float | None = key(None, "Frames used of each second of video. Default: the processor's, 2.")
    max_frames: int | None = key(None, "Frames used of one video, at most. Default: the processor's.")
    max_row_bytes: int = key(
        256 * 2**20, "Bytes of a row (a line, a record of a CSV, a text file) above which it is refused."
    )
    max_file_bytes: int = key(4 * 2**30, "Bytes of a media file above which it is refused.")
    max_image_pixels: int = key(
        100_000_000, "Pixels of an image or frame, as stored, above which it is refused. See also max_pixels."
    )
    max_video_frames: int = key(
        500_000, "Stored frames of a video above which it is refused. See also max_frames."
    )
    max_video_pixels: int = key(
        1_000_000_000, "Pixels of a video, over the frames used, above which it is refused."
    )

    def __post_init__(self) -> None:
        for name in ROLES:
            object.__setattr__(self, name, as_sources(getattr(self, name)))
        refuse([*_wrong_choices(self), *wrong_numbers(vars(self)), *_data_rules(self)])


# The key of each group of the optimizer.
LEARNING_RATES: Mapping[str, str] = {
    **{"language": "learning_rate", "vision": "vision_learning_rate"},
    **{"merger": "merger_learning_rate", "embeddings": "embedding_learning_rate"},
}
ROLES = ("train_data", "replay_data", "eval_data", "retention_data")


# Numbers from the first to the second are taken, which is in words the third.
_TINY, _BELOW_1, _ANY, _LARGEST_SEED = math.ulp(0.0), math.nextafter(1, 0), math.inf, 2**32 - 1
_RANGES: Sequence[tuple[float, float, str, Sequence[str]]] = (
    (_TINY, _ANY, "above 0", ("lora_alpha", "min_pixels", "max_pixels", "fps", "max_row_bytes")),
    (_TINY, _ANY, "above 0", ("max_file_bytes", "max_image_pixels", "max_video_frames", "max_video_pixels")),
    (0, _ANY, "0 or more", ("dataloader_num_workers", "dataloader_timeout", "loss_chunk")),
    (0, _ANY, "0 or more", tuple(LEARNING_RATES.values())),
    (1, _ANY, "1 or more", ("lora_r", "gradient_accumulation_steps", "eval_max_documents")),
    (1, _ANY, "1 or more", ("per_device_train_batch_size", "per_device_eval_batch_size")),
    (2, _ANY, "2 or more: the model sees frames in pairs", ("max_frames",)),
    (2, _ANY, "2 or more: a first token has no context", ("max_length",)),
    (0, _BELOW_1, "from 0 to below 1", ("lora_dropout", "replay_share")),
    (0, 1, "from 0 to 1", ("max_bad_fraction",)),
    (0, _LARGEST_SEED, f"from 0 to {_LARGEST_SEED}, the largest of numpy", ("seed", "data_seed")),
)


def wrong_numbers(values: Mapping[str, object]) -> Iterator[str]:
    """A message for each number that its key does not take.

    Example:
        >>> list(wrong_numbers({"lora_dropout": 1.5, "fps": None, "seed": 1}))
        ['lora_dropout 1.5 must be from 0 to below 1.']
    """
    for least, most, words, names in _RANGES:
        for name in names:
            value = values.get(name)
            if isinstance(value, int | float) and not least <= value <= most:
                yield f"{name} {value} must be {words}."


def _wrong_choices(config: ModelConfig | DataConfig) -> Iterator[str]:
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            yield f"{name} {value!r} is none of its choices: {', '.join(get_args(hint))}."


def _model_rules(model: ModelConfig) -> Iterator[str]:
    """A message wherever towers, tuning and adapters contradict each other."""
    if not (model.trained_towers or model.train_embeddings):
        yield "nothing would be trained. Set train_language, train_merger or train_vision to true."
        return
    if model.tuning == "full":
        if model.adapter_name_or_path is not None:
            yield (
                "adapter_name_or_path needs tuning: lora or qlora. To train all weights from there, merge "
                "the adapter first (vlcpt merge) and give the result as model_name_or_path."
            )
        if changed := model.changed_lora:
            yield f"{changed} would not be used by tuning: full. Remove, or set tuning: lora."
        return
    trained = ", ".join(model.trained_towers) or "none"
    if untrained := [tower for tower in model.lora_towers or () if tower not in model.trained_towers]:
        wanted = ", ".join(f"train_{tower}: true" for tower in untrained)
        yield (
            f"lora_towers lists {', '.join(untrained)}, but the trained towers are: {trained}. "
            f"Set {wanted}, or shorten the list."
        )
    elif not model.adapter_towers:
        yield (
            f"tuning: {model.tuning} has no tower to put adapters on (trained towers: {trained}). "
            "Train a tower and leave it in lora_towers, or use tuning: full."
        )
    elif model.tuning == "qlora" and model.train_language and "language" not in model.adapter_towers:
        yield (
            "tuning: qlora holds the language tower in 4 bits, which cannot train in full. Put language into "
            "lora_towers, set train_language: false, or use tuning: lora."
        )
    if model.lora_target_modules == ():
        yield "lora_target_modules is empty. Name layers, or remove the key for every linear layer."
    if words := {"all-linear", "all"} & set(model.lora_target_modules or ()):
        yield (
            f"lora_target_modules: {min(words)} is the default here: every linear layer of lora_towers, and "
            "none of another tower. Remove the key."
        )


def _data_rules(data: DataConfig) -> Iterator[str]:
    """A message wherever sources, shares and limits contradict each other."""
    if not data.train_data:
        yield "train_data is empty. Give a file, or a list of sources."
    yield from _repeated_names("train_data and replay_data", data.train_data, data.replay_data)
    yield from _repeated_names("eval_data and retention_data", data.eval_data, data.retention_data)
    if data.replay_data and not data.replay_share:
        yield "replay_data needs replay_share, 0.2 for example. Set it, or remove replay_data."
    if data.replay_share and not data.replay_data:
        yield f"replay_share {data.replay_share} needs replay_data. Give some, or remove replay_share."
    for name in ("eval_data", "retention_data", "replay_data"):
        if any(source.share is not None for source in getattr(data, name)):
            yield f"{name} has a source with a share, which only train_data takes. Remove it."
    shares = [source.share for source in data.train_data if source.share is not None]
    if shares and (len(shares) < len(data.train_data) or abs(sum(shares) - 1) > 1e-6):
        yield (
            f"train_data has {len(data.train_data)} sources and the shares {shares}. "
            "Give every source a share, with the sum 1, or give none."
        )
    if data.min_pixels is not None and data.max_pixels is not None and data.min_pixels > data.max_pixels:
        yield f"min_pixels {data.min_pixels} is above max_pixels {data.max_pixels}. Lower it."


def _repeated_names(
    lists: str, sources: tuple[SourceConfig, ...], others: tuple[SourceConfig, ...]
) -> Iterator[str]:
    """A message for each name of two sources: it is the key of one in the ledger and in results."""
    # What vlcpt prepare wrote holds sources of both lists, by their own names.
    prepared = {source.path for source in sources if _may_be_prepared(source)}
    both = (*sources, *(one for one in others if not (one.path in prepared and _may_be_prepared(one))))
    for name, count in Counter(source.name for source in both).items():
        if count > 1:
            paths = ", ".join(source.path for source in both if source.name == name)
            yield f"{lists} have {count} sources named {name} ({paths}). Give each its own name."


def _may_be_prepared(source: SourceConfig) -> bool:
    """Whether it is no data file, and has no name of its own."""
    return not source.is_named and source.name == PurePath(source.path).name
