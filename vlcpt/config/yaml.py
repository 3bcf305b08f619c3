"""One flat YAML file, and what the command line puts over it, become three checked dataclasses, and back."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import get_type_hints

import yaml
from transformers import TrainingArguments, training_args
from transformers.trainer_pt_utils import AcceleratorConfig

from vlcpt.config.early import RESOLVED_HEADER, EarlyConfig, located, moved, read_early, read_value
from vlcpt.config.schema import DataConfig, ModelConfig, SourceConfig
from vlcpt.config.training import CPTConfig, check_together, name_best_metric
from vlcpt.config.values import Dumper, is_secret

logger = logging.getLogger(__name__)


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
            what to do; all unknown keys and wrong values in one message.

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


def complete(early: EarlyConfig, *, computes: bool = True) -> Configs:
    """Make ``TrainingArguments`` of a configuration that was read before.

    Args:
        early: What was read.
        computes: Whether this machine trains or measures; only then must it have a GPU that ``bf16`` needs.

    Raises:
        ConfigError: As :func:`load_config`.
    """
    given, values = early.given, dict(early.training)
    for key in early.unchecked:
        values[key] = read_value(given[key], get_type_hints(CPTConfig)[key])
    lacks_bf16 = (
        values.get("bf16") and not values.get("use_cpu") and not training_args.is_torch_bf16_gpu_available()
    )
    if lacks_bf16 and computes:
        raise given["bf16"].error(
            "there is no GPU here that computes in bfloat16. Remove the key, for it is chosen by itself "
            "where a GPU has it; or set use_cpu: true."
        )
    if lacks_bf16:
        logger.info(
            "bf16: true needs a GPU that computes in bfloat16. There is none here; training needs one."
        )
        del values["bf16"]
    with located(early.path, given):
        training = CPTConfig(**values)  # type: ignore[arg-type]
        if values.get("metric_for_best_model") is None:
            name_best_metric(early.data, training)
        check_together(early.model, early.data, training)
    if lacks_bf16:
        training.bf16 = True
    return Configs(early.model, early.data, training)


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
