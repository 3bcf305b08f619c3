"""One flat YAML file, and what the command line puts over it, becomes three checked dataclasses; and back.

Everything here happens before data or weights are read, so that a mistake is told at once.
"""

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

from vlcpt.config import ConfigError, CPTConfig, DataConfig, ModelConfig, SourceConfig
from vlcpt.config_checks import build, check_together, did_you_mean
from vlcpt.config_paths import HUB_NAME, check_paths, moved, moved_source
from vlcpt.config_secrets import holds_secret, is_secret
from vlcpt.config_trainer import name_best_metric
from vlcpt.config_values import NULL, Dumper, Given, compose, convert, is_nothing

if TYPE_CHECKING:
    from typing_extensions import TypeForm

_REQUIRED = ("model_name_or_path", "train_data", "output_dir")
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
    given = _read_file(Path(path)) | _read_overrides(overrides)
    known = {item.name: (cls, item) for cls in (ModelConfig, DataConfig, CPTConfig) for item in fields(cls)}
    values: dict[type, dict[str, object]] = {ModelConfig: {}, DataConfig: {}, CPTConfig: {}}
    for key, value in given.items():
        if key == "trust_remote_code":
            raise value.error("no code from a model's folder or the Hub is ever run. Remove the key.")
        if key not in known:
            raise value.error(f"unknown key. {did_you_mean(key, known)}")
        if holds_secret(key, value.node):
            raise value.error(
                "it holds what looks like an access token or a password, and is written to config.yaml. "
                "Log in with `hf auth login`, or set HF_TOKEN or hub_token."
            )
        cls, item = known[key]
        values[cls][key] = _read_value(value, get_type_hints(cls)[key], item)
    for key in _REQUIRED:
        if key not in given:
            raise ConfigError(f"{path}: {key} is missing. Add a line {key}: …")
    with _located(path, given):
        model = build(ModelConfig, values[ModelConfig])
        data = build(DataConfig, values[DataConfig])
        training = build(CPTConfig, values[CPTConfig])
        if values[CPTConfig].get("metric_for_best_model") is None:
            name_best_metric(data, training)
        check_together(model, data, training)
        check_paths(data, training)
    return Configs(model, data, training)


def _read_file(path: Path) -> dict[str, Given]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. Give the path of a YAML file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    node = compose(text, str(path))
    if not isinstance(node, yaml.MappingNode) or node.tag != "tag:yaml.org,2002:map":
        kinds = {yaml.SequenceNode: "a list", yaml.ScalarNode: "text"}
        found = "nothing" if node is None else kinds.get(type(node), f"!<{node.tag}>")
        raise ConfigError(
            f"{path}: expected lines of key: value, found {found}. Needed are {', '.join(_REQUIRED)}."
        )
    given = {}
    for key, value in node.value:
        given[str(key.value)] = Given(str(key.value), value, path.parent, str(path), key.start_mark.line + 1)
    return given


def _read_overrides(tokens: Sequence[str]) -> dict[str, Given]:
    given: dict[str, Given] = {}
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not re.match(r"--\w", token):
            raise ConfigError(
                f"command line: {token} is no option. Write --key value; for a list '[one, two]'."
            )
        name, equals, text = token[2:].partition("=")
        if not equals:
            text = "true" if not rest or rest[0].startswith("--") else rest.pop(0)
        key = name.replace("-", "_")
        if key in given:
            raise given[key].error("repeated. Keep one of them.")
        node = compose(text, f"command line: {key}") or yaml.ScalarNode(
            "tag:yaml.org,2002:str", "", style='"'
        )
        given[key] = Given(key, node, Path(), "command line")
    return given


def _read_value(given: Given, hint: "TypeForm[object]", item: "Field[object]") -> object:
    if item.name in _REQUIRED and is_nothing(given.node):
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
        values = {}
        for key, node in given.node.value:
            part = given.inside(f".{key.value}", node)
            if key.value not in hints:
                raise part.error(f"unknown key. {did_you_mean(str(key.value), hints)}")
            values[key.value] = convert(part, hints[key.value])
    else:
        raise given.error("expected a path, or a mapping with path, found a list. Take one level off.")
    if "path" not in values:
        raise given.error("path is missing. Add path: …")
    try:
        return moved_source(build(SourceConfig, values), given.base, Path())
    except ValueError as error:
        raise given.error(str(error)) from error


@contextmanager
def _located(path: str | Path, given: Mapping[str, Given]) -> Iterator[None]:
    """Put file and line before what the dataclasses, or transformers, object to: the first key they name."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        message = " ".join(str(error).split())
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


def _is_written(item: "Field[object]", value: object) -> bool:
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
