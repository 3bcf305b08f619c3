"""How a run is spread over processes: what was asked for runs, and every rank does the same calls."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlcpt.config.precision import autocast_type, slow_products
from vlcpt.config.training import CPTConfig
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.encode.encoder import Modality
from vlcpt.data.families import Tower, tower_of
from vlcpt.errors import ConfigError
from vlcpt.model.attention import describe_kernels
from vlcpt.model.tuning import base_model, limit_checkpointing

if TYPE_CHECKING:
    from transformers import Trainer

SEEING: tuple[Tower, ...] = ("vision", "merger")  # towers that only media reach


def describe_engine(wrapped: nn.Module, processes: int) -> str:
    """What trains, in words.

    Example:
        >>> describe_engine(nn.Linear(1, 1), 1)
        '1 process'
    """
    count = f"{processes} process{'es' if processes > 1 else ''}"
    if (stage := engine_stage(wrapped)) is not None:
        return f"{count}, DeepSpeed ZeRO-{stage}"
    return f"{count}, DDP" if isinstance(wrapped, nn.parallel.DistributedDataParallel) else count


def engine_stage(wrapped: nn.Module) -> int | None:
    """The ZeRO stage of a DeepSpeed engine; None of any other model.

    Example:
        >>> engine_stage(nn.Linear(1, 1)) is None
        True
    """
    if type(wrapped).__name__ != "DeepSpeedEngine":  # by name: deepspeed takes seconds to import
        return None
    stage = wrapped.zero_optimization_stage()  # type: ignore[operator]
    return int(stage)


class EngineCheck(TrainerCallback):
    """Stops a run that has another engine than its configuration asks for; else names engine and kernels.

    Args:
        trainer: The trainer of the run.
        console: Where engine and kernels are named.
    """

    def __init__(self, trainer: Trainer, console: Console) -> None:
        self._trainer, self._console = trainer, console

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Compare engine and attention, on each rank's own GPU, with what they should be."""
        wrapped = self._trainer.model_wrapped
        asked = asked_stage(args)
        if engine_stage(wrapped) != asked:
            wanted = "no DeepSpeed" if asked is None else f"DeepSpeed ZeRO-{asked}"
            raise ValueError(
                f"the run has {describe_engine(wrapped, args.world_size)}, but its configuration asks for "
                f"{wanted}. Start it with torchrun or deepspeed, and unset ACCELERATE_USE_DEEPSPEED."
            )
        model = self._trainer.model
        assert isinstance(model, nn.Module)
        if getattr(args, "activation_checkpointing", False):
            limit_checkpointing(model)  # Trainer turns checkpoints on in ``train``
        base = base_model(model)
        kernels = describe_kernels(base, args.device, autocast_type(args) or base.lm_head.weight.dtype)
        if not state.is_world_process_zero:
            return
        for line in (describe_engine(wrapped, args.world_size), kernels):
            if line:
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        if (slow := slow_products(args)) is not None:
            self._console.print(slow, style="yellow", markup=False, highlight=False, soft_wrap=True)


def asked_stage(args: TrainingArguments) -> int | None:
    """The stage of the DeepSpeed config; None without one.

    Example:
        >>> asked_stage(TrainingArguments("out", use_cpu=True)) is None
        True
    """
    config = getattr(args, "hf_deepspeed_config", None)
    if config is None:
        return None
    return int(config.get_value("zero_optimization.stage", 0))


def converted_type(args: TrainingArguments) -> torch.dtype | None:
    """The 16-bit type to which DeepSpeed converts the weights of a model; None without one.

    Example:
        >>> converted_type(TrainingArguments("out", use_cpu=True)) is None
        True
    """
    config = getattr(args, "hf_deepspeed_config", None)
    dtype = None if config is None else config.dtype()
    return None if dtype == torch.float32 else dtype


def trained_towers(model: nn.Module) -> set[Tower]:
    """The towers of which a parameter trains, its own or an adapter's.

    Example:
        >>> from vlcpt import ModelConfig, load_model
        >>> from vlcpt.demo import base_path
        >>> sorted(trained_towers(load_model(ModelConfig(base_path(), lora_r=4, train_merger=True))))
        ['language', 'merger']
    """
    return {tower_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


def require_media(towers: Collection[str], dataset: object) -> None:
    """Refuse a run that would train a tower that sees on documents of which none has anything to see.

    Its gradient would be zero in every step, so it could only be moved by weight decay. ``CPTTrainer``
    itself passes it, for a model that was given whole: see :func:`allow_unused`.

    Args:
        towers: Those that train.
        dataset: Of the training. Any but a ``CPTDataset`` does not say what it holds, and is passed.

    Raises:
        ConfigError: With what to do instead.

    Example:
        >>> require_media(["vision"], [])
    """
    seeing = [tower for tower in SEEING if tower in towers]
    if not seeing or not isinstance(dataset, CPTDataset) or dataset.has_media:
        return
    keys, off = (", ".join(f"train_{tower}: {value}" for tower in seeing) for value in ("true", "false"))
    raise ConfigError(
        f"{keys}, but no document that would be trained has an image or a video, so nothing would teach "
        f"{'it' if len(seeing) == 1 else 'them'}. Set {off}, or add documents with media to train_data or "
        "replay_data."
    )


def allow_unused(model: nn.Module, args: CPTConfig, filled: Sequence[Modality]) -> None:
    """Let DDP go without the gradients of a tower that trains and that no batch calls, as one process does.

    With activation checkpoints Trainer has it wait for all, and it stops in step 2. Without a gradient a
    weight does not move, not even by weight decay.

    Args:
        filled: See :func:`modalities_to_fill`; with any, each batch calls the tower.
    """
    unseen = not filled and bool(trained_towers(model) & set(SEEING))
    if unseen and args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = True


def modalities_to_fill(model: nn.Module, args: CPTConfig, datasets: Sequence[object]) -> tuple[Modality, ...]:
    """What every batch must hold, because ranks share the tower that sees it.

    That is so where parameters are partitioned, and where the vision tower or the merger trains; there
    also on one process, so that its optimizer sees the same as that of many: Adam counts a step whose
    gradient is zero, but not one without a gradient. Of data sets that do not say what they hold,
    anything may come.
    """
    if asked_stage(args) != 3 and not trained_towers(model) & set(SEEING):
        return ()
    found: set[Modality] = set()
    for dataset in datasets:
        found |= set(dataset.modalities if isinstance(dataset, CPTDataset) else ("image", "video"))
    return tuple(sorted(found))
