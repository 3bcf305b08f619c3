"""The scan of a prepared source: from the integers beside its shards, no document opened that need not be."""

from __future__ import annotations

import numpy as np

from vlcpt.data.readers.prepared import PreparedRows
from vlcpt.data.scanning import COLUMNS, PART_COLUMNS, Scan, SourceScanner

PREPARED_ROWS = 1 << 15  # arrays of so many numbers leave no holes behind when they are joined


class PreparedScanner(SourceScanner):
    """As :class:`SourceScanner`, with equal results: an item is the scan of some neighbouring shards.

    Only rows of which there is more to say are read: those that are no document, have no target, or are
    longer than ``max_length``.
    """

    def _rows_of_a_piece(self) -> int:
        return self._rows.shard_rows * self._shards_of_a_piece

    @property
    def _shards_of_a_piece(self) -> int:
        return max(1, PREPARED_ROWS // self._rows.shard_rows)

    @property
    def _rows(self) -> PreparedRows:
        assert isinstance(self._source.rows, PreparedRows)
        return self._source.rows

    def __getitem__(self, piece: int) -> Scan:
        shards = self._shards_of_a_piece
        index = self._rows.index(range(piece * shards, (piece + 1) * shards))
        first, length, targets = piece * self._piece_rows, index["length"], index["targets"]
        plain = (targets > 0) & (length <= self._max_length)
        scan = self._read((np.flatnonzero(~plain) + first).tolist(), len(length))
        if scan.error is not None:
            return scan
        for mark in ("untagged", "empty_spans", "cut_edges"):
            scan.marks[mark] += int(index[mark][plain].sum())
        row = np.flatnonzero(plain) + first
        index = {name: column[plain] for name, column in index.items()}
        length, nothing = index["length"], np.zeros_like(index["length"])
        counts = {
            "row": row,
            "parts": nothing + 1,
            "images": index["images"],
            "videos": index["videos"],
            "read": index["tokens"],
            "targets": index["targets"],
            "context": length - index["targets"] - index["pads"] - 2 * index["media"],
            "media": index["pads"],
            "special": 2 * index["media"],
            "trimmed": index["tokens"] - length,
            "targets_without_context": index["without_context"],
            "repeated": nothing,
        }
        parts = {
            "start": nothing,
            "stop": length,
            "repeated": nothing,
            "targets": index["targets"],
            "media": index["pads"],
            "checksum": index["checksum"],
        }
        read_row, read_parts = (scan.documents[:, COLUMNS.index(name)] for name in ("row", "parts"))
        of_part = np.concatenate([np.repeat(read_row, read_parts), row])
        scan.documents = _in_order(scan.documents, counts, COLUMNS, np.concatenate([read_row, row]))
        scan.parts = _in_order(scan.parts, parts, PART_COLUMNS, of_part)
        return scan


def _in_order(
    read: np.ndarray, columns: dict[str, np.ndarray], names: tuple[str, ...], rows: np.ndarray
) -> np.ndarray:
    """Lines that were read one by one, and those of the columns, in the order of their rows."""
    together = np.concatenate([read, np.stack([columns[name] for name in names], axis=1)])
    return together[np.argsort(rows, kind="stable")].astype(np.int32)
