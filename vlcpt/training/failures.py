"""Documents and workers that fail while training runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from vlcpt.data.collator import Batch
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.documents import DocumentError
from vlcpt.data.failed import FailedSample

logger = logging.getLogger(__name__)


class LoadingError(ValueError):
    """A loader worker died or did not answer."""


def take_failed(batch: Batch) -> list[FailedSample]:
    """The samples of a batch that could not be read, taken out of it.

    Raises:
        DocumentError: If one of them stops the run (``on_bad_data: error``).

    Example:
        >>> take_failed({"use_cache": False})
        []
    """
    failed = batch.pop("failed", [])
    assert isinstance(failed, list)
    for one in failed:
        if one.stops:
            raise DocumentError(one.message)
    return failed


def note_failed(batches: Sequence[Batch], dataset: object, output_dir: Path) -> None:
    """Take failed samples out of batches, and enter their documents in the ledger and ``dropped.jsonl``.

    Raises:
        DocumentError: If one of them stops the run.
    """
    for batch in batches:
        for one in take_failed(batch):
            if not isinstance(dataset, CPTDataset) or not dataset.note_failure(one):
                continue
            logger.warning("left out of its pack: %s", one.message)
            # One short line by one write: ranks and a reader may share the file.
            line = json.dumps(asdict(one.dropped), ensure_ascii=False) + "\n"
            output_dir.mkdir(parents=True, exist_ok=True)
            with (output_dir / "dropped.jsonl").open("a", encoding="utf-8") as file:
                file.write(line)


@contextmanager
def named_workers(dataset: object) -> Iterator[None]:
    """Give torch's message about a worker that died or hangs the documents that it was reading."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader") or not isinstance(dataset, CPTDataset):
            raise
        reading = "; ".join(
            f"worker {worker} was reading {', '.join(dataset.names(item))}"
            for worker, item in dataset.watch.busy().items()
        )
        raise LoadingError(
            f"{error} {reading or 'No worker was reading a document'}. Look at these documents' media, and "
            "at memory; --dataloader_num_workers 0 shows what happens, --dataloader_timeout allows more time."
        ) from error
