"""How a run is spread over processes: what was asked for runs, and every rank does the same calls."""

from __future__ import annotations

from collections.abc import Collection, Sequence, Sized
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlcpt.config.precision import autocast_type, slow_products, used_devices
from vlcpt.config.training import CPTConfig
from vlcpt.data.collator import Batch
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.encode.encoder import IGNORE_INDEX, Modality
from vlcpt.data.families import Tower, tower_of
from vlcpt.errors import ConfigError
from vlcpt.model.attention import describe_kernels
from vlcpt.model.tuning import base_model

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
    """Says which engine a run has and where its products are slow; stops where it is not the one asked for.

    Args:
        trainer: Its ``model_wrapped`` is looked at when training begins.
        console: Where the engine is named.
    """

    def __init__(self, trainer: Trainer, console: Console) -> None:
        self._trainer, self._console = trainer, console

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Compare the engine with the configuration."""
        wrapped = self._trainer.model_wrapped
        found = engine_stage(wrapped)
        asked = asked_stage(args)
        if found != asked:
            wanted = "no DeepSpeed" if asked is None else f"DeepSpeed ZeRO-{asked}"
            raise ValueError(
                f"the run has {describe_engine(wrapped, args.world_size)}, but its configuration asks for "
                f"{wanted}. Start it with torchrun or deepspeed, and unset ACCELERATE_USE_DEEPSPEED."
            )
        if state.is_world_process_zero:
            self._console.print(describe_engine(wrapped, args.world_size), highlight=False)
            if (slow := slow_products(args, used_devices(args))) is not None:
                self._console.print(slow, style="yellow", markup=False, highlight=False, soft_wrap=True)


class AttentionCheck(TrainerCallback):
    """Says which kernel attention by documents has; one that is wrong here is found before step 1.

    Args:
        trainer: Its model is looked at when training begins.
        console: Where the kernel is named.
    """

    def __init__(self, trainer: Trainer, console: Console) -> None:
        self._trainer, self._console = trainer, console

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Compare the kernel with PyTorch's own attention, on each rank's own GPU."""
        model = self._trainer.model
        assert isinstance(model, nn.Module)
        base = base_model(model)
        dtype = autocast_type(args) or base.lm_head.weight.dtype
        found = describe_kernels(base, args.device, dtype)
        if found and state.is_world_process_zero:
            self._console.print(found, markup=False, highlight=False, soft_wrap=True)


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


def unrepeat(batches: Sequence[Batch], dataset: object, args: CPTConfig) -> None:
    """Take the targets out of the rows that fill up the last global batch of an epoch.

    accelerate gives all ranks equally many rows by repeating the first of the epoch
    (``even_batches``; without it ranks would wait for each other). One process has no such rows.

    Args:
        batches: Those of this rank, of which the last one is its last of the epoch.
        dataset: Whose rows they are.
    """
    if not isinstance(dataset, Sized) or not batches:
        return
    size = args.train_batch_size
    real = len(dataset) % (size * args.world_size)
    labels = batches[-1]["labels"]
    assert isinstance(labels, torch.Tensor)
    first = args.process_index * size
    if real and first + len(labels) > real:
        labels[max(0, real - first) :] = IGNORE_INDEX


def fill_step(batches: list[Batch], count: int) -> None:
    """Fill a step's last batches up to ``count``, with copies without a target.

    After a step that was lost the last of an epoch comes before Trainer expects it, which would keep its
    gradient for the next epoch, because it counts batches to know when to step.

    Example:
        >>> batches = [{"labels": torch.tensor([[-100, 7]]), "loss_weights": torch.ones(1, 2)}]
        >>> fill_step(batches, 2)
        >>> [one["labels"].tolist() for one in batches]
        [[[-100, 7]], [[-100, -100]]]
    """
    while 0 < len(batches) < count:
        labels, weights = batches[-1]["labels"], batches[-1]["loss_weights"]
        assert isinstance(labels, torch.Tensor)
        assert isinstance(weights, torch.Tensor)
        empty = {"labels": torch.full_like(labels, IGNORE_INDEX), "loss_weights": torch.zeros_like(weights)}
        batches.append({**batches[-1], **empty})
