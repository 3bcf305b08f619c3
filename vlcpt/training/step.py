"""What a step was read from: documents and workers that fail, and a run that has no step left."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlcpt.data.collator import Batch
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.documents import DocumentError
from vlcpt.data.failed import FailedSample
from vlcpt.data.workers import WorkerBoard
from vlcpt.file_writes import append_lines, write_file
from vlcpt.training.checkpoints.files import CheckpointError
from vlcpt.training.loss import total_weight
from vlcpt.training.progress import GO_ON

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
    return ReadBatch([one for one in failed if isinstance(one, FailedSample)], bool(total_weight(batch) > 0))


def take_documents(batch: Batch) -> list[str]:
    """Take the names of its documents out of a batch, for the model does not know them.

    Example:
        >>> take_documents({"use_cache": False})
        []
    """
    names = batch.pop("documents", [])
    assert isinstance(names, list)
    return [str(name) for name in names]


def leave_out_failed(batch: Batch) -> None:
    """Take the samples that could not be read out of a batch of an evaluation, and name them.

    Raises:
        DocumentError: If one of them stops the run (``on_bad_data: error``).
    """
    for one in take_failed(batch).failed:
        if one.stops:
            raise DocumentError(one.message)
        logger.warning("not measured: %s", one.message)


def note_failed(read: Sequence[ReadBatch], dataset: object, output_dir: Path | None) -> None:
    """Enter the documents that failed in a step in the ledger and ``dropped.jsonl``.

    Args:
        read: The batches of all ranks, so that each rank has the whole ledger, and all stop together.
        dataset: Whose documents they are.
        output_dir: Where ``dropped.jsonl`` is; None on the ranks that do not write it.

    Raises:
        DocumentError: If one of them stops the run (``on_bad_data: error``).
        BadDataError: If with these too many have failed.
    """
    for batch in read:
        for one in batch.failed:
            if one.stops:
                raise DocumentError(one.message)
    if not isinstance(dataset, CPTDataset):
        return
    lines = ""
    for batch in read:
        for one in batch.failed:
            if dataset.failures.enter(one) and output_dir is not None:
                logger.warning("left out of its pack: %s", one.message)
                lines += one.dropped.as_line()
        if batch.any_read:
            dataset.failures.enter_read()
    if lines and output_dir is not None:
        append_lines(output_dir / "dropped.jsonl", lines, "documents that failed in training", todo=GO_ON)
    dataset.failures.check()


def save_failed(dataset: object, checkpoint: Path) -> None:
    """Put the documents that failed so far into a checkpoint; no file if there are none."""
    if isinstance(dataset, CPTDataset) and (state := dataset.failures.state())["failed"]:
        write_file(checkpoint / FAILED, json.dumps(state))


def restore_failed(dataset: object, checkpoint: Path, output_dir: Path | None) -> None:
    """Enter the documents that had failed when a checkpoint was saved, and write the ledger anew.

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
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            IndexError,
            RecursionError,
            AttributeError,
        ) as error:
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


class NoStepLeft(TrainerCallback):
    """Ends a resumed run that has all its steps before it trains one.

    Trainer of transformers 5.24 looks at ``max_steps`` only after a step, so that each resume in the middle
    of an epoch would train another one.

    Args:
        console: Where it is said.

    Example:
        >>> args, state = TrainingArguments(output_dir="out", use_cpu=True), TrainerState()
        >>> state.global_step = state.max_steps = 3
        >>> NoStepLeft(Console(width=200)).on_train_begin(args, state, TrainerControl()).should_training_stop
        step 3 of 3 is done: no step is left to train, and the weights stay as they were saved. To train ...
        True
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._is_finished = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        """Look whether a step is left; before the first one ``CPTTrainer`` asks ``control``."""
        self._is_finished = 0 < state.max_steps <= state.global_step
        if self._is_finished:
            control.should_training_stop = True
            if state.is_world_process_zero:
                self._console.print(
                    f"step {state.global_step} of {state.max_steps} is done: no step is left to train, and "
                    "the weights stay as they were saved. To train on, raise max_steps or num_train_epochs.",
                    highlight=False,
                    soft_wrap=True,
                )
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Let the epoch that has not taken place save and measure nothing."""
        if self._is_finished:
            control.should_save = control.should_evaluate = False
