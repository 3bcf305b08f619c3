"""Room on the disk for checkpoints: asked for before a save, and made by deleting older ones after it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from vlcpt.file_writes import free_bytes, human_size, sync
from vlcpt.training.checkpoints.files import CheckpointError, fault, list_checkpoints

_MASTER = 4  # bytes of the float32 copy of a trained weight, which DeepSpeed keeps
# A resume wants the random states of each rank; torch writes some bytes about each tensor besides its own.
_RANDOM_STATES, _TENSOR = 15_000, 200
# DeepSpeed puts two scripts into each checkpoint, and names, shapes and headers of each tensor into its copy.
_SCRIPTS, _NAMED = 41_000, 1_000
_LOGGED = 400  # bytes of a line of trainer_state.json's log, about
_CONFIGS = 10_000  # adapter_config.json, scheduler.pt, the manifest and the like


def saved_bytes(model: nn.Module) -> int:
    """What the weights take that are saved of a model: those that train, of an adapter; all, of any other.

    Example:
        >>> saved_bytes(nn.Linear(1000, 1000))
        4004000
    """
    return sum(map(_size, _saved(model)))


def _saved(model: nn.Module) -> list[nn.Parameter]:
    is_adapter = isinstance(model, PeftModel)
    return [one for one in model.parameters() if one.requires_grad or not is_adapter]


def needed_bytes(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    *,
    stage: int | None = None,
    ranks: int = 1,
) -> int:
    """What a checkpoint takes, small files aside: the saved weights, and the states of those that train.

    Args:
        model: An adapter saves what trains, any other model all.
        optimizer: Its states, as they are after a step; None: none are saved.
        stage: DeepSpeed's. It saves its own copy of the weights, float32 masters, and each rank's states.
        ranks: Processes, between which stages cut what they cut.

    Example:
        >>> layer = nn.Linear(1000, 1000)
        >>> needed_bytes(layer, torch.optim.SGD(layer.parameters())) - saved_bytes(layer)
        0
    """
    if optimizer is None:
        return saved_bytes(model)
    tensors = [
        value
        for state in optimizer.state.values()
        if isinstance(state, dict)
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    states = sum(one.numel() * one.element_size() + _TENSOR for one in tensors)
    if stage is None:
        return saved_bytes(model) + states
    trained = [one for one in model.parameters() if one.requires_grad]
    again = saved_bytes(model)  # what each rank holds of trained weights under stage 3 is cut into masters
    if stage == 3:
        again -= sum(_size(one) for one in trained)
    masters = _MASTER * sum(_count(one) for one in trained)
    named = _NAMED * len(_saved(model)) * (ranks if stage == 3 else 1)  # then each rank writes a copy
    return (
        saved_bytes(model) + again + masters + named + _SCRIPTS + (states if stage == 0 else states * ranks)
    )


def small_bytes(processor: int, ranks: int, logged: int) -> int:
    """What a checkpoint's other files take.

    Args:
        processor: Bytes of processor, tokenizer and licences.
        ranks: Processes of the run.
        logged: Lines of its log so far.

    Example:
        >>> small_bytes(60_000, ranks=1, logged=10)
        89000
    """
    return processor + ranks * _RANDOM_STATES + logged * _LOGGED + _CONFIGS


def _count(parameter: nn.Parameter) -> int:
    """Numbers in a parameter, of which ZeRO-3 leaves no more than a part in its place."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _size(parameter: nn.Parameter) -> int:
    return _count(parameter) * parameter.element_size()


def require_space(folder: Path, needed: int, whole: Sequence[Path]) -> None:
    """Raise where a checkpoint would not fit.

    Args:
        folder: That it will be written to.
        needed: Bytes.
        whole: Checkpoints that are there, for the message.

    Raises:
        CheckpointError: With path and sizes.

    Example:
        >>> require_space(Path("checkpoint-2"), 10**18, [])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.training.checkpoints.files.CheckpointError: checkpoint-2 takes about 1,000.0 PB, but ...
    """
    free = free_bytes(folder)
    if free < needed:
        raise CheckpointError(
            f"{folder} takes about {human_size(needed)}, but the disk has {human_size(free)} free. "
            f"{next_steps(whole)}"
        )


def next_steps(whole: Sequence[Path]) -> str:
    """What is left to go on from, and how.

    Example:
        >>> next_steps([Path("out/checkpoint-2")])  # doctest: +ELLIPSIS
        'checkpoint-2 is whole. Make room, or lower save_total_limit, and start again with --resume_from_...'
    """
    return (
        f"{f'{whole[-1].name} is whole' if whole else 'There is no whole checkpoint'}. Make room, or "
        "lower save_total_limit, and start again with --resume_from_checkpoint auto."
    )


def rotate(output_dir: Path, limit: int | None, *, newest: Path, best: Path | None) -> None:
    """Delete the oldest checkpoints until ``limit`` are left; never the newest nor the best.

    What is not whole does not count, and goes. Checkpoints of later steps than the newest are of a run that
    was given up, so they are older.

    Args:
        output_dir: The run's folder.
        limit: As ``save_total_limit``; None or less than 1: nothing is deleted.
        newest: The one just written, whole.
        best: The one with the best metric so far.
    """
    if not limit or limit < 1:
        return
    found = list_checkpoints(output_dir)
    place = [one.name for one in found].index(newest.name)
    kept = {newest.name} | ({best.name} if best else set())
    others = [one for one in [*found[place + 1 :], *found[:place]] if one.name not in kept]
    broken = [one for one in others if fault(one, hashes=False)]
    whole = [one for one in others if one not in broken]
    excess = max(0, len(whole) + len(kept) - limit)
    for one in [*broken, *whole[:excess]]:
        delete_checkpoint(one)


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint so that it is none from the first moment on: one rename takes its name away."""
    if folder.is_symlink():  # what it leads to is somebody else's
        folder.unlink()
        return
    doomed = folder.with_name(f".{folder.name}.deleted")
    if doomed.exists():
        shutil.rmtree(doomed)
    folder.rename(doomed)
    sync(doomed.parent)
    shutil.rmtree(doomed)


def finish_deletions(output_dir: Path) -> None:
    """Delete what a run that was killed had begun to delete.

    Example:
        >>> finish_deletions(Path("nowhere"))
    """
    for folder in output_dir.glob(".checkpoint-*.deleted"):
        shutil.rmtree(folder)
