"""Documents and workers that fail while training runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vlcpt.data.collator import Batch
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.documents import DocumentError
from vlcpt.data.failed import FailedSample
from vlcpt.training.loss import total_weight

logger = logging.getLogger(__name__)

FAILED = "failed_documents.json"  # in a checkpoint


class LoadingError(ValueError):
    """A loader worker died or did not answer."""


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
        output_dir.mkdir(parents=True, exist_ok=True)
        with (output_dir / "dropped.jsonl").open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(lines)
    dataset.failures.check()


def save_failed(dataset: object, checkpoint: Path) -> None:
    """Put the documents that failed so far into a checkpoint; no file if there are none."""
    if isinstance(dataset, CPTDataset) and (state := dataset.failures.state())["failed"]:
        (checkpoint / FAILED).write_text(json.dumps(state), encoding="utf-8")


def restore_failed(dataset: object, checkpoint: Path, output_dir: Path | None) -> None:
    """Enter the documents that had failed when a checkpoint was saved, and write the ledger anew.

    Args:
        dataset: Whose documents they are.
        checkpoint: It was saved of the same plan.
        output_dir: Where the ledger is; None on the ranks that do not write it.
    """
    if not isinstance(dataset, CPTDataset):
        return
    if (path := checkpoint / FAILED).is_file():
        dataset.failures.restore(json.loads(path.read_text(encoding="utf-8")))
    if output_dir is not None:
        dataset.ledger.write(output_dir)


@contextmanager
def named_workers(dataset: object) -> Iterator[None]:
    """Give torch's message about a worker that died or hangs the documents that it was reading."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader") or not isinstance(dataset, CPTDataset):
            raise
        raise LoadingError(
            f"{error} {reading(dataset) or 'No worker was reading a document'}. Look at these documents' "
            "media, and at memory; --dataloader_num_workers 0 shows what happens, --dataloader_timeout "
            "allows more time."
        ) from error


def reading(dataset: object) -> str:
    """What a process and its workers read at the moment; empty if nothing.

    Example:
        >>> reading([1, 2])
        ''
    """
    if not isinstance(dataset, CPTDataset):
        return ""
    return "; ".join(
        f"worker {worker} was reading {', '.join(dataset.names(item))}"
        for worker, item in dataset.watch.busy().items()
    )
