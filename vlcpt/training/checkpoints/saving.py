"""How a model is saved: only where there is room, completely or not at all, as others expect to find it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import Trainer
from transformers.modeling_utils import str_to_torch_dtype

from vlcpt.file_writes import Writing, remove
from vlcpt.model.base_files import BaseFiles, set_type
from vlcpt.model.weights import weight_files
from vlcpt.training.checkpoints.files import next_steps
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
        trainer: Of the run. The states of its optimizer are saved as well, unless ``save_only_model``.
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


@contextmanager
def result_or_nothing(directory: Path, model: nn.Module, output_dir: Path) -> Iterator[None]:
    """Around the saving of a model that is no checkpoint: what fails leaves no part of it behind.

    Args:
        directory: The folder that the model is saved in.
        model: The model.
        output_dir: The run's folder; the message names its newest checkpoint.

    Raises:
        WriteError: If the disk is full, or the folder cannot be written.
    """

    def written_at() -> dict[Path, int]:
        files = directory.iterdir() if directory.is_dir() else ()
        return {path: path.stat().st_mtime_ns for path in files if path.is_file()}

    before, needed = written_at(), size_of(saved_weights(model))
    with Writing(
        directory, "the trained model", needed=needed, reads=True, todo=next_steps(output_dir)
    ) as writing:
        writing.require_room()
        try:
            yield
        except BaseException as error:
            if writing.refused(error):
                for path, when in written_at().items():
                    if before.get(path) != when:
                        remove(path)
            raise


def declare_dtype(directory: Path) -> None:
    """Let a saved ``config.json`` say a type that holds every saved weight: a plain load then rounds none.

    ``save_pretrained`` of transformers 5.24 writes the type of the first parameter in memory. That may be a
    frozen one in bfloat16 beside trained ones in float32, to which ``from_pretrained`` would round them; or
    float32 where DeepSpeed has saved its own weights of 16 bits.

    Args:
        directory: Of a model. One of an adapter has no ``config.json``, and stays as it is.
    """
    path = directory / "config.json"
    found: set[torch.dtype] = set()
    for one in weight_files(str(directory)):
        with safe_open(one, framework="pt") as file:
            found |= {str_to_torch_dtype[file.get_slice(key).get_dtype()] for key in file.keys()}  # noqa: SIM118
    types = [dtype for dtype in found if dtype.is_floating_point]
    if types and path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        # The smallest type that holds all of them.
        set_type(config, str(reduce(torch.promote_types, types)).removeprefix("torch."))
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
