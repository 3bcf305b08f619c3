"""One flat YAML file, and what the command line puts over it, become three checked dataclasses."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, get_type_hints

import yaml
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from vlcpt.config.keys import REQUIRED, check_required, read_given
from vlcpt.config.schema import (
    CPTConfig,
    DataConfig,
    ModelConfig,
    SourceConfig,
    check_together,
    name_best_metric,
)
from vlcpt.config.trainer_args import shipped_deepspeed
from vlcpt.config.values import NULL, Dumper, Given, build, convert, is_nothing, is_secret
from vlcpt.data.rows.open import default_name, files_of, is_pattern
from vlcpt.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import TypeForm


HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def moved(key: str, value: object, base: Path, start: Path) -> object:
    """Make a relative path from ``base`` one from ``start``; leave all other values as they are.

    Example:
        >>> moved("output_dir", "out", Path("conf"), Path()), moved("run_name", "out", Path("conf"), Path())
        ('conf/out', 'out')
    """
    if isinstance(value, tuple):
        return tuple(
            moved_source(item, base, start) if isinstance(item, SourceConfig) else item for item in value
        )
    return _moved_path(value, base, start) if isinstance(value, str) and _is_path(key, value, base) else value


def moved_source(source: SourceConfig, base: Path, start: Path) -> SourceConfig:
    """The same for both paths of a source; a name on the Hub stays as it is."""
    on_hub = (
        source.split is not None and HUB_NAME.fullmatch(source.path) and not (base / source.path).exists()
    )
    values = {item.name: getattr(source, item.name) for item in fields(source)}
    if not on_hub:
        values["path"] = _moved_path(source.path, base, start)
    if source.media_root is not None:
        values["media_root"] = _moved_path(source.media_root, base, start)
    return build(SourceConfig, values)


def check_paths(data: DataConfig, training: CPTConfig) -> None:
    """Look, without opening or making anything, whether data is there and the results can be.

    Raises:
        ValueError: For data or a checkpoint that is not there, or an ``output_dir`` that cannot be made.

    Example:
        >>> check_paths(DataConfig("none.jsonl"), CPTConfig("out", use_cpu=True))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: train_data[0]: none.jsonl: no such file or folder. Correct the path, or for ...
    """
    for key in ("train_data", "eval_data", "retention_data", "replay_data"):
        for number, source in enumerate(getattr(data, key)):
            _check_source(f"{key}[{number}]", source)
    resume = training.resume_from_checkpoint
    if isinstance(resume, str) and resume != "auto" and not Path(resume).is_dir():
        raise ValueError(
            f"resume_from_checkpoint: there is no folder {resume}. Correct the path, or give true for the "
            "newest in output_dir, or auto to start afresh where there is none."
        )
    _check_output(Path(str(training.output_dir)))


def _check_source(place: str, source: SourceConfig) -> None:
    if "://" in source.path:
        if default_name(source.path) == Path(source.path).name:
            return  # perhaps of a prepared set; to look takes a network
        raise ValueError(
            f"{place}: {source.path} is an address. Download the data and give the path of the file."
        )
    if Path(source.path).exists():
        return
    if is_pattern(source.path):
        try:
            files_of(source.path)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        return
    from vlcpt.data.rows.tables import is_hub_id

    if not (source.split and is_hub_id(source.path)):
        raise ValueError(
            f"{place}: {source.path}: no such file or folder. Correct the path, or for a data set on the Hub "
            "add its split: {path: org/name, split: train}."
        )


def _check_output(output: Path) -> None:
    there = output
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"output_dir {output}: {there} is no folder. Give another one.")
    # A folder that is there may be one to read only: a finished run can be measured again.
    if there != output and not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"output_dir {output} cannot be made: {there} is not yours to write to. Give another folder."
        )


def _is_path(key: str, value: str, base: Path) -> bool:
    match key:
        case "output_dir":
            return True
        case "model_name_or_path" | "adapter_name_or_path":
            return (base / Path(value).expanduser()).is_dir()
        case "resume_from_checkpoint":
            return value != "auto"
        case "deepspeed":
            return not value.startswith("{") and value not in shipped_deepspeed()
        case "accelerator_config":
            return not value.startswith("{")
    return False


def _moved_path(path: str, base: Path, start: Path) -> str:
    """Follow links on the way, so that ``..`` means what it means to the system; keep the last part."""
    path = os.path.expanduser(path)
    if os.path.isabs(path) or "://" in path:
        return path
    folder, name = os.path.split(os.path.join(base, path))
    if name in ("", ".", ".."):
        folder, name = os.path.join(folder, name), ""
    return os.path.relpath(os.path.join(os.path.realpath(folder), name), os.path.realpath(start))


RESOLVED_HEADER = (
    "# The resolved configuration of a run. Paths start at this file. To repeat: --output_dir NEW\n"
)

# How a run was started is not what it does: with these, repeating it would erase or continue the first one.
_STARTING = (
    *("overwrite", "resume_from_checkpoint", "local_rank"),
    *("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision"),
)
_ALIASES = ("gradient_checkpointing", "gradient_checkpointing_kwargs")  # transformers mirrors the new names
# Settings that decide what is learnt: written down even at their defaults, which another release may change.
_ALWAYS = (
    *("output_dir", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "activation_checkpointing", "seed"),
)
# What TrainingArguments turns a default into, where the two differ.
_RESOLVED_DEFAULTS: Mapping[str, object] = {
    "report_to": [],
    "debug": [],
    "include_num_input_tokens_seen": "no",
    "disable_tqdm": False,
    "accelerator_config": AcceleratorConfig(),
}


@dataclass(frozen=True)
class Configs:
    """The whole configuration of a run, checked."""

    model: ModelConfig
    data: DataConfig
    training: CPTConfig


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Configs:
    """Read a YAML file, put ``overrides`` over it, and check every value.

    Relative paths in the file start at the file's folder, those in overrides at the current directory. In
    the result all start at the current directory: a path is absolute only if it was written so.

    Args:
        path: The YAML file; each key is a field of ModelConfig, DataConfig or CPTConfig.
        overrides: Command line tokens: ``--key value``, ``--key=value``, or ``--key`` alone for true. Values
            are read as YAML; keys may have dashes for underscores.

    Raises:
        ConfigError: For anything wrong, with file and line (or the command line), key, what was found and
            what to do.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "run.yaml")
        ...     Path(folder, "a.jsonl").touch()
        ...     _ = path.write_text("{model_name_or_path: org/model, train_data: a.jsonl, output_dir: out}")
        ...     load_config(path, ["--learning-rate", "1e-5", "--use_cpu"]).training.learning_rate
        1e-05
    """
    known = {item.name: (cls, item) for cls in (ModelConfig, DataConfig, CPTConfig) for item in fields(cls)}
    given = read_given(Path(path), overrides, known)
    values: dict[type, dict[str, object]] = {ModelConfig: {}, DataConfig: {}, CPTConfig: {}}
    for key, value in given.items():
        cls, item = known[key]
        values[cls][key] = _read_value(value, get_type_hints(cls)[key], item)
    check_required(path, given)
    with _located(path, given):
        model = build(ModelConfig, values[ModelConfig])
        data = build(DataConfig, values[DataConfig])
        training = build(CPTConfig, values[CPTConfig])
        if values[CPTConfig].get("metric_for_best_model") is None:
            name_best_metric(data, training)
        check_together(model, data, training)
        check_paths(data, training)
    return Configs(model, data, training)


def _read_value(given: Given, hint: TypeForm[object], item: Field[object]) -> object:
    if item.name in REQUIRED and is_nothing(given.node):
        raise given.error("expected a value, found nothing. Give one.")
    if hint == tuple[SourceConfig, ...]:
        if given.node.tag == NULL:
            return ()
        nodes = given.node.value if isinstance(given.node, yaml.SequenceNode) else [given.node]
        return [_read_source(given.inside(f"[{number}]", node)) for number, node in enumerate(nodes)]
    value = convert(given, hint, item.metadata.get("choices", ()))
    if item.name.endswith("name_or_path") and isinstance(value, str) and not HUB_NAME.fullmatch(value):
        folder = given.base / Path(value).expanduser()
        if not folder.is_dir():
            raise given.error(
                f"there is no folder {folder}, and the Hub has no such names. Correct the path."
            )
    return moved(item.name, value, given.base, Path())


def _read_source(given: Given) -> SourceConfig:
    hints = get_type_hints(SourceConfig)
    if isinstance(given.node, yaml.ScalarNode):
        values = {"path": convert(given, str)}
    elif isinstance(given.node, yaml.MappingNode):
        parts = [(str(key.value), node) for key, node in given.node.value]
        values = {name: convert(given.inside(f".{name}", node), hints[name]) for name, node in parts}
    else:
        raise given.error("expected a path, or a mapping with path, found a list. Take one level off.")
    if "path" not in values:
        raise given.error("path is missing. Add path: …")
    try:
        return moved_source(build(SourceConfig, values), given.base, Path())
    except ValueError as error:
        raise given.error(str(error)) from error


_NO_BF16 = re.compile(r"doesn't support bf16|support bf16/gpu")


@contextmanager
def _located(path: str | Path, given: Mapping[str, Given]) -> Iterator[None]:
    """Put file and line before what the dataclasses, or transformers, object to: the first key they name."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        message = " ".join(str(error).split())
        if _NO_BF16.search(message):  # transformers' words name use_cpu alone
            message = (
                "bf16: there is no GPU here that computes in bfloat16. Remove the key, for it is chosen by "
                "itself where a GPU has it; or set use_cpu: true."
            )
        for word in re.findall(r"\w+", message):
            if word in given:
                raise given[word].error(message) from error
        raise ConfigError(f"{path}: {message}") from error


def dump_config(configs: Configs, directory: Path) -> str:
    """Write a configuration as YAML that :func:`load_config` reads back as an equal one from ``directory``.

    Relative paths are made to start at ``directory``. Left out are secrets, and how the run was started
    (``overwrite``, ``resume_from_checkpoint``, ``push_to_hub``): repeating it must not touch the first one.

    Args:
        configs: As ``load_config`` gave it, in the same current directory.
        directory: The folder in which the text will be saved.

    Example:
        >>> model, data = ModelConfig("org/model"), DataConfig("data/train.jsonl")
        >>> text = dump_config(Configs(model, data, CPTConfig("out", use_cpu=True)), Path("out"))
        >>> [line for line in text.splitlines() if "train.jsonl" in line or "output_dir" in line][1:]
        ['- ../data/train.jsonl', 'output_dir: .']
    """
    values: dict[str, object] = {}
    for config in (configs.model, configs.data, configs.training):
        for item in fields(config):
            value = getattr(config, item.name)
            if _is_written(item, value):
                values[item.name] = _plain(moved(item.name, value, Path(), directory))
    return RESOLVED_HEADER + yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)


_TRAINER_FIELDS = {item.name: item for item in fields(TrainingArguments)}


def _is_written(item: Field[object], value: object) -> bool:
    if item.name in _STARTING or item.name in _ALIASES or is_secret(item.name):
        return False
    if _TRAINER_FIELDS.get(item.name) is not item:  # a field that Trainer lacks, or one with another default
        return value is not None and value != ()
    if item.name in _ALWAYS:
        return True
    default = item.default if item.default_factory is MISSING else item.default_factory()
    return value not in (default, _RESOLVED_DEFAULTS.get(item.name, default))


def _plain(value: object) -> object:
    """Turn a value into what YAML has: text, numbers, lists and mappings."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, AcceleratorConfig):
        return value.to_dict()
    if isinstance(value, SourceConfig):
        kept = {item.name: getattr(value, item.name) for item in fields(value)}
        kept = {name: kept[name] for name in kept if kept[name] != getattr(SourceConfig(value.path), name)}
        return {"path": value.path, **kept} if kept else value.path
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
