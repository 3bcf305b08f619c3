"""Room on the disk for checkpoints: asked for before a save, and made by deleting older ones after it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerFast

from vlcpt.file_writes import Writing, free_bytes, human_size, refusal, remove, sync
from vlcpt.model.base_files import BaseFiles
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


def small_bytes(processor: object, ranks: int, logged: int) -> int:
    """What a checkpoint's other files take.

    Args:
        processor: The base's files that are saved with it, or the processor that is.
        ranks: Processes of the run.
        logged: Lines of its log so far.

    Example:
        >>> small_bytes(None, ranks=1, logged=10)
        29000
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    files = 0
    if isinstance(processor, BaseFiles):
        files = processor.size
    elif isinstance(tokenizer, PreTrainedTokenizerFast):
        files = len(tokenizer.backend_tokenizer.to_str(pretty=True).encode())
    return files + ranks * _RANDOM_STATES + logged * _LOGGED + _CONFIGS


def _count(parameter: nn.Parameter) -> int:
    """Numbers in a parameter, of which ZeRO-3 leaves no more than a part in its place."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _size(parameter: nn.Parameter) -> int:
    return _count(parameter) * parameter.element_size()


def require_space(folder: Path, needed: int, output_dir: Path) -> None:
    """Raise where a checkpoint would not fit.

    Args:
        folder: The checkpoint's.
        needed: Bytes.
        output_dir: The run's folder; the message names its newest checkpoint.

    Raises:
        CheckpointError: With path and sizes.

    Example:
        >>> require_space(Path("checkpoint-2"), 10**18, Path("nowhere"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.training.checkpoints.files.CheckpointError: checkpoint-2 takes about 1,000.0 PB, but ...
    """
    free = free_bytes(folder)
    if free < needed:
        raise CheckpointError(
            f"{folder} takes about {human_size(needed)}, but the disk has {human_size(free)} free. "
            f"{next_steps(output_dir)}"
        )


def next_steps(output_dir: Path) -> str:
    """Which checkpoint there is to resume from, and how.

    Example:
        >>> next_steps(Path("nowhere"))  # doctest: +ELLIPSIS
        'There is no whole checkpoint. Make room, or lower save_total_limit, and start again with --resum...'
    """
    sound = [one for one in list_checkpoints(output_dir) if not fault(one, hashes=False)]
    return (
        f"{f'{sound[-1].name} is whole' if sound else 'There is no whole checkpoint'}. Make room, or "
        "lower save_total_limit, and start again with --resume_from_checkpoint auto."
    )


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

    def take_back(kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and refusal(error, directory, reads=True):
            for path in {path for path, when in written_at().items() if before.get(path) != when}:
                remove(path)

    before, todo = written_at(), next_steps(output_dir)
    writing = Writing(directory, "the trained model", needed=saved_bytes(model), reads=True, todo=todo)
    with writing, ExitStack() as stack:
        writing.require_room()
        stack.push(take_back)
        yield


def flush_of_rank(folder: Path, rank: int) -> None:
    """Flush what a rank has written; rank 0 flushes all, but may be on another machine."""
    for pattern in (f"*rank_{rank}_*", f"rng_state_{rank}.pth") if rank else ():
        for path in folder.rglob(pattern):
            sync(path)


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
