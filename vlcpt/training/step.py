"""The batches of a step over all ranks: what each must hold, and documents of it that fail."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainingArguments

from vlcpt.config.training import CPTConfig
from vlcpt.data.collator import Batch, CPTDataCollator
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.documents import DocumentError, Modality
from vlcpt.data.encode.encoder import IGNORE_INDEX
from vlcpt.data.encode.pixels import PixelScales, scaled_pixels
from vlcpt.data.families import SEEING
from vlcpt.data.plan.failures import FailedSample
from vlcpt.data.workers import LoadingError, WorkerBoard
from vlcpt.errors import ConfigError
from vlcpt.file_writes import append_lines, write_file
from vlcpt.interrupts import Interruption
from vlcpt.model.tuning import base_model, trained_towers
from vlcpt.model.weights import UNREADABLE
from vlcpt.training.checkpoints.files import CheckpointError
from vlcpt.training.guards import asked_stage
from vlcpt.training.loss import targets_of, total_weight
from vlcpt.training.progress import GO_ON
from vlcpt.training.ranks import HostSums

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

FAILED = "failed_documents.json"  # in a checkpoint


@dataclass(frozen=True)
class ReadBatch:
    """What reading a batch gave.

    Args:
        failed: Its samples that could not be read.
        any_read: Whether another one could.
    """

    failed: list[FailedSample]
    any_read: bool


def take_failed(batch: Batch) -> ReadBatch:
    """Take the samples that could not be read out of a batch.

    Example:
        >>> import torch
        >>> take_failed({"labels": torch.tensor([[-100, 7]]), "use_cache": False})
        ReadBatch(failed=[], any_read=True)
    """
    failed = batch.pop("failed", [])
    assert isinstance(failed, list)
    return ReadBatch([one for one in failed if isinstance(one, FailedSample)], total_weight(batch) > 0)


def unrepeat(batches: Sequence[Batch], dataset: object, args: TrainingArguments) -> None:
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


def read_step(
    trainer: Trainer, loader: Iterator[Batch], count: int, interruption: Interruption
) -> tuple[list[Batch], list[ReadBatch]]:
    """The next batches of a loader without what could not be read, and what reading each of them gave.

    None after a signal, which may also have ended the workers.

    Raises:
        LoadingError: If a worker died, or did not answer in time.
    """
    batches: list[Batch] = []
    try:
        if not interruption.is_requested:
            batches = list(islice(loader, count))
    except LoadingError:
        if not interruption.is_requested:
            raise
    if trainer.accelerator.gradient_state.end_of_dataloader or len(batches) < count:
        unrepeat(batches, trainer.train_dataset, trainer.args)
    read = [take_failed(batch) for batch in batches]
    fill_step(batches, count)
    return batches, read


class StepCounts(NamedTuple):
    """What all ranks have read for one step.

    Args:
        weight: Σ weight of its targets.
        read: What reading gave, of all ranks if a document failed, so that they stop or train on alike.
        any_batch: Whether a rank has a batch.
        interrupted: Σ :attr:`vlcpt.interrupts.Interruption.code`.
    """

    weight: float
    read: Sequence[ReadBatch]
    any_batch: bool
    interrupted: float


def count_step(
    sums: HostSums, batches: Sequence[Batch], read: Sequence[ReadBatch], interruption: float
) -> StepCounts:
    """Add up over all ranks what each has read, in one collective, which waits for no device.

    Args:
        sums: Those of the run.
        batches: The batches of this rank, on the CPU.
        read: What reading them gave.
        interruption: The signal that this rank got, see :class:`vlcpt.interrupts.Interruption`.

    Example:
        >>> batch = {"labels": torch.tensor([[-100, 7]]), "loss_weights": torch.full((1, 2), 0.5)}
        >>> sums = HostSums(TrainingArguments("out", use_cpu=True))
        >>> count_step(sums, [batch, batch], [], interruption=0)
        StepCounts(weight=1.0, read=[], any_batch=True, interrupted=0.0)
    """
    mine = sum(total_weight(batch) for batch in batches)
    any_failed = any(one.failed for one in read)
    weight, failed, count, interrupted = sums.add([mine, any_failed, len(batches), interruption])
    if failed:
        read = gather_object(list(read))
    return StepCounts(weight, read, bool(count), interrupted)


def require_failed(step: int, counts: StepCounts) -> None:
    """Raise for a step without targets, unless documents that failed are the reason.

    Raises:
        ValueError: With the number of the step.
    """
    if not any(one.failed for one in counts.read):
        raise ValueError(
            f"step {step} has no target in any batch, so it has no loss. "
            "CPTDataset leaves such documents out; let your own data set do the same."
        )


def take_documents(batch: Batch) -> list[str]:
    """Take the names of its documents out of a batch, for the model does not know them.

    Example:
        >>> take_documents({"use_cache": False})
        []
    """
    names = batch.pop("documents", [])
    assert isinstance(names, list)
    return [str(name) for name in names]


def sent(batch: Batch, device: torch.device, scales: PixelScales | None = None) -> dict[str, object]:
    """A batch on a device, its targets found before, where nothing has to wait for them.

    Args:
        batch: On the CPU, in pinned memory where a GPU is to copy it while it computes.
        scales: What makes bytes of pixels what the vision tower takes, once they are there.

    Example:
        >>> ids = torch.tensor([[5, 7]])
        >>> batch = {"input_ids": ids, "labels": torch.tensor([[-100, 7]]), "use_cache": False}
        >>> list(sent(batch, torch.device("cpu")))
        ['input_ids', 'use_cache', 'targets']
    """
    targets = targets_of(batch).to(device)
    known = ("labels", "loss_weights", "document_sources")  # and now in the targets
    rest = {name: value for name, value in batch.items() if name not in known}
    moved = {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in rest.items()
    }
    for name in ("pixel_values", "pixel_values_videos"):
        if scales is not None and isinstance(pixels := moved.get(name), torch.Tensor):
            moved[name] = scaled_pixels(pixels, scales)
    return {**moved, "targets": targets}


def note_failed(read: Sequence[ReadBatch], dataset: object, output_dir: Path | None) -> None:
    """Enter the documents that failed in a step in the ledger and ``dropped.jsonl``.

    Args:
        read: The batches of all ranks, so that each rank has the complete ledger, and all stop together.
        dataset: Their data set.
        output_dir: Where ``dropped.jsonl`` is; None on the ranks that do not write it.

    Raises:
        DocumentError: If one of them stops the run (``on_bad_data: error``).
        BadDataError: If with these too many have failed.
    """
    new = _entered(read, dataset)
    if not isinstance(dataset, CPTDataset):
        return
    if new and output_dir is not None:
        _warn_of(new)
        lines = "".join(one.dropped.as_line() for one in new)
        append_lines(output_dir / "dropped.jsonl", lines, "documents that failed in training", todo=GO_ON)
    dataset.failures.check()


def leave_out_failed(batch: Batch, dataset: object) -> None:
    """Take the samples that could not be read out of a batch that is not trained on, and name them once.

    They are counted; :func:`require_few_failed` looks whether they are too many.

    Raises:
        DocumentError: If one of them stops the run (``on_bad_data: error``).
    """
    _warn_of(_entered([take_failed(batch)], dataset))


def require_few_failed(dataset: object, ranks: int) -> None:
    """Enter, on each rank, what failed on any of them, and raise on all alike if that is too much.

    Args:
        dataset: That of which they have read.
        ranks: How many have; all call it.

    Raises:
        BadDataError: With the counts, the limit and what to do.
    """
    if not isinstance(dataset, CPTDataset):
        return
    for state in gather_object([dataset.failures.state()]) if ranks > 1 else ():
        dataset.failures.restore(state)
    dataset.failures.check()


def _entered(read: Sequence[ReadBatch], dataset: object) -> list[FailedSample]:
    """Enter what failed in some batches; those that had not failed before."""
    if stopping := [one for batch in read for one in batch.failed if one.stops]:
        raise DocumentError(stopping[0].message)
    if not isinstance(dataset, CPTDataset):
        return [one for batch in read for one in batch.failed]
    new: list[FailedSample] = []
    for batch in read:
        new += [one for one in batch.failed if dataset.failures.enter(one)]
        if batch.any_read:
            dataset.failures.enter_read()
    return new


def _warn_of(failed: Sequence[FailedSample]) -> None:
    for one in failed:
        logger.warning("left out of its pack: %s", one.message)


def save_failed(dataset: object, checkpoint: Path) -> None:
    """Put the documents that failed so far into a checkpoint; no file if there are none."""
    if isinstance(dataset, CPTDataset) and (state := dataset.failures.state())["failed"]:
        write_file(checkpoint / FAILED, json.dumps(state))


def restore_failed(dataset: object, checkpoint: Path, output_dir: Path | None) -> None:
    """Enter the documents that had failed when a checkpoint was saved, and write the ledger again.

    Args:
        dataset: Whose documents they are.
        checkpoint: It was saved of the same plan.
        output_dir: Where the ledger is; None on the ranks that do not write it.

    Raises:
        CheckpointError: If the checkpoint's list of them is damaged.
    """
    if not isinstance(dataset, CPTDataset):
        return
    if (path := checkpoint / FAILED).is_file():
        try:
            dataset.failures.restore(json.loads(path.read_text(encoding="utf-8")))
        except UNREADABLE as error:
            raise CheckpointError(
                f"{path}: it does not list documents of this data that failed. Use another checkpoint."
            ) from error
    if output_dir is not None:
        dataset.ledger.write(output_dir)


def watched(*datasets: object) -> list[WorkerBoard]:
    """The boards on which the workers of these data sets note what they read.

    Example:
        >>> watched([1, 2], None)
        []
    """
    return [*dict.fromkeys(one.board for one in datasets if isinstance(one, CPTDataset))]


def reading(dataset: object) -> str:
    """What a process and its workers read at the moment; empty if nothing.

    Example:
        >>> reading([1, 2])
        ''
    """
    return "; ".join(dataset.board.in_flight()) if isinstance(dataset, CPTDataset) else ""


def require_media(towers: Collection[str], dataset: object) -> None:
    """Refuse a run that would train a tower that sees on documents of which none has anything to see.

    Its gradient would be zero in every step, so it could only be moved by weight decay. ``CPTTrainer``
    itself accepts it: see :func:`share_towers`.

    Args:
        towers: Those that train.
        dataset: That of the training. Any but a ``CPTDataset`` does not say what it holds, and is passed.

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


def share_towers(
    model: nn.Module, args: CPTConfig, datasets: Sequence[object], *, is_partitioned: bool, fills: bool
) -> tuple[Modality, ...]:
    """What every batch must hold, because ranks share the tower that sees it.

    That is so where parameters are partitioned, and where the vision tower or the merger trains; there
    also on one process, so that its optimizer sees the same as that of many: Adam counts a step whose
    gradient is zero, but not one without a gradient. Of data sets that do not say what they hold,
    anything may come.

    DDP looks through the graph of each step for what got no gradient only where a batch may not call such a
    tower: one process does without its gradient, and without one a weight does not move, not even by weight
    decay. All else that trains is used by every batch.

    Args:
        fills: Whether batches will hold what is returned.
    """
    trains = bool(trained_towers(model) & set(SEEING))
    found: set[Modality] = set()
    if trains or is_partitioned:
        for dataset in datasets:
            found |= set(dataset.modalities if isinstance(dataset, CPTDataset) else ("image", "video"))
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = trains and not (found and fills)
    return tuple(sorted(found))


def require_fillers(dataset: object, collator: object, args: TrainingArguments) -> None:
    """Refuse to evaluate with partitioned parameters what batches have no fillers for: ranks would hang.

    They call a tower together, so it must be known from the start which kinds of media there are.

    Raises:
        ConfigError: With the kind, for a data set that was not given to the trainer.
    """
    if asked_stage(args) != 3 or not isinstance(dataset, CPTDataset) or dataset.reads_features:
        return
    filled = getattr(collator, "fill_modalities", dataset.modalities)
    if missing := [one for one in dataset.modalities if one not in filled]:
        raise ConfigError(
            f"deepspeed zero3: the data set to evaluate has {' and '.join(missing)}s, which the trainer's "
            "data did not say at the start, so ranks would wait for each other for ever. Give it as "
            "eval_dataset when you make the CPTTrainer; a mapping may hold several."
        )


def set_up_collator(
    collator: object, model: nn.Module, args: CPTConfig, datasets: Sequence[object], *, keeps_features: bool
) -> None:
    """Have a collator make batches for a model as a run needs them; one of the user's own stays as it is.

    It also gets pixels as the processor makes them: only ``CPTDataCollator`` knows bytes.

    Args:
        datasets: All of the run.
        keeps_features: Whether ranks call no tower together, see ``vision_cache``.
    """
    is_ours = isinstance(collator, CPTDataCollator)
    for dataset in datasets:
        if isinstance(dataset, CPTDataset):
            dataset.keeps_bytes = is_ours and args.pixel_bytes
    seen = [] if keeps_features else datasets
    filled = share_towers(model, args, seen, is_partitioned=asked_stage(args) == 3, fills=is_ours)
    if isinstance(collator, CPTDataCollator):
        collator.fill_modalities = filled
        collator.names_documents, collator.keeps_bytes = True, args.pixel_bytes
        collator.window_size = base_model(model).config.vision_config.window_size
