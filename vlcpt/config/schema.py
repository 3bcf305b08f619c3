"""What a run reads and trains: sources, data and model, each checked as it is made. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from os import PathLike, fspath
from pathlib import PurePath
from typing import Literal, TypeVar, get_args, get_origin, get_type_hints

from vlcpt.config.values import build
from vlcpt.data.formats.detect import check_format
from vlcpt.data.rows.open import default_name

T = TypeVar("T")


def key(default: T, help: str) -> T:
    """A field with a default and its help text, which ``keys.json`` and the docs repeat."""
    return field(default=default, metadata={"help": help})


def needed_key(help: str) -> str:
    """A field without a default."""
    return field(metadata={"help": help})


@dataclass(frozen=True)
class SourceConfig:
    """One entry of ``train_data`` and its like.

    Example:
        >>> SourceConfig("books/train.jsonl").name
        'train'
    """

    path: str = needed_key("A file, a folder, a pattern (data/*.jsonl), or the name of a dataset on the Hub.")
    split: str | None = key(None, "Split of a dataset, such as train. Files have none.")
    format: str = key("auto", "How rows become documents. auto: chosen by the fields of the first rows.")
    media_root: str | None = key(None, "Folder that holds all images and videos. Default: the data file's.")
    name: str = key("", "Its name in the ledger and in results. Default: the last part of path.")
    share: float | None = key(
        None, "Its part of all targets, above 0 and at most 1. Set it for all of train_data, or for none."
    )
    targets: str | None = key(
        None, "What is trained of rows without spans: assistant, last or all. Default: the format's."
    )
    chat_template: bool = key(False, "Keep the model's turn markers, of replayed chats for example.")
    ignore_fields: tuple[str, ...] = key((), "Fields of a row that are not read and not reported.")

    def __post_init__(self) -> None:
        if isinstance(self.ignore_fields, str):
            object.__setattr__(self, "ignore_fields", (self.ignore_fields,))
        if not self.name:
            object.__setattr__(self, "name", default_name(self.path))
        check_format(self.format, self.targets, self.chat_template)
        if not self.path:
            raise ValueError("path is empty. Give a file, a folder, or the name of a dataset on the Hub.")
        if not self.name:
            raise ValueError(f"path {self.path} gives no name for this source. Add one with name.")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(
                f"share {self.share} must be above 0 and at most 1: it is a part of all targets."
            )


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
        "for GPUs where that is exact.",
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
        check_choices(self)
        _check_model(self)

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
        check_choices(self)
        _check_data(self)


ROLES = ("train_data", "replay_data", "eval_data", "retention_data")


def check_choices(config: ModelConfig | DataConfig) -> None:
    """Raise ValueError where a field with fixed choices holds something else."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ValueError(f"{name} {value!r} is none of its choices: {', '.join(get_args(hint))}.")


def _check_model(model: ModelConfig) -> None:
    """Raise ValueError where towers, tuning and adapters contradict each other."""
    if not (model.trained_towers or model.train_embeddings):
        raise ValueError(
            "nothing would be trained. Set train_language, train_merger or train_vision to true."
        )
    if model.tuning == "full":
        if model.adapter_name_or_path is not None:
            raise ValueError(
                "adapter_name_or_path needs tuning: lora or qlora. To train all weights from there, merge "
                "the adapter first (vlcpt merge) and give the result as model_name_or_path."
            )
        if changed := model.changed_lora:
            raise ValueError(f"{changed} would not be used by tuning: full. Remove, or set tuning: lora.")
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
    if words := {"all-linear", "all"} & set(model.lora_target_modules or ()):
        raise ValueError(
            f"lora_target_modules: {min(words)} is the default here: every linear layer of lora_towers, and "
            "none of another tower. Remove the key."
        )
    if model.lora_r < 1 or model.lora_alpha <= 0:
        raise ValueError(f"lora_r {model.lora_r} and lora_alpha {model.lora_alpha} must be above 0.")
    if not 0 <= model.lora_dropout < 1:
        raise ValueError(f"lora_dropout {model.lora_dropout} must be from 0 to below 1.")


_ABOVE_0 = (
    *("min_pixels", "max_pixels", "fps", "max_frames", "max_row_bytes"),
    *("max_file_bytes", "max_image_pixels", "max_video_frames", "max_video_pixels"),
)


def _check_data(data: DataConfig) -> None:
    """Raise ValueError where sources, shares and limits contradict each other."""
    if not data.train_data:
        raise ValueError("train_data is empty. Give a file, or a list of sources.")
    _check_names("train_data and replay_data", data.train_data, data.replay_data)
    _check_names("eval_data and retention_data", data.eval_data, data.retention_data)
    _check_shares(data)
    for name in _ABOVE_0:
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
