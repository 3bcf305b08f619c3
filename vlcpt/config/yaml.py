"""One flat YAML file, and what the command line puts over it, become three checked dataclasses, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_type_hints

import yaml

from vlcpt.config.keys import REQUIRED, explain_field, known_types, read_keys, read_table, wrong_keys
from vlcpt.config.paths import HUB_NAME, moved, moved_source, wrong_paths
from vlcpt.config.rules import rules_between, training_rules
from vlcpt.config.schema import DataConfig, ModelConfig, as_sources
from vlcpt.config.values import NULL, Dumper, Given, compose, convert, is_nothing, is_secret
from vlcpt.data.rows.open import SourceConfig
from vlcpt.errors import ConfigError, collected, refuse
from vlcpt.run_files import RESOLVED_HEADER

if TYPE_CHECKING:
    from typing_extensions import TypeForm

    from vlcpt.config.training import CPTConfig

T = TypeVar("T")

_LARGEST = 2**20  # bytes of a configuration; reading YAML takes a second for each of these
# How a run was started is not what it does: with these, repeating it would erase or continue the first one.
_STARTING = (
    *("overwrite", "resume_from_checkpoint", "local_rank"),
    *("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision"),
)
_ALIASES = ("gradient_checkpointing", "gradient_checkpointing_kwargs")  # transformers mirrors the new names
_EVALUATING = ("eval_on_start", "eval_on_end")
# Settings that decide what is learnt: written down even at their defaults, which another release may change.
_ALWAYS = (
    *("output_dir", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "activation_checkpointing", "seed"),
)
# What TrainingArguments turns a default into, where the two differ.
_RESOLVED_DEFAULTS: Mapping[str, object] = {
    **{"report_to": [], "debug": [], "include_num_input_tokens_seen": "no", "disable_tqdm": False}
}


@dataclass(frozen=True)
class EarlyConfig:
    """A configuration that is checked but for what ``TrainingArguments`` alone refuses.

    Args:
        path: The YAML file.
        given: What was written, by key.
        model: Its part about the model.
        data: Its part about the data.
        training: Values for ``CPTConfig``, by key.
    """

    path: Path
    given: Mapping[str, Given]
    model: ModelConfig
    data: DataConfig
    training: Mapping[str, object]

    @property
    def output(self) -> Path:
        """The ``output_dir``."""
        return Path(str(self.training["output_dir"]))

    def located(self, messages: Iterable[str]) -> list[str]:
        """Messages with the place of the first key that each names before them."""
        return [_located(self.path, self.given, message) for message in messages]


@dataclass(frozen=True)
class Configs:
    """The configuration of a run, checked."""

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
            what to do; all of it in one message, but that rules between
            values are checked when each value is right.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "run.yaml")
        ...     Path(folder, "a.jsonl").touch()
        ...     _ = path.write_text("{model_name_or_path: org/model, train_data: a.jsonl, output_dir: out}")
        ...     load_config(path, ["--learning-rate", "1e-5", "--use_cpu"]).training.learning_rate
        1e-05
    """
    return complete(read_early(path, overrides))


def read_early(path: str | Path, overrides: Sequence[str] = ()) -> EarlyConfig:
    """Read a configuration without torch; for its arguments and errors see :func:`load_config`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (file := Path(folder, "run.yaml")).write_text("max_lenght: 8") and None
        ...     read_early(file)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: .../run.yaml:1: max_lenght: unknown key. Did you mean max_length?
    """
    path, types = Path(path), known_types()
    given, wrong = _read_file(path)
    given |= _read_overrides(overrides)
    unknown, pasted = wrong_keys(given)
    values: dict[str, object] = {}
    for key, value in given.items():
        if key in unknown:
            wrong.append(unknown[key])
            continue
        with collected(wrong):
            values[key] = read_value(value, types[key])
    wrong = wrong or [
        f"{path}: {key} is missing. Add a line {key}: …" for key in REQUIRED if key not in given
    ]
    broken = list(wrong_paths(values))
    model = data = None
    if not wrong:  # rules compare values, so each must be right
        with collected(broken):
            model = _build(ModelConfig, values)
        with collected(broken):
            data = _build(DataConfig, values)
        broken += training_rules(values)
        if model is not None and data is not None:
            broken += rules_between(model, data, values)
    refuse([*wrong, *(_located(path, given, message) for message in broken), *pasted])
    assert model is not None and data is not None
    return EarlyConfig(path, given, model, data, values)


def _build(cls: type[T], values: dict[str, object]) -> T:
    """Make a dataclass of the values under its keys, and take these out."""
    return cls(**{key: values.pop(key) for key in get_type_hints(cls) if key in values})


def complete(early: EarlyConfig, *, computes: bool = True) -> Configs:
    """Make ``TrainingArguments`` of a configuration that was read before.

    Args:
        early: What was read.
        computes: See :func:`vlcpt.config.training.make_training`.

    Raises:
        ConfigError: As :func:`load_config`.
    """
    from vlcpt.config.training import make_training

    try:
        training = make_training(early.training, early.data, computes=computes)
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        messages = error.args if isinstance(error, ConfigError) else [" ".join(str(error).split())]
        raise ConfigError(*early.located(messages)) from error
    return Configs(early.model, early.data, training)


def _located(path: Path, given: Mapping[str, Given], message: str) -> str:
    """Put file and line before a message: those of the first key that it names."""
    key = next((word for word in re.findall(r"\w+", message) if word in given), None)
    return f"{path}: {message}" if key is None else given[key].message(message)


def read_value(given: Given, hint: TypeForm[object]) -> object:
    """Turn what is written under a key into a value of its type, with paths from the current folder.

    Raises:
        ConfigError: With the place, what was expected and what was found.
    """
    key = given.key
    if key in REQUIRED and is_nothing(given.node):
        raise given.error("expected a value, found nothing. Give one.")
    if hint == tuple[SourceConfig, ...]:
        if given.node.tag == NULL:
            return ()
        return _read_sources(given)
    word = given.node.value if isinstance(given.node, yaml.ScalarNode) else ""
    if (here := read_table()["values"].get(key, {}).get(word)) is not None:
        raise given.error(f"{word} is called {here} here. Write: {key}: {here}")
    value = convert(given, hint)
    if key.endswith("name_or_path") and isinstance(value, str) and not HUB_NAME.fullmatch(value):
        folder = given.base / Path(value).expanduser()
        if not folder.is_dir():
            raise given.error(
                f"there is no folder {folder}, and the Hub has no such names. Correct the path."
            )
    return moved(key, value, given.base, Path())


def _read_sources(given: Given) -> tuple[SourceConfig, ...]:
    nodes = given.node.value if isinstance(given.node, yaml.SequenceNode) else [given.node]
    found: list[SourceConfig] = []
    wrong: list[str] = []
    for number, node in enumerate(nodes):
        with collected(wrong):
            found.append(_read_source(given.inside(f"[{number}]", node)))
    refuse(wrong)
    return tuple(found)


def _read_source(given: Given) -> SourceConfig:
    hints = get_type_hints(SourceConfig)
    values: dict[str, object] = {}
    wrong: list[str] = []
    if isinstance(given.node, yaml.ScalarNode):
        values["path"] = convert(given, str)
    elif not isinstance(given.node, yaml.MappingNode):
        raise given.error("expected a path, or a mapping with path, found a list. Take one level off.")
    else:
        for key, node in given.node.value:
            field = given.inside(f".{key.value}", node)
            with collected(wrong):
                if key.value not in hints:
                    raise field.error(explain_field(key.value, field))
                values[key.value] = convert(field, hints[key.value])
    refuse(wrong)
    if "path" not in values:
        raise given.error("path is missing. Add path: …")
    try:
        (source,) = as_sources(values)
        return moved_source(source, given.base, Path())
    except ValueError as error:
        raise given.error(str(error)) from error


def _read_file(path: Path) -> tuple[dict[str, Given], list[str]]:
    """What a file holds, by key, and a message for each key that it repeats."""
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ConfigError(
                f"{path}: it has over {_LARGEST:,} bytes, which no configuration has. Give the path of a "
                "YAML file; data are named in it."
            )
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. Give the path of a YAML file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    node, repeated = compose(text, str(path))
    if not isinstance(node, yaml.MappingNode) or node.tag != "tag:yaml.org,2002:map":
        kinds = {yaml.SequenceNode: "a list", yaml.ScalarNode: "text"}
        found = "nothing" if node is None else kinds.get(type(node), f"!<{node.tag}>")
        raise ConfigError(
            f"{path}: expected lines of key: value, found {found}. Needed are {', '.join(REQUIRED)}."
        )
    given: dict[str, Given] = {}
    for key, value in node.value:
        given.setdefault(key.value, Given(key.value, value, path.parent, str(path), key.start_mark.line + 1))
    return given, repeated


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
        node, repeated = compose(text.strip() or "''", f"command line: {key}")
        refuse(repeated)
        if node is None:
            raise ConfigError(f"command line: {key}: {text} is a comment of YAML. Quote it.")
        given[key] = Given(key, node, Path(), "command line")
    return given


def dump_config(configs: Configs, directory: Path) -> str:
    """Write a configuration as YAML that :func:`load_config` reads back as an equal one from ``directory``.

    Relative paths are made to start at ``directory``. Left out are secrets, and how the run was started
    (``overwrite``, ``resume_from_checkpoint``, ``push_to_hub``): repeating it must not touch the first one.

    Args:
        configs: As ``load_config`` gave it, in the same current directory.
        directory: The folder in which the text will be saved.

    Example:
        >>> from vlcpt import CPTConfig
        >>> model, data = ModelConfig("org/model"), DataConfig("data/train.jsonl")
        >>> text = dump_config(Configs(model, data, CPTConfig("out", use_cpu=True)), Path("out"))
        >>> [line for line in text.splitlines() if "train.jsonl" in line or "output_dir" in line][1:]
        ['- ../data/train.jsonl', 'output_dir: .']
    """
    values: dict[str, object] = {}
    for config in (configs.model, configs.data, configs.training):
        for item in fields(config):
            value = getattr(config, item.name)
            if item.name in _EVALUATING and not (configs.data.eval_data or configs.data.retention_data):
                continue  # in Python it is chosen before the data is known
            if _is_written(item, value):
                values[item.name] = _plain(moved(item.name, value, Path(), directory))
    return RESOLVED_HEADER + yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def _is_written(item: Field[object], value: object) -> bool:
    if item.name in _STARTING or item.name in _ALIASES or is_secret(item.name):
        return False
    # Keys that Trainer lacks, or that have another default there.
    if any(item.name in read_keys()[section] for section in ("model", "data", "training")):
        return value is not None and value != ()
    if item.name in _ALWAYS:
        return True
    if is_dataclass(value) and not isinstance(value, type):  # accelerator_config
        return value != type(value)()
    default = item.default if item.default_factory is MISSING else item.default_factory()
    return value not in (default, _RESOLVED_DEFAULTS.get(item.name, default))


def _plain(value: object) -> object:
    """Turn a value into what YAML has: text, numbers, lists and mappings."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, SourceConfig):
        default = asdict(SourceConfig(value.path))
        kept = {name: _plain(one) for name, one in asdict(value).items() if one != default[name]}
        kept |= {"name": value.name} if value.is_named else {}  # the model card shows a name that was given
        return {"path": value.path, **kept} if kept else value.path
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
