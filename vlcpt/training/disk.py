"""Room on the disk for checkpoints: asked for before a save, and made by deleting older ones after it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from vlcpt.training.manifests import CheckpointError, sync
from vlcpt.training.resuming import fault, list_checkpoints

_SMALL_FILES = 64 * 2**20  # processor, states, manifest
_ADAM = 8  # bytes of state for each trained weight
_MASTER = 4  # bytes of its float32 copy, which DeepSpeed keeps


def needed_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """About what a checkpoint takes: saved weights, and the states of those that train.

    Args:
        model: An adapter saves what trains, any other model all.
        optimizer: Its states are measured once they are there; before, they are taken for Adam's.

    Example:
        >>> needed_bytes(nn.Linear(1000, 1000), None) // 1_001_000
        79
    """
    sizes = [
        (getattr(one, "ds_numel", one.numel()), one.element_size(), one.requires_grad)
        for one in model.parameters()
    ]
    saved = sum(count * size for count, size, trains in sizes if trains or not isinstance(model, PeftModel))
    is_cut = optimizer is not None and not hasattr(optimizer, "state")
    states = 0 if optimizer is None or is_cut else _state_bytes(optimizer)
    if not states:
        states = sum(count for count, _, trains in sizes if trains) * (_ADAM + (_MASTER if is_cut else 0))
    return saved + states + _SMALL_FILES


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        if isinstance(state, dict)
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


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
        vlcpt.training.manifests.CheckpointError: checkpoint-2 takes about 1,000,000,000,000.0 MB, ...
    """
    place = folder.absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CheckpointError(
            f"{folder} takes about {needed / 1e6:,.1f} MB, but the disk has {free / 1e6:,.1f} MB free. "
            f"{f'{whole[-1].name} is whole' if whole else 'There is no whole checkpoint'}. Make room, or "
            "lower save_total_limit, and go on with --resume_from_checkpoint true."
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
