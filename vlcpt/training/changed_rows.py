"""Which row of the data is the first that is another than when a checkpoint was saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from vlcpt.data.dataset import CPTDataset

ROWS = "data_rows.npy"  # in a checkpoint: a number for each row, or for each block of rows
# Of a source at most so many numbers are kept, 8 MB: beyond that, one stands for several rows.
MAX_NUMBERS = 2_000_000
_AGREEING = 16  # numbers that must agree again after a row that was put in or taken out


def source_blocks(dataset: object) -> list[list[object]] | None:
    """Name, rows and rows a number of each source, for the manifest; None of a data set that is not ours.

    Example:
        >>> source_blocks([1, 2]) is None
        True
    """
    if not isinstance(dataset, CPTDataset):
        return None
    rows = dataset.source_rows
    return [[name, count, max(1, -(-count // MAX_NUMBERS))] for name, count in rows.items()]


def save_rows(dataset: object, folder: Path) -> None:
    """Put a number for each row into a checkpoint: a checksum of its tokens, targets and grids."""
    if isinstance(dataset, CPTDataset):
        np.save(
            folder / ROWS, np.concatenate([np.zeros(0, np.int32), *_numbers(dataset)]), allow_pickle=False
        )


def changed_rows(dataset: object, folder: Path, saved: object) -> str | None:
    """Where the data differ first from those of a checkpoint, for a message; None where that is not known.

    Args:
        dataset: Of this run.
        folder: Of the checkpoint.
        saved: What :func:`source_blocks` gave for its manifest.

    Example:
        >>> changed_rows([1, 2], Path("checkpoint-2"), None) is None
        True
    """
    if not isinstance(dataset, CPTDataset) or not isinstance(saved, list):
        return None
    try:
        kept = np.load(folder / ROWS, mmap_mode="r", allow_pickle=False)
        before = [(str(name), int(rows), int(block)) for name, rows, block in saved]
    except (OSError, ValueError, TypeError):
        return None
    mine = list(dataset.source_rows)
    if (names := [name for name, *_ in before]) != mine:
        return f"its sources were {', '.join(names)}, and are {', '.join(mine)} now"
    start = 0
    for number, ((name, rows, block), now) in enumerate(zip(before, _numbers(dataset), strict=True)):
        count = -(-rows // block)
        then, start = np.asarray(kept[start : start + count]), start + count
        if block == max(1, -(-dataset.source_rows[name] // MAX_NUMBERS)):
            place = int(_first_difference(then, now))
            if place < max(len(then), len(now)):
                what = _what(then, now, place)
                return _told_row(dataset.row_name(number, place * block), block, what)
        elif rows != dataset.source_rows[name]:
            return f"{name} had {rows:,} rows and has {dataset.source_rows[name]:,} now"
    return (
        "all rows and their order are the same, so it is max_length, packing, data_seed, a share or "
        "replay_share that was changed"
    )


def _numbers(dataset: CPTDataset) -> list[np.ndarray]:
    """The checksums of each source's rows, int32; of a block of several rows, one over theirs."""
    found = []
    for checksums in dataset.row_checksums():
        block = max(1, -(-len(checksums) // MAX_NUMBERS))
        if block > 1:
            digests = [
                xxhash.xxh32_intdigest(checksums[first : first + block].tobytes())
                for first in range(0, len(checksums), block)
            ]
            checksums = np.array(digests, dtype=np.uint32).view(np.int32)
        found.append(checksums)
    return found


def _first_difference(then: np.ndarray, now: np.ndarray) -> int:
    shared = min(len(then), len(now))
    differs = np.flatnonzero(then[:shared] != now[:shared])
    return int(differs[0]) if len(differs) else shared


def _what(then: np.ndarray, now: np.ndarray, place: int) -> str:
    """What happened at the first difference, as far as the rows after it tell."""
    old, new = then[place:], now[place:]
    if not len(new):
        return f"{len(old):,} rows are missing from there on"
    if not len(old):
        return f"{len(new):,} rows were added from there on"
    if len(old) == len(new) and np.array_equal(np.sort(old), np.sort(new)):
        return "the same rows are in another order from there on"
    if _agree(old, new[1:]):
        return "a row was put in there"
    if _agree(old[1:], new):
        return "the row that was there is gone"
    return "its tokens, targets or the sizes of its media are others"


def _agree(first: Sequence[int] | np.ndarray, other: Sequence[int] | np.ndarray) -> bool:
    count = min(len(first), len(other), _AGREEING)
    return count > 0 and bool(np.array_equal(first[:count], other[:count]))


def _told_row(name: str, block: int, what: str) -> str:
    if block > 1:
        return f"the first difference is within {block:,} rows from {name} on: {what}"
    return f"the first difference is at {name}: {what}"
