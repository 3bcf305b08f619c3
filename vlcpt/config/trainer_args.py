"""Which ``TrainingArguments`` are refused, and why, before data or weights are read.

Nothing heavy is imported at the top: a misspelt key is reported without it, see ``config/keys.py``.
``CPTConfig`` calls :func:`check_training` when it is built.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Those of torch and bitsandbytes: they take a group for each tower. Others (lomo, galore, apollo …) make
# their own groups, or need the model.
PLAIN_OPTIMIZERS = (
    *("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"),
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_8bit", "paged_ademamix_32bit"),
    *("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
)

# Settings of TrainingArguments that a run would ignore, or that would spoil it: what to do instead.
_REFUSED: Mapping[str, str] = {
    "fsdp": "FSDP is refused: use deepspeed: zero2 or deepspeed: zero3.",
    "fsdp_config": "FSDP is refused: use deepspeed: zero2 or deepspeed: zero3.",
    "parallelism_config": "Only data parallelism is supported: use deepspeed: zero3.",
    "remove_unused_columns": "It would drop loss_weights and positions from the data. Remove the key.",
    "label_smoothing_factor": "The loss is over marked targets, without smoothing. Remove the key.",
    "use_liger_kernel": "It replaces the loss that vlcpt computes. Remove the key.",
    "neftune_noise_alpha": "Its noise would depend on how documents are packed. Remove the key.",
    "batch_eval_metrics": "Evaluation adds up rows, and no means of batches. Remove the key.",
    "bf16_full_eval": "It would round the weights that train, in place. Set bf16: true, or remove the key.",
    "fp16_full_eval": "It would round the weights that train, in place. Set fp16: true, or remove the key.",
    "ignore_data_skip": "A resumed run would read documents again, and others never. Remove the key.",
    "auto_find_batch_size": "It would begin anew with trained weights. Set per_device_train_batch_size: 1.",
    "dataloader_drop_last": "It would lose documents. Remove the key.",
    "enable_jit_checkpoint": "vlcpt saves at SIGTERM and SIGINT by itself. Remove the key.",
    "hub_always_push": "Only the result is pushed, once. Remove the key.",
}
_STAYS_ON: Mapping[str, str] = {
    "dataloader_in_order": "Workers would change the order, on which a resume relies. Remove the key.",
    "eval_do_concat_batches": "Evaluation needs its rows in one piece. Remove the key.",
}
_SAMPLING = ("random", "sequential")
_ACCELERATOR: Mapping[str, tuple[object, str]] = {
    "split_batches": (False, "a batch is of each process, and the end of an epoch would be lost"),
    "dispatch_batches": (None, "rank 0 would cut batches apart, and pixels with them"),
    "even_batches": (True, "ranks would wait for batches that others do not have"),
    "use_seedable_sampler": (True, "a resumed run would read another order"),
}
_AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_AT_LEAST_ZERO = ("dataloader_num_workers", "dataloader_timeout")
_LEARNING_RATES = ("learning_rate", "vision_learning_rate", "merger_learning_rate", "embedding_learning_rate")
_LARGEST_SEED = 2**32 - 1  # numpy takes no larger one


def check_training(training: "TrainingArguments") -> None:
    """Raise ValueError for settings of the Trainer that cannot work here, or mean nothing."""
    for name, instead in _REFUSED.items():
        if getattr(training, name):
            raise ValueError(f"{name}: {instead}")
    for name, instead in _STAYS_ON.items():
        if not getattr(training, name):
            raise ValueError(f"{name}: {instead}")
    if training.train_sampling_strategy not in _SAMPLING:
        raise ValueError(
            f"train_sampling_strategy {training.train_sampling_strategy}: it cannot see how long a pack is. "
            f"Choose one of: {', '.join(_SAMPLING)}."
        )
    if getattr(training.hub_strategy, "value", training.hub_strategy) not in ("end", "every_save"):
        raise ValueError("hub_strategy: Only the result is pushed, no checkpoint. Remove the key.")
    for name in ("hub_model_id", "hub_revision"):
        if getattr(training, name) is not None and not training.push_to_hub:
            raise ValueError(f"{name} would not be used. Set push_to_hub: true, or remove it.")
    for least, names in ((1, _AT_LEAST_ONE), (0, _AT_LEAST_ZERO)):
        for name in names:
            if getattr(training, name) < least:
                raise ValueError(f"{name} {getattr(training, name)} must be {least} or more.")
    for name in _LEARNING_RATES:
        rate = getattr(training, name)
        if rate is not None and rate < 0:
            raise ValueError(f"{name} {rate} must not be below 0.")
    if training.num_train_epochs <= 0 and training.max_steps <= 0:
        raise ValueError(f"num_train_epochs {training.num_train_epochs} must be above 0, or max_steps.")
    for name in ("seed", "data_seed"):
        seed = getattr(training, name)
        if seed is not None and not 0 <= seed <= _LARGEST_SEED:
            raise ValueError(f"{name} {seed} must be from 0 to {_LARGEST_SEED}.")


def check_accelerator(training: "TrainingArguments") -> None:
    """Raise ValueError where ``accelerator_config``, once read, would lose documents or reorder them."""
    config = training.accelerator_config
    from transformers.trainer_pt_utils import AcceleratorConfig

    assert isinstance(config, AcceleratorConfig)
    for name, (needed, why) in _ACCELERATOR.items():
        # None is the default of dispatch_batches, and False is what it means here.
        if (getattr(config, name) or None) != (needed or None):
            raise ValueError(f"accelerator_config: {name}: {why}. Remove it.")
    if "num_steps" in (config.gradient_accumulation_kwargs or {}):
        raise ValueError("accelerator_config: num_steps: Set gradient_accumulation_steps instead.")


def checkpointing_kwargs(training: "TrainingArguments") -> dict[str, object]:
    """How activation checkpoints are made: as given under either name, and never reentrant.

    Raises:
        ValueError: If that is no mapping, or asks for reentrant ones.

    Example:
        >>> from vlcpt.config.schema import CPTConfig
        >>> checkpointing_kwargs(CPTConfig("out", use_cpu=True))
        {'use_reentrant': False}
    """
    name = "activation_checkpointing_kwargs"
    if not getattr(training, name) and training.gradient_checkpointing_kwargs:
        name = "gradient_checkpointing_kwargs"
    given = getattr(training, name) or {}
    if isinstance(given, str):  # JSON, as Trainer takes it
        with suppress(json.JSONDecodeError):
            given = json.loads(given)
    if not isinstance(given, Mapping):
        raise ValueError(f"{name}: expected a mapping, found {given!r}. Remove the key.")
    if given.get("use_reentrant"):
        # They need inputs with gradients, which frozen embeddings do not give.
        raise ValueError(f"{name}: use_reentrant: true does not work with frozen weights. Remove it.")
    return {"use_reentrant": False, **given}


def check_optimizer(training: "TrainingArguments") -> None:
    """Raise ValueError for an optimizer that cannot give each tower its own learning rate."""
    name = getattr(training.optim, "value", training.optim)
    if name not in PLAIN_OPTIMIZERS:
        raise ValueError(
            f"optim {name} makes its own parameter groups, or is not known to take those of the towers. "
            f"Choose one of: {', '.join(PLAIN_OPTIMIZERS)}."
        )


def shipped_deepspeed() -> dict[str, str]:
    """Map the name of each DeepSpeed config that comes with vlcpt to its file."""
    folder = files("vlcpt.deepspeed_configs")
    return {Path(entry.name).stem: str(entry) for entry in folder.iterdir() if entry.name.endswith(".json")}


def read_deepspeed(given: dict[str, object] | str | None) -> dict[str, object] | None:
    """A DeepSpeed config, whatever it is given as: a mapping, JSON, a path, the name of a shipped one.

    Raises:
        ValueError: If it is no mapping, or there is no such file.

    Example:
        >>> read_deepspeed('{"zero_optimization": {"stage": 2}}')
        {'zero_optimization': {'stage': 2}}
        >>> read_deepspeed("zero3")["zero_optimization"]["stage"]
        3
    """
    if not given:
        return None
    found = given
    if isinstance(given, str):
        text = given if given.startswith("{") else Path(resolve_deepspeed(given, Path())).read_text("utf-8")
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"deepspeed is not JSON: {error}. Correct it.") from error
    if not isinstance(found, dict):
        raise ValueError(f"deepspeed: expected a mapping, found {type(found).__name__}. Correct it.")
    return found


def resolve_deepspeed(name: str, base: Path) -> str:
    """Find a DeepSpeed config: the name of a shipped one, or a path, from ``base`` if it is relative.

    Raises:
        ValueError: If there is neither, with the names of those shipped.

    Example:
        >>> resolve_deepspeed("zero9", Path())  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: deepspeed 'zero9' is no file and no shipped config. Shipped: ...
    """
    shipped = shipped_deepspeed()
    if name in shipped:
        return shipped[name]
    path = base / Path(name).expanduser()
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"deepspeed {name} is not JSON: {error}. Correct the file.") from error
    except OSError as error:
        raise ValueError(
            f"deepspeed {name!r} is no file and no shipped config. Shipped: {', '.join(sorted(shipped))}."
        ) from error
    return str(path)
