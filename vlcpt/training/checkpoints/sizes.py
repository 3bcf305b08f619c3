"""What a checkpoint will take on the disk, about."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer

from vlcpt.model.base_files import BaseFiles
from vlcpt.training.guards import engine_stage

_MASTER = 4  # bytes of the float32 copy of a trained weight, which DeepSpeed keeps
# A resume needs the random states of each rank; torch writes some bytes about each tensor besides its own.
_RANDOM_STATES, _TENSOR = 15_000, 200
# DeepSpeed puts two scripts into each checkpoint, and names, shapes and headers of each tensor into its copy.
_SCRIPTS, _NAMED = 41_000, 1_000
_LOGGED = 400  # bytes of a line of trainer_state.json's log, about
_CONFIGS = 10_000  # adapter_config.json, scheduler.pt, the manifest and the like


def saved_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights that are saved of a model: those that train, of an adapter; all, of any other."""
    is_adapter = isinstance(model, PeftModel)
    return [one for one in model.parameters() if one.requires_grad or not is_adapter]


def size_of(weights: list[nn.Parameter], itemsize: int | None = None) -> int:
    """Bytes of weights; of a partitioned one ZeRO-3 leaves only a part in its place.

    Example:
        >>> size_of([*nn.Linear(1000, 1000).parameters()])
        4004000
    """
    return sum(getattr(one, "ds_numel", one.numel()) * (itemsize or one.element_size()) for one in weights)


def needed_bytes(trainer: Trainer, model: nn.Module, base: BaseFiles | None) -> int:
    """What a checkpoint takes now, about.

    Args:
        trainer: That of the run. The states of its optimizer are saved as well, unless ``save_only_model``.
        model: The model, not wrapped.
        base: The base's files that are saved with it.
    """
    args, ranks, stage = trainer.args, trainer.args.world_size, engine_stage(trainer.model_wrapped)
    weights = saved_weights(model)
    size = size_of(weights) + (base.size if base else 0)
    size += ranks * _RANDOM_STATES + len(trainer.state.log_history) * _LOGGED + _CONFIGS
    if args.save_only_model or trainer.optimizer is None:
        return size
    for state in trainer.optimizer.state.values():
        tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
        # Stages above 0 cut them between ranks.
        size += sum(one.nbytes + _TENSOR for one in tensors) * (ranks if stage else 1)
    if stage is None:
        return size
    # DeepSpeed saves its own copy of the weights, float32 masters, and each rank's states. Under stage 3 each
    # rank writes a copy, in which the trained ones are cut into masters.
    trained = [one for one in weights if one.requires_grad]
    size += size_of([one for one in weights if stage != 3 or not one.requires_grad])
    return size + size_of(trained, _MASTER) + _NAMED * len(weights) * (ranks if stage == 3 else 1) + _SCRIPTS
