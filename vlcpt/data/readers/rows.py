"""How rows are stored, and reading any one of them: JSONL by byte offsets, text files, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import orjson

from vlcpt.data.documents import Document, DocumentError, Source
from vlcpt.data.readers.fields import Row

TEXT_SUFFIXES = (".txt", ".md")
_CHUNK = 1 << 24


class Rows(Protocol):
    """Rows by number: a file, a folder, or memory."""

    def __len__(self) -> int: ...

    def source(self, number: int) -> Source:
        """Where row ``number`` stands."""
        ...

    def row(self, number: int) -> Row | Document:
        """Row ``number``; a DocumentError if it cannot be read."""
        ...


class JsonlRows:
    """A JSONL file through an index of its lines: random access, memory for one line.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        starts = [np.zeros(1, dtype=np.int64)]
        with path.open("rb") as file:
            done = 0
            while chunk := file.read(_CHUNK):
                starts.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + done + 1)
                done += len(chunk)
        bounds = np.append(np.concatenate(starts), done)
        sizes = np.diff(bounds)
        blank = np.zeros(len(sizes), dtype=bool)
        with path.open("rb") as file:
            for line in np.flatnonzero(sizes <= 2):
                file.seek(int(bounds[line]))
                blank[line] = not file.read(int(sizes[line])).strip(b"\r\n")
        self._lines = np.flatnonzero(~blank)
        self._starts = bounds[self._lines]
        self._sizes = bounds[self._lines + 1] - self._starts

    def __len__(self) -> int:
        return len(self._lines)

    def source(self, number: int) -> Source:
        return Source(str(self._path), int(self._lines[number]) + 1)

    def row(self, number: int) -> Row:
        with self._path.open("rb") as file:
            file.seek(int(self._starts[number]))
            line = file.read(int(self._sizes[number]))
        return _json_object(line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line)


class TextRows:
    """Text files, each of them one row.

    Args:
        path: A file, or a folder that is searched for ``.txt`` and ``.md``.
    """

    def __init__(self, path: Path) -> None:
        self._files = [path]
        if path.is_dir():
            self._files = sorted(file for file in path.rglob("*") if file.suffix.lower() in TEXT_SUFFIXES)

    def __len__(self) -> int:
        return len(self._files)

    def source(self, number: int) -> Source:
        return Source(str(self._files[number]), 1)

    def row(self, number: int) -> Row:
        try:
            return {"text": self._files[number].read_text(encoding="utf-8-sig")}
        except UnicodeDecodeError as error:
            raise DocumentError(
                f"byte {error.start} is not UTF-8. Convert the file to UTF-8.", kind="encoding"
            ) from None


class MemoryRows:
    """Rows or Documents that are in memory already, a ``datasets.Dataset`` included.

    Args:
        rows: A sequence of them.
        name: What messages call it.
    """

    def __init__(self, rows: Sequence[object], name: str) -> None:
        self._rows = _undecoded(rows)
        self._name = name

    def __len__(self) -> int:
        return len(self._rows)

    def source(self, number: int) -> Source:
        return Source(self._name, number + 1)

    def row(self, number: int) -> Row | Document:
        row = self._rows[number]
        if isinstance(row, Mapping | Document):
            return row
        raise DocumentError(f"expected a dict or a Document, found {type(row).__name__}.", kind="row")


def _json_object(line: bytes) -> Row:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DocumentError(f"not JSON: {error}.", kind="json") from None
    if not isinstance(row, dict):
        raise DocumentError(f"expected an object in {{}}, found {type(row).__name__}.", kind="json")
    return row


def _undecoded(rows: Sequence[object]) -> Sequence[object]:
    """A ``datasets.Dataset`` that hands out media as paths and bytes, not as decoded pixels."""
    if type(rows).__module__.split(".")[0] != "datasets":
        return rows
    import datasets

    if isinstance(rows, datasets.DatasetDict | datasets.IterableDataset | datasets.IterableDatasetDict):
        raise DocumentError(
            f"expected a datasets.Dataset, found {type(rows).__name__}. Choose a split, without streaming.",
            kind="source",
        )

    def plain(feature: object) -> object:
        if isinstance(feature, datasets.Image | datasets.Video):
            return replace(feature, decode=False)
        if isinstance(feature, datasets.List | datasets.LargeList):
            return type(feature)(plain(feature.feature))
        if isinstance(feature, dict):
            return {key: plain(value) for key, value in feature.items()}
        return feature

    return rows.cast(datasets.Features(plain(dict(rows.features))))  # type: ignore[attr-defined, no-any-return]
