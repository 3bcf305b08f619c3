"""What cannot work together in a configuration, said before data or weights are read.

The functions are called by the dataclasses in ``config/schema.py`` when these are built, in Python as from YAML;
:func:`check_together` only where a whole configuration is loaded.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import PurePath
from typing import TYPE_CHECKING, Literal, TypeVar, get_args, get_origin, get_type_hints

from vlcpt.config.trainer_args import check_evaluation, check_optimizer
from vlcpt.data.formats.detect import check_format
from vlcpt.data.rows.open import default_name

if TYPE_CHECKING:
    from vlcpt.config.schema import CPTConfig, DataConfig, ModelConfig, SourceConfig

T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Give the known name that this one is a misspelling of; None if it is like no other.

    Example:
        >>> nearest("lerning_rate", ["learning_rate", "seed"]), nearest("rate", ["learning_rate", "seed"])
        ('learning_rate', None)
    """
    # 0.8: two letters of ten. What is less alike is another word, and naming it would mislead.
    return next(iter(get_close_matches(name, known, n=1, cutoff=0.8)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Give the end of an error message about an unknown name.

    Example:
        >>> did_you_mean("lerning_rate", ["learning_rate", "seed"])
        'Did you mean learning_rate?'
    """
    known = list(known)
    if near := nearest(name, known):
        return f"Did you mean {near}?"
    return (
        f"Known: {', '.join(known)}." if len(known) <= 12 else "See docs/configuration.md for the known keys."
    )


def build(cls: Callable[..., T], values: Mapping[str, object]) -> T:
    """Call a dataclass with keyword arguments by name; an unknown one is a ValueError with the nearest known.

    Example:
        >>> from vlcpt.config.schema import SourceConfig
        >>> build(SourceConfig, {"pth": "a.jsonl"})
        Traceback (most recent call last):
        ValueError: SourceConfig has no field pth. Did you mean path?
    """
    known = get_type_hints(cls)
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"{cls.__name__} has no field {unknown[0]}. {did_you_mean(unknown[0], known)}")
    return cls(**values)


def check_choices(config: "ModelConfig | DataConfig") -> None:
    """Raise ValueError where a field with fixed choices holds something else."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ValueError(f"{name} {value!r} is none of its choices: {', '.join(get_args(hint))}.")


def check_model(model: "ModelConfig") -> None:
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


def _every(names: "tuple[str, ...] | None") -> str | None:
    """The word that peft and others have for every linear layer, where it is given."""
    return next((name for name in names or () if name in ("all-linear", "all")), None)


def _check_no_lora(model: "ModelConfig") -> None:
    if model.adapter_name_or_path is not None:
        raise ValueError(
            "adapter_name_or_path needs tuning: lora or qlora. To train all weights from there, merge the "
            "adapter first (vlcpt merge) and give the result as model_name_or_path."
        )
    if changed := _changed_lora(model):
        raise ValueError(
            f"{', '.join(changed)} would not be used by tuning: full. Remove, or set tuning: lora."
        )


def _changed_lora(model: "ModelConfig") -> list[str]:
    """Fields that shape a new adapter and are not at their defaults."""
    lora = [field for field in fields(model) if field.name.startswith(("lora_", "use_"))]
    return [field.name for field in lora if getattr(model, field.name) != field.default]


def check_source(source: "SourceConfig") -> None:
    """Raise ValueError for a source without path or name, or with an unknown option or impossible share."""
    check_format(source.format, source.targets, source.chat_template)
    if not source.path:
        raise ValueError("path is empty. Give a file, a folder, or a data set's name on the Hub.")
    if not source.name:
        raise ValueError(f"path {source.path} gives no name for this source. Add one with name.")
    if source.share is not None and not 0 < source.share <= 1:
        raise ValueError(f"share {source.share} must be above 0 and at most 1: it is a part of all targets.")


def check_data(data: "DataConfig") -> None:
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


def _check_names(lists: str, sources: "tuple[SourceConfig, ...]", others: "tuple[SourceConfig, ...]") -> None:
    """Names are keys in the ledger and in results, so two sources cannot share one."""
    # What vlcpt prepare wrote holds sources of both lists, by their own names.
    twice = {source.path for source in sources if _may_be_prepared(source)}
    both = sources + tuple(source for source in others if not _is_again(source, twice))
    for name, count in Counter(source.name for source in both).items():
        if count > 1:
            paths = ", ".join(source.path for source in both if source.name == name)
            raise ValueError(f"{lists} have {count} sources named {name} ({paths}). Give each its own name.")


def _is_again(source: "SourceConfig", paths: set[str]) -> bool:
    return source.path in paths and _may_be_prepared(source)


def _may_be_prepared(source: "SourceConfig") -> bool:
    """Whether it is no data file, and has no name of its own."""
    return source.name == default_name(source.path) == PurePath(source.path).name


def _check_shares(data: "DataConfig") -> None:
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


def check_together(model: "ModelConfig", data: "DataConfig", training: "CPTConfig") -> None:
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
    check_optimizer(training)
    if model.adapter_name_or_path is not None and (changed := _changed_lora(model)):
        raise ValueError(
            f"{', '.join(changed)} would not be used with adapter_name_or_path: the adapter brings its own. "
            "Remove what you set, or start a new adapter."
        )
