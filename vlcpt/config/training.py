"""CPTConfig: TrainingArguments with what continued pre-training adds, and which of them are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from vlcpt.config import precision as config_precision
from vlcpt.config.early import read_deepspeed
from vlcpt.config.packages import OPTIMIZERS
from vlcpt.config.schema import DataConfig, ModelConfig, key


@dataclass(repr=False)  # TrainingArguments has a __repr__ that hides tokens; a generated one would print them
class CPTConfig(TrainingArguments):
    """``transformers.TrainingArguments`` with what continued pre-training adds, and other defaults.

    Example:
        >>> CPTConfig(output_dir="out", use_cpu=True).per_device_train_batch_size
        1
    """

    max_length: int = key(4096, "Tokens of a packed sequence, media included. See also on_overlong.")
    packing: bool = key(True, "Join samples up to max_length tokens; they do not see each other.")
    vision_learning_rate: float | None = key(
        None, "Learning rate of the vision tower. Default: learning_rate."
    )
    merger_learning_rate: float | None = key(None, "Learning rate of the merger. Default: learning_rate.")
    embedding_learning_rate: float | None = key(
        None, "Learning rate of token embeddings and output layer. Default: learning_rate."
    )
    overwrite: bool = key(False, "Delete the earlier run in output_dir and start again.")
    # Wider than in TrainingArguments, where nothing reads it; Trainer.train takes true and a path as well.
    resume_from_checkpoint: bool | str | None = key(  # type: ignore[assignment]
        None,
        "false; true: the newest checkpoint; a path; or auto: the newest, or a new run if there is none.",
    )
    trust_checkpoint: bool = key(
        False, "Let DeepSpeed unpickle a checkpoint that this run did not write. It may run code."
    )
    # Wider than in TrainingArguments: None is what nobody has said.
    bf16: bool | None = key(  # type: ignore[assignment]
        None,
        "Compute in bfloat16. Default: true on a GPU that has it in hardware, unless fp16 or the DeepSpeed "
        "config says otherwise.",
    )
    per_device_train_batch_size: int = key(1, "Packs (samples without packing) per device in a forward pass.")
    per_device_eval_batch_size: int = key(1, "The same in evaluation; results do not depend on it.")
    logging_steps: float = key(
        1, "Optimizer steps from one log line to the next; below 1: part of all steps."
    )
    logging_nan_inf_filter: bool = key(False, "Hide a loss that is not a finite number in the log.")
    remove_unused_columns: bool = key(False, "Must stay false: true would drop loss_weights.")
    dataloader_num_workers: int = key(2, "Processes per device that read and encode media. 0: none.")
    dataloader_persistent_workers: bool = key(True, "Keep these processes from epoch to epoch.")
    dataloader_timeout: int = key(
        1800,
        "Seconds to wait for a process's batch; then the run stops and names the documents. 0: no limit.",
    )
    deepspeed: dict[str, object] | str | None = key(
        None, "A DeepSpeed config: a path, or the name of a shipped one, such as zero2 or zero3."
    )

    def __post_init__(self) -> None:
        if self.resume_from_checkpoint in ("true", "false"):  # in quotes, or from a launcher
            self.resume_from_checkpoint = self.resume_from_checkpoint == "true"
        check_training(self)
        checkpointing = _checkpointing_kwargs(self)
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = torch.cuda.is_available() and not self.use_cpu
        if self.activation_checkpointing or self.gradient_checkpointing:
            self.activation_checkpointing_kwargs = checkpointing
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith("perplexity"):
            self.greater_is_better = False  # Trainer knows it of a loss only
        if self.dataloader_num_workers == 0:
            self.dataloader_persistent_workers = False  # torch refuses it without workers
        written = self.deepspeed
        sharding = read_deepspeed(written)
        asked = config_precision.read_asked(self, sharding)
        precision = config_precision.choose_precision(asked, config_precision.device_facts())
        # Both are asked for only where the user did so, which transformers refuses.
        self.bf16, self.fp16 = precision == "bf16", self.fp16 or precision == "fp16"
        if sharding is not None:
            self.deepspeed = config_precision.with_precision(sharding)
        super().__post_init__()
        self.deepspeed = written  # so that no path of this installation gets into a saved configuration
        _check_accelerator(self)
        if self.use_cpu and torch.distributed.is_initialized():
            # transformers 5.23 gives ddp_timeout to every group but that of CPUs, which then waits for 30
            # minutes; tests/training/test_ranks.py tells whether it is kept.
            torch.distributed.set_timeout(timedelta(seconds=self.ddp_timeout))


# Settings that keep their default, since another value would be ignored or spoil the run: what to do instead.
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
# The key of each group of the optimizer.
LEARNING_RATES: Mapping[str, str] = {
    "language": "learning_rate",
    "vision": "vision_learning_rate",
    "merger": "merger_learning_rate",
    "embeddings": "embedding_learning_rate",
}
_LARGEST_SEED = 2**32 - 1  # numpy takes no larger one


def check_training(training: CPTConfig) -> None:
    """Raise ValueError for settings of the Trainer that cannot work here, or mean nothing."""
    name = getattr(training.optim, "value", training.optim)
    if name not in OPTIMIZERS:
        raise ValueError(
            f"optim {name} makes its own parameter groups, or is not known to take those of the towers. "
            f"Choose one of: {', '.join(OPTIMIZERS)}."
        )
    for name, instead in _REFUSED.items():
        if bool(getattr(training, name)) != bool(getattr(CPTConfig, name)):
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
    for name in LEARNING_RATES.values():
        rate = getattr(training, name)
        if rate is not None and rate < 0:
            raise ValueError(f"{name} {rate} must not be below 0.")
    if training.num_train_epochs <= 0 and training.max_steps <= 0:
        raise ValueError(f"num_train_epochs {training.num_train_epochs} must be above 0, or max_steps.")
    for name in ("seed", "data_seed"):
        seed = getattr(training, name)
        if seed is not None and not 0 <= seed <= _LARGEST_SEED:
            raise ValueError(f"{name} {seed} must be from 0 to {_LARGEST_SEED}.")
    if training.overwrite and training.resume_from_checkpoint:
        raise ValueError(
            "overwrite would delete the checkpoints that resume_from_checkpoint continues from. "
            "Remove one of them."
        )
    if training.max_length < 2:
        raise ValueError(f"max_length {training.max_length} must be 2 or more: a first token has no context.")


def _check_accelerator(training: CPTConfig) -> None:
    """Raise ValueError where ``accelerator_config``, once read, would lose documents or reorder them."""
    config = training.accelerator_config
    assert isinstance(config, AcceleratorConfig)
    for name, (needed, why) in _ACCELERATOR.items():
        # None is the default of dispatch_batches, and False is what it means here.
        if (getattr(config, name) or None) != (needed or None):
            raise ValueError(f"accelerator_config: {name}: {why}. Remove it.")
    if "num_steps" in (config.gradient_accumulation_kwargs or {}):
        raise ValueError("accelerator_config: num_steps: Set gradient_accumulation_steps instead.")


def _checkpointing_kwargs(training: CPTConfig) -> dict[str, object]:
    """How activation checkpoints are made: as given under either name, and never reentrant."""
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


_RATES = {"vision": "train_vision", "merger": "train_merger", "embedding": "train_embeddings"}


def check_together(model: ModelConfig, data: DataConfig, training: CPTConfig) -> None:
    """Raise ValueError where one part of a configuration asks for what another does not give."""
    for part, switch in _RATES.items():
        if getattr(training, f"{part}_learning_rate") is not None and not getattr(model, switch):
            raise ValueError(f"{part}_learning_rate would not be used. Set {switch}: true, or remove it.")
    _check_evaluation(data, training)
    if model.adapter_name_or_path is not None and (changed := model.changed_lora):
        raise ValueError(
            f"{changed} would not be used with adapter_name_or_path: the adapter brings its own. "
            "Remove what you set, or start a new adapter."
        )


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


def _check_evaluation(data: DataConfig, training: CPTConfig) -> None:
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
