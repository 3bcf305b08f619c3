"""How a run is spread over processes: what was asked for runs, and every rank does the same calls."""

from __future__ import annotations

import os
from collections.abc import Sequence, Sized
from typing import TYPE_CHECKING

import torch
from accelerate.utils import DistributedType
from rich.console import Console
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlcpt.config import ConfigError, CPTConfig
from vlcpt.data.collator import Batch
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.encoding import IGNORE_INDEX
from vlcpt.data.fillers import Modality
from vlcpt.model.families import tower_of

if TYPE_CHECKING:
    from transformers import Trainer


class CollectiveError(ValueError):
    """A rank waited for the others in vain."""


def check_launch(args: CPTConfig) -> None:
    """Refuse to start where the run would not be the one that was asked for.

    Several GPUs in one process would get ``nn.DataParallel``; processes that do not find each other would
    each train alone, into one folder; a DeepSpeed config that accelerate leaves unused would be missed by
    nobody.

    Raises:
        ConfigError: With how to start the run instead.

    Example:
        >>> check_launch(CPTConfig("out", use_cpu=True, deepspeed="zero2"))
        Traceback (most recent call last):
        vlcpt.config.ConfigError: deepspeed zero2 would not be used: use_cpu is set. Remove one of them.
    """
    if args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} GPUs in one process would use nn.DataParallel, which is not supported. Start the "
            f"run with torchrun --nproc_per_node {args.n_gpu} -m vlcpt train …, or set CUDA_VISIBLE_DEVICES."
        )
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if started > 1 and args.world_size == 1:
        raise ConfigError(
            f"a launcher started {started} processes, but there is no GPU here, so each would train alone "
            "and write over the others. Set use_cpu: true to train on CPUs together, or see vlcpt env."
        )
    if not args.deepspeed:
        return
    assert args.distributed_state is not None
    if args.distributed_state.distributed_type == DistributedType.DEEPSPEED:
        return
    name = args.deepspeed if isinstance(args.deepspeed, str) else "config"
    if args.use_cpu:
        raise ConfigError(f"deepspeed {name} would not be used: use_cpu is set. Remove one of them.")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"deepspeed {name} would not be used: there is no GPU here. Remove deepspeed, or see vlcpt env."
        )
    raise ConfigError(
        f"deepspeed {name} would not be used: no launcher started this process. "
        "Start it with torchrun --nproc_per_node NUMBER_OF_GPUS -m vlcpt train …; 1 is a number as well."
    )


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
    """Says which engine a run has, and stops where it is not the one asked for.

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
        asked = _asked_stage(args)
        if found != asked:
            wanted = "no DeepSpeed" if asked is None else f"DeepSpeed ZeRO-{asked}"
            raise ValueError(
                f"the run has {describe_engine(wrapped, args.world_size)}, but its configuration asks for "
                f"{wanted}. Start it with torchrun or deepspeed, and unset ACCELERATE_USE_DEEPSPEED."
            )
        if state.is_world_process_zero:
            self._console.print(describe_engine(wrapped, args.world_size), highlight=False)


def _asked_stage(args: TrainingArguments) -> int | None:
    """The stage of the DeepSpeed config, None without one."""
    config = getattr(args, "hf_deepspeed_config", None)
    if config is None:
        return None
    return int(config.get_value("zero_optimization.stage", 0))


def modalities_to_fill(model: nn.Module, args: CPTConfig, datasets: Sequence[object]) -> tuple[Modality, ...]:
    """What every batch must hold, because ranks share the tower that sees it.

    That is so where parameters are partitioned, and where the vision tower or the merger trains; there
    also on one process, so that its optimizer sees the same as that of many: Adam counts a step whose
    gradient is zero, but not one without a gradient. Of data sets that do not say what they hold,
    anything may come.
    """
    towers = {tower_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    if _asked_stage(args) != 3 and not towers & {"vision", "merger"}:
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
