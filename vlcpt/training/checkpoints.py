"""Resuming with every tensor, and with the random numbers that the run would have had."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint


def find_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | None:
    """The checkpoint to go on from; None to start fresh.

    Args:
        resume_from_checkpoint: False or None: fresh. True: the newest in ``output_dir``. ``"auto"``: the
            newest, fresh only if there is none. Else a checkpoint's folder.
        output_dir: The run's folder.

    Raises:
        ValueError: If a checkpoint was asked for and is not there.

    Example:
        >>> find_checkpoint(False, "anywhere") is None
        True
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is True or resume_from_checkpoint == "auto":
        found = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        if found is None and resume_from_checkpoint is True:
            raise ValueError(
                f"resume_from_checkpoint is true but {output_dir} holds no checkpoint. "
                "Give the folder of one, or 'auto' to start fresh where there is none."
            )
        return found
    if not (Path(resume_from_checkpoint) / "trainer_state.json").is_file():
        raise ValueError(f"{resume_from_checkpoint} is not a checkpoint: it has no trainer_state.json.")
    return resume_from_checkpoint


def restore_weights(model: PreTrainedModel | PeftModel, checkpoint: str) -> None:
    """Load every tensor of a full fine-tuning checkpoint into the model in memory.

    Trainer of transformers 5.23 loads a checkpoint's Hub names into the in-memory names with
    ``strict=False``, which restores 1 of 57 tensors; tests/training/test_checkpoints.py tells when
    that ends. Adapters it restores whole, so they are left to it.

    Raises:
        RuntimeError: If any tensor is missing, unexpected, or of another shape.
    """
    if isinstance(model, PeftModel):
        return
    # float32 holds every bfloat16 exactly, and copying into the model rounds back to the same number.
    saved = type(model).from_pretrained(checkpoint, dtype=torch.float32)
    model.load_state_dict(saved.state_dict())


@contextmanager
def quiet_partial_load() -> Iterator[None]:
    """Silence Trainer's warning about the tensors that it did not load: they are loaded already."""
    logger = logging.getLogger("transformers.trainer")

    def keep(record: logging.LogRecord) -> bool:
        return "keys in the checkpoint model loaded" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


class StepSeeds(TrainerCallback):
    """Seeds each step by the run's seed, the step and the rank, so that dropout is the same after a resume.

    Trainer restores the random state it saved, but loaders draw from the same stream when they start
    their workers: persistent ones once a process, and so at another step in a resumed run.

    Example:
        >>> args, state = TrainingArguments(output_dir="out", use_cpu=True), TrainerState()
        >>> StepSeeds().on_step_begin(args, state, TrainerControl())
        >>> first = torch.rand(1)
        >>> StepSeeds().on_step_begin(args, state, TrainerControl())
        >>> torch.equal(torch.rand(1), first)
        True
    """

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Seed torch, on every device."""
        # Each step of each rank has a number of its own, up to a million of them.
        torch.manual_seed(args.seed * 1_000_000 + state.global_step * args.world_size + args.process_index)


@contextmanager
def cache_in_saved_config(config: PreTrainedConfig) -> Iterator[None]:
    """Let a saved configuration say ``use_cache``, which is off in training so that packs stay apart.

    Example:
        >>> config = PreTrainedConfig()
        >>> config.use_cache = False
        >>> with cache_in_saved_config(config):
        ...     config.use_cache
        True
        >>> config.use_cache
        False
    """
    both = (config, config.get_text_config())
    before = [one.use_cache for one in both]
    for one in both:
        one.use_cache = True
    try:
        yield
    finally:
        for one, value in zip(both, before, strict=True):
            one.use_cache = value


def declare_float32(directory: Path) -> None:
    """Let a saved ``config.json`` say float32 where trained weights are: a plain load then keeps them.

    ``save_pretrained`` of transformers 5.23 writes the type of the first parameter, which may be a
    frozen one in bfloat16, and ``from_pretrained`` would round the trained ones to it.
    """
    path = directory / "config.json"
    if not path.is_file():  # an adapter
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        if "dtype" in part:
            part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
