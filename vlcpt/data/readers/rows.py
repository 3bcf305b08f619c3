"""How rows are stored, and reading any one of them: JSON by byte offsets, text files, memory."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import orjson

from vlcpt.data.documents import Document, DocumentError, Source
from vlcpt.data.file_states import FileState, file_state
from vlcpt.data.readers.fields import Row
from vlcpt.data.readers.json_keys import check_keys, repeated, rows_with_repeats
from vlcpt.data.references import without_pictures

if TYPE_CHECKING:
    import datasets

TEXT_SUFFIXES = (".txt", ".md")
_CHUNK = 1 << 20
_BOM = b"\xef\xbb\xbf"


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
        path: The file, without compression.
        name: What messages call it.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self._path = path
        self._name = name or str(path)
        self._bounds = _line_bounds(path)
        sizes = np.diff(self._bounds)
        short = np.flatnonzero(sizes <= len(_BOM) + 2)
        blank = []
        with path.open("rb") as file:
            for line in short.tolist():
                file.seek(int(self._bounds[line]))
                if not file.read(int(sizes[line])).removeprefix(_BOM).strip():
                    blank.append(line)
        self._lines: Sequence[int] | np.ndarray = range(len(sizes))
        if blank:
            self._lines = np.delete(np.arange(len(sizes)), blank)

    def __len__(self) -> int:
        return len(self._lines)

    def source(self, number: int) -> Source:
        return Source(self._name, int(self._lines[number]) + 1)

    def state(self) -> FileState:
        """What tells whether they changed."""
        return file_state(self._name)

    def row(self, number: int) -> Row:
        place = int(self._lines[number])
        start, stop = self._bounds[place : place + 2].tolist()
        # By number, not as a file object: that takes three times as long, for each row.
        file = os.open(self._path, os.O_RDONLY)
        try:
            line = os.pread(file, stop - start, start)
        finally:
            os.close(file)
        return json_object(line.removeprefix(_BOM) if number == 0 else line)


class JsonRows:
    """The rows of a JSON file that holds a list, as compact bytes: read whole once, then by number.

    Args:
        path: The file, without compression.
        name: What messages call it.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self._name = name or str(path)
        try:
            data = path.read_bytes().removeprefix(_BOM)
            rows = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise DocumentError(f"not JSON: {error}.", kind="json", field=self._name) from None
        if not isinstance(rows, list):
            raise DocumentError(
                f"expected a list of rows, found {type(rows).__name__}.", kind="source", field=self._name
            )
        self._repeats = rows_with_repeats(data, rows)
        # Bytes, not objects: a fraction of the memory, and workers share it with the parent.
        lines = [orjson.dumps(row) for row in rows]
        self._ends = np.cumsum([len(line) for line in lines], dtype=np.int64)
        self._lines = b"".join(lines)

    def __len__(self) -> int:
        return len(self._ends)

    def source(self, number: int) -> Source:
        return Source(self._name, number + 1)

    def state(self) -> FileState:
        """What tells whether they changed."""
        return file_state(self._name)

    def row(self, number: int) -> Row:
        if number in self._repeats:
            raise repeated(self._repeats[number])
        start = int(self._ends[number - 1]) if number else 0
        return json_object(self._lines[start : int(self._ends[number])])


class TextRows:
    """Text files, each of them one row.

    Args:
        path: A file, or a folder that is searched for ``.txt`` and ``.md``.
    """

    def __init__(self, path: Path) -> None:
        self._files = [path]
        if path.is_dir():
            self._files = [file for file in files_inside(path) if file.suffix.lower() in TEXT_SUFFIXES]
            for file in self._files:
                require_regular(file)

    def __len__(self) -> int:
        return len(self._files)

    def source(self, number: int) -> Source:
        return Source(str(self._files[number]), 1)

    def state(self) -> list[FileState]:
        """What tells whether they changed."""
        return [file_state(file) for file in self._files]

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
        self._rows = _stored(rows)
        self._name = name

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict[str, object]:  # for spawned workers
        rows = self._rows
        return {**self.__dict__, "_rows": without_pictures(rows) if isinstance(rows, list) else rows}

    def source(self, number: int) -> Source:
        return Source(self._name, number + 1)

    def state(self) -> list[object] | None:
        """What tells whether they changed; None for rows that are no ``datasets.Dataset``."""
        return [self._name, *self._rows.state()] if isinstance(self._rows, _ArrowRows) else None

    def only(self, columns: Iterable[str]) -> MemoryRows:
        """The same rows; of a ``datasets.Dataset``, these columns alone."""
        if isinstance(self._rows, _ArrowRows):
            self._rows = self._rows.only(columns)
        return self

    def row(self, number: int) -> Row | Document:
        row = self._rows[number]
        if isinstance(row, Mapping | Document):
            return row
        raise DocumentError(f"expected a dict or a Document, found {type(row).__name__}.", kind="row")


def files_inside(folder: Path) -> list[Path]:
    """All that is no folder below a folder, in order, without what is hidden."""
    return [
        file
        for file in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in file.relative_to(folder).parts) and not file.is_dir()
    ]


def require_regular(file: Path) -> None:
    """Raise if a path is no regular file: a pipe would wait, and a broken link be a missing shard."""
    if not file.is_file():
        kind = "a pipe, socket or device" if file.exists() else "a link to a file that is not there"
        raise DocumentError(f"it is {kind}. Put the data there as a file.", kind="source", field=str(file))


def _line_bounds(path: Path) -> np.ndarray:
    """Where each line begins, and the last one ends: int64 (lines + 1,)."""
    # Whole, not in pieces that are put together at last: that would hold them twice.
    bounds = array("q", [0])
    with path.open("rb") as file:
        done = 0
        while chunk := file.read(_CHUNK):
            ends = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + (done + 1)
            bounds.frombytes(ends.astype(np.int64).tobytes())
            done += len(chunk)
    if bounds[-1] != done:  # the last line may end without a newline
        bounds.append(done)
    return np.frombuffer(bounds, dtype=np.int64)


def json_object(line: bytes) -> dict[str, object]:
    """A row from its JSON.

    Example:
        >>> json_object(b'{"text": "a"}')
        {'text': 'a'}
    """
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DocumentError(f"not JSON: {error}.", kind="json") from None
    if not isinstance(row, dict):
        raise DocumentError(f"expected an object in {{}}, found {type(row).__name__}.", kind="json")
    check_keys(line, row)
    return row


def _stored(rows: Sequence[object]) -> Sequence[object]:
    """Rows as they are stored: a ``datasets.Dataset`` would decode media past their limits."""
    if type(rows).__module__.split(".")[0] != "datasets":
        return rows
    import datasets

    if not isinstance(rows, datasets.Dataset):
        raise DocumentError(
            f"expected a datasets.Dataset, found {type(rows).__name__}. Choose a split, without streaming.",
            kind="source",
        )
    return _ArrowRows(rows.with_format("arrow"))


class _ArrowRows(Sequence[object]):
    """Rows of a ``datasets.Dataset`` in Arrow format: paths and bytes, nothing cast or copied."""

    def __init__(self, tables: datasets.Dataset) -> None:
        self._tables = tables

    def __len__(self) -> int:
        return len(self._tables)

    def state(self) -> list[object]:
        """The fingerprint that it carries, and its files."""
        files = [file_state(one["filename"]) for one in self._tables.cache_files]
        return [self._tables._fingerprint, files]

    def only(self, columns: Iterable[str]) -> _ArrowRows:
        names = set(columns)
        return _ArrowRows(self._tables.select_columns([n for n in self._tables.column_names if n in names]))

    def __getitem__(self, number: int) -> object:  # type: ignore[override]
        return self._tables[number].to_pylist()[0]
