"""CPTConfig: TrainingArguments with what continued pre-training adds."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments, training_args
from transformers.trainer_pt_utils import AcceleratorConfig

from vlcpt.config import precision as config_precision
from vlcpt.config.paths import read_deepspeed
from vlcpt.config.rules import training_rules
from vlcpt.config.schema import DataConfig, key
from vlcpt.errors import ConfigError, refuse
from vlcpt.eval_names import logged_name

logger = logging.getLogger(__name__)

LOSS_CHUNK = 128  # targets: the fastest on a CPU, and small beside the logits of a pack


def default_workers() -> int:
    """Loader workers of a process: its part of the machine's cores less its own, from 2 to 8.

    More hardly pay where packs take a second on the device; ``vlcpt check --gpu`` says what a run needs.
    """
    has_affinity = hasattr(os, "sched_getaffinity")  # of a container or a job; not on every system
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(cores // processes - 1, 2), 8)


@dataclass(repr=False)  # TrainingArguments has a __repr__ that hides tokens; a generated one would print them
class CPTConfig(TrainingArguments):
    """``transformers.TrainingArguments`` with what continued pre-training adds, and other defaults.

    Example:
        >>> CPTConfig(output_dir="out", use_cpu=True).per_device_train_batch_size
        1
    """

    max_length: int = key(4096, "Tokens of a packed sequence, media included. See also on_overlong.")
    packing: bool = key(True, "Join samples up to max_length tokens; they do not see each other.")
    balance_ranks: bool | None = key(
        None,
        "Let the packs of a step cost nearly the same, so that no rank waits for another. Default: true with "
        "several processes; a resumed run keeps what its checkpoint has.",
    )
    vision_learning_rate: float | None = key(
        None, "Learning rate of the vision tower. Default: learning_rate."
    )
    merger_learning_rate: float | None = key(None, "Learning rate of the merger. Default: learning_rate.")
    embedding_learning_rate: float | None = key(
        None, "Learning rate of token embeddings and output layer. Default: learning_rate."
    )
    loss_chunk: int = key(
        LOSS_CHUNK,
        "Targets whose logits are held at once, so that memory does not grow with the targets of a pack. "
        "0: all, as transformers does.",
    )
    # Wider than in TrainingArguments: auto is the same as no value.
    activation_checkpointing: bool | str | None = key(  # type: ignore[assignment]
        None,
        "Compute activations again instead of keeping them: true, false, or auto: on a GPU, unless all of "
        "them would stay under 0.7 of its memory.",
    )
    pixel_bytes: bool = key(
        True, "Send pixels to the device as bytes and scale them there. false: as float32, from the workers."
    )
    vision_cache: str | None = key(
        None,
        "Folder that keeps what a frozen vision tower and merger give for each medium, so that they run once "
        "for it. Filled in training, or ahead by vlcpt prepare.",
    )
    vision_cache_dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto", "Type in which vision_cache stores. auto: the one computed, so that no loss changes."
    )
    patch_embedding: Literal["auto", "conv", "linear"] = key(
        "auto",
        "How patches of pixels are embedded. conv: the model's Conv3d, which some releases of cuDNN compute "
        "slowly. linear: the equal linear layer. auto: on a GPU the faster of both, measured at the start.",
    )
    # Wider than in TrainingArguments: None is what nobody has said.
    eval_strategy: Literal["no", "steps", "epoch"] | None = key(  # type: ignore[assignment]
        None,
        "When to evaluate in training: no, steps or epoch. Default: at its start and its end, where there is "
        "something to evaluate.",
    )
    eval_on_start: bool | None = key(  # type: ignore[assignment]
        None, "Evaluate before the first step. Default: true where eval_strategy is not set."
    )
    eval_on_end: bool | None = key(
        None, "Evaluate after the last step. Default: true where eval_strategy is not set."
    )
    eval_blank_images: bool = key(
        True,
        "In each evaluation, also measure sets with images or videos on blank ones, so that the log says how "
        "far the text relies on them (eval_<set>_reliance). It runs the model over these sets twice.",
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
    # Wider than in TrainingArguments: None until the number is chosen.
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
    # Wider than in TrainingArguments: None until the number is chosen.
    dataloader_num_workers: int | None = key(  # type: ignore[assignment]
        None,
        "Processes per device that read and encode media. 0: none. Default: a core each, 2 to 8.",
    )
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
        refuse(training_rules(vars(self)))
        checkpointing = _checkpointing_kwargs(self)
        if isinstance(self.activation_checkpointing, str):
            self.activation_checkpointing = _checkpointing(self.activation_checkpointing)
        # `vlcpt train` turns it off where activations fit.
        self.chooses_checkpointing = (
            self.activation_checkpointing is None and self.gradient_checkpointing is None
        )
        if self.chooses_checkpointing:
            self.activation_checkpointing = torch.cuda.is_available() and not self.use_cpu
        if self.recomputes_activations:
            self.activation_checkpointing_kwargs = checkpointing
        # CPTTrainer turns off what nobody has asked for, where there is nothing to evaluate.
        self.chooses_evaluation = self.eval_strategy is None
        asked = (self.eval_on_start, self.eval_on_end)
        self.eval_on_start, self.eval_on_end = (
            self.chooses_evaluation if one is None else one for one in asked
        )
        self.eval_strategy = "no" if self.eval_strategy is None else self.eval_strategy
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith("perplexity"):
            self.greater_is_better = False  # Trainer knows it of a loss only
        if self.torch_compile:
            self.loss_chunk = 0  # in chunks the output layer's forward is another one in each step
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = default_workers()
        if self.dataloader_num_workers == 0:
            self.dataloader_persistent_workers = False  # torch refuses it without workers
        written = self.deepspeed
        sharding = read_deepspeed(written)
        precision = config_precision.choose_precision(
            config_precision.device_facts(),
            bf16=self.bf16,
            fp16=self.fp16,
            use_cpu=self.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU"),
            launcher=os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
            deepspeed=sharding,
        )
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

    @property
    def workers(self) -> int:
        """``dataloader_num_workers`` as it is used."""
        return self.dataloader_num_workers or 0

    @property
    def recomputes_activations(self) -> bool:
        """Whether activations are computed again in the backward pass, by either name of the key."""
        return bool(self.activation_checkpointing or self.gradient_checkpointing)


_ACCELERATOR: Mapping[str, tuple[object, str]] = {
    "split_batches": (False, "a batch is of each process, and the end of an epoch would be lost"),
    "dispatch_batches": (None, "rank 0 would cut batches apart, and pixels with them"),
    "even_batches": (True, "ranks would wait for batches that others do not have"),
    "use_seedable_sampler": (True, "a resumed run would read another order"),
}


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


def _checkpointing(given: str) -> bool | None:
    """The value of a word, such as a launcher gives it."""
    words = {"true": True, "false": False, "auto": None}
    if given not in words:
        raise ValueError(f"activation_checkpointing: expected true, false or auto, found {given!r}.")
    return words[given]


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


def make_training(values: Mapping[str, object], data: DataConfig, *, computes: bool = True) -> CPTConfig:
    """The settings of training of a configuration, from its values by key.

    The best model is that with the least loss on the first evaluation set, unless the values name another
    metric: Trainer's own default, ``loss``, is never measured, for each set's numbers bear its name.

    Args:
        values: By key; one that is not among them has its default.
        data: The data of the same configuration.
        computes: Whether this machine trains or measures; only then must it have a GPU that ``bf16`` needs.

    Raises:
        ValueError: If ``TrainingArguments`` refuses a value.
    """
    needs_gpu = values.get("bf16") and not values.get("use_cpu")
    lacks_bf16 = needs_gpu and not training_args.is_torch_bf16_gpu_available()
    if lacks_bf16 and computes:
        raise ConfigError(
            "bf16: there is no GPU here that computes in bfloat16. Remove the key, for it is chosen by "
            "itself where a GPU has it; or set use_cpu: true."
        )
    if lacks_bf16:
        logger.info(
            "bf16: true needs a GPU that computes in bfloat16. There is none here; training needs one."
        )
        values = {key: value for key, value in values.items() if key != "bf16"}
    sets = data.eval_data + data.retention_data
    if not sets and values.get("eval_strategy") is None:
        values = {"eval_on_start": False, "eval_on_end": False, **values}
    training = CPTConfig(**values)  # type: ignore[arg-type]
    training.bf16 = training.bf16 or bool(lacks_bf16)
    # Trainer fills in its default wherever it needs one, but for save_strategy: best.
    is_needed = training.metric_for_best_model is not None or training.save_strategy == "best"
    if sets and is_needed and values.get("metric_for_best_model") is None:
        training.metric_for_best_model = logged_name(sets[0].name, "loss")
        training.greater_is_better = False
    return training
