"""Rows of Parquet, Arrow, CSV and TSV files, of saved ``datasets`` and of data sets on the Hub."""

from __future__ import annotations

import csv
import os
import re
import sys
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from vlcpt.data.documents import DocumentError, Source
from vlcpt.data.rows.decoding import check_wide, looks_like, not_utf8
from vlcpt.data.rows.fields import Row
from vlcpt.data.rows.jsonl import MAX_ROW_BYTES, MemoryRows, Rows
from vlcpt.file_writes import WriteError, Writing

# Bytes of row groups, and of the footers of open files, that all Parquet files together keep. In memory, a
# footer takes 15 times its bytes. Each counts for _FOOTER at least: so 256 files are open at most.
_GROUPS, _FOOTERS, _FOOTER = 128 << 20, 4 << 20, 16 << 10

T = TypeVar("T")
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class _Kept(Generic[T]):
    """The values used last, up to a number of bytes but at least one: memory stays flat, reading is fast."""

    def __init__(self, most: int) -> None:
        self._most, self._size = most, 0
        self._kept: OrderedDict[object, tuple[T, int]] = OrderedDict()

    def get(self, key: object) -> T | None:
        """What is kept under a key."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: object, value: T, size: int) -> T:
        """Keep a value of so many bytes."""
        self._kept[key], self._size = (value, size), self._size + size
        while self._size > self._most and len(self._kept) > 1:
            self._size -= self._kept.popitem(last=False)[1][1]
        return value


_groups = _Kept[pa.Table](_GROUPS)
_files = _Kept[pq.ParquetFile](_FOOTERS)


class ParquetRows(Rows):
    """A Parquet file by row groups: a row costs reading its group, the last ones are kept.

    Checksums of pages are compared where the file has them.

    Args:
        path: The file, or its address.
        columns: The columns to read; None: all.
    """

    has_columns = True

    def __init__(self, path: Path | str, columns: Iterable[str] | None = None) -> None:
        super().__init__(str(path))
        self.path = str(path)
        try:
            file = self._opened()
            groups = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
            self.schema = file.schema_arrow
        except (pa.ArrowException, OSError, ValueError) as error:  # the last: names that are not UTF-8
            raise _damaged(path, "Parquet", error) from None
        _check_names(path, self.schema.names)
        wanted = None if columns is None else set(columns)
        self._columns = [name for name in self.schema.names if wanted is None or name in wanted]
        self._ends = np.cumsum(groups, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, number: int) -> Row:
        group = int(np.searchsorted(self._ends, number, side="right"))
        start = int(self._ends[group - 1]) if group else 0
        with _unreadable(f"row group {group}"):
            return _row(self._group(group), number - start)

    def table(self, columns: Sequence[str]) -> pa.Table:
        """All rows, of these columns."""
        with _unreadable("the table"):
            return self._opened().read(columns=list(columns), use_threads=False)

    def only(self, columns: Iterable[str]) -> ParquetRows:
        """The same rows with these columns alone, so that nothing else is read."""
        return ParquetRows(self.path, columns)

    def _group(self, group: int) -> pa.Table:
        if (kept := _groups.get((self, group))) is not None:
            return kept
        table = self._opened().read_row_group(group, columns=self._columns, use_threads=False)
        return _groups.put((self, group), table, table.get_total_buffer_size())

    def _opened(self) -> pq.ParquetFile:
        # A forked worker opens the file itself: the parent's place in it is shared.
        if (kept := _files.get((self, os.getpid()))) is not None:
            return kept
        files, path = file_system(self.path) if is_address(self.path) else (None, self.path)
        file = pq.ParquetFile(path, filesystem=files, page_checksum_verification=True)
        return _files.put((self, os.getpid()), file, max(file.metadata.serialized_size, _FOOTER))


class ArrowRows(Rows):
    """An Arrow file, or a stream as ``datasets`` caches it, mapped into memory.

    Args:
        path: The file.
        columns: The columns to read; None: all.
    """

    has_columns = True

    def __init__(self, path: Path, columns: Iterable[str] | None = None) -> None:
        super().__init__(str(path))
        self._path = path
        self._wanted = None if columns is None else tuple(columns)
        try:
            mapped = pa.memory_map(str(path))
            try:
                reader = pa.ipc.open_file(mapped)
                batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            except pa.ArrowInvalid:
                mapped.seek(0)
                batches = list(pa.ipc.open_stream(mapped))
                _check_end(path)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, "Arrow", error) from None
        if batches:
            _check_names(path, batches[0].schema.names)
        if columns is not None and batches:
            names = [name for name in batches[0].schema.names if name in set(columns)]
            batches = [batch.select(names) for batch in batches]
        self._batches = batches
        self._ends = np.cumsum([len(batch) for batch in batches], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __reduce__(self) -> tuple[object, ...]:  # a worker maps the file itself instead of copying it
        return (ArrowRows, (self._path, self._wanted))

    def row(self, number: int) -> Row:
        batch = int(np.searchsorted(self._ends, number, side="right"))
        return _row(self._batches[batch], number - (int(self._ends[batch - 1]) if batch else 0))

    def only(self, columns: Iterable[str]) -> ArrowRows:
        """The same rows with these columns alone."""
        return ArrowRows(self._path, columns)


def is_address(path: str) -> bool:
    """Whether a path is one for ``fsspec``.

    Example:
        >>> is_address("s3://bucket/set"), is_address("data/set")
        (True, False)
    """
    return "://" in path


def file_system(path: str) -> tuple[AbstractFileSystem, str]:
    """Where a path or an address is, and what it is called there.

    fsspec keeps what it opens, for each process anew: a connection does not survive a fork.

    Example:
        >>> file_system("memory://bucket/set")[1]
        '/bucket/set'
    """
    return url_to_fs(path) if is_address(path) else (LocalFileSystem(), path.rstrip("/"))


def is_hub_id(path: str) -> bool:
    """Whether a path may be a data set's name on the Hub.

    Example:
        >>> is_hub_id("org/name"), is_hub_id("data/train.jsonl/x"), is_hub_id("train")
        (True, False, False)
    """
    return _HUB_ID.fullmatch(path) is not None


def is_saved(path: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``.

    Example:
        >>> is_saved(Path("."))
        False
    """
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def saved_rows(path: Path, split: str | None) -> MemoryRows:
    """The rows of a folder that ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote.

    Raises:
        DocumentError: If it cannot be read, or ``split`` is none of its splits, or it has none.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from datasets import Dataset
        >>> with TemporaryDirectory() as folder:
        ...     Dataset.from_list([{"text": "a"}]).save_to_disk(folder)
        ...     saved_rows(Path(folder), split=None).row(0)
        {'text': 'a'}
    """
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, "a saved data set", error) from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            given = f"it has no split {split!r}" if split else "it has splits"
            raise DocumentError(
                f"{given}; set split to one of {', '.join(found)}.", kind="source", field=str(path)
            )
        found = found[split]
    elif split:
        raise DocumentError(
            f"it is one data set without splits; remove split: {split}.", kind="source", field=str(path)
        )
    for one in found.cache_files:
        file = Path(one["filename"])
        try:
            _check_end(file)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, "a saved data set", ValueError(f"{file.name}: {error}")) from None
    return MemoryRows(found, str(path))


def loaded_rows(path: str, split: str) -> MemoryRows:
    """The rows of a split as ``datasets.load_dataset`` finds it: by a name on the Hub, or in a folder.

    Raises:
        DocumentError: If it cannot be loaded; one message, also where the Hub cannot be reached.
        WriteError: If there is no room for it in the cache of Hugging Face, or that cannot be written.

    Example:
        >>> len(loaded_rows("org/name", "train"))  # doctest: +SKIP
        23
    """
    import datasets

    cache = Path(datasets.config.HF_DATASETS_CACHE)
    todo = "HF_DATASETS_CACHE, or HF_HOME, names another one."
    try:
        with Writing(cache, f"the cache of {path}", todo=todo, reads=True):
            found = datasets.load_dataset(path, split=split)
    except WriteError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise DocumentError(
            f"split {split!r} cannot be loaded ({type(error).__name__}: {reason}). Check name and split, and "
            "that the Hub can be reached or the data set is in the cache of Hugging Face.",
            kind="source",
            field=path,
        ) from None
    return MemoryRows(found, path)


def _row(table: pa.Table | pa.RecordBatch, number: int) -> Row:
    return {name: table.column(name)[number].as_py() for name in table.schema.names}


@contextmanager
def _unreadable(what: str) -> Iterator[None]:
    """What Arrow, or the disk, says of a part of a file."""
    try:
        yield
    except (pa.ArrowException, OSError, IndexError) as error:  # the last: fewer rows than it had
        raise DocumentError(f"{what} cannot be read: {error}. Write the file again.", kind="row") from None


def _check_names(path: Path | str, names: list[str]) -> None:
    """Raise if two columns have one name: only one of them would be read."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DocumentError(
            f"two columns are named {twice[0][:100]!r}. Rename or remove one.", kind="source", field=str(path)
        )


def _check_end(path: Path) -> None:
    """Raise if a stream lacks its end mark: cut between two batches, it reads like a whole one."""
    with path.open("rb") as file:
        file.seek(-min(len(_STREAM_END), path.stat().st_size), os.SEEK_END)
        if file.read() != _STREAM_END:
            raise pa.ArrowInvalid("the stream has no end mark: it is cut short. Write it again.")


def _damaged(path: Path | str, kind: str, error: Exception) -> DocumentError:
    reason = " ".join(str(error).split())[:300]
    return DocumentError(f"cannot be read as {kind}: {reason}", kind="source", field=str(path))


_HEAD = 1 << 14  # bytes that tell an encoding
# Cells of these fields may hold JSON; that of a path may also begin with a bracket and be none.
_LISTS = frozenset(
    [
        *("images", "videos", "conversations", "messages", "segments", "texts", "text_list", "image_info"),
        *("image_files", "history", "similarity_matrix"),
        *("file_names", "image_file_names", "video_file_names"),
    ]
)
_ALONE = frozenset(("image", "video"))
_SWITCHES = frozenset(("label", "kto_tag"))


class DelimitedRows(Rows):
    """A CSV or TSV file through an index of its rows: random access, memory for one row.

    An empty cell is an absent field, and a row of empty cells is none. Cells of fields that are lists hold
    JSON.

    Args:
        path: The file, without compression.
        name: What messages call it.
        max_row_bytes: A row of more ends the reading: a quote that is not closed makes one row of all lines.
    """

    def __init__(self, path: Path, name: str | None = None, max_row_bytes: int = MAX_ROW_BYTES) -> None:
        super().__init__(name or str(path))
        self._path = path
        self._most = max_row_bytes
        self._delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        self._columns: list[str] = []
        starts, stops, lines = array("q"), array("q"), array("q")
        with path.open("rb") as file, _long_cells():
            self._check_wide(file)
            for start, stop, line, cells in self._records(file):
                if not any(cells):
                    continue
                if not self._columns:
                    self._columns = self._header(cells)
                    continue
                starts.append(start)
                stops.append(stop)
                lines.append(line)
        self._starts, self._stops, self._lines = (
            np.frombuffer(found, dtype=np.int64) for found in (starts, stops, lines)
        )

    def __len__(self) -> int:
        return len(self._starts)

    def source(self, number: int) -> Source:
        return Source(self._name, int(self._lines[number]))

    def row(self, number: int) -> Row:
        start, stop = int(self._starts[number]), int(self._stops[number])
        with self._path.open("rb") as file:
            file.seek(start)
            text = file.read(stop - start).decode()
        with _long_cells():
            (cells,) = self._reader(StringIO(text, newline="\n"))
        if len(cells) != len(self._columns):
            raise DocumentError(
                f"the row has {len(cells)} cells and the header {len(self._columns)}. Put a cell that holds "
                f"{_SHOWN[self._delimiter]} or a line break into double quotes.",
                kind="row",
            )
        return {
            column: _value(column, cell) for column, cell in zip(self._columns, cells, strict=True) if cell
        }

    def _reader(self, lines: Iterator[str]) -> Iterator[list[str]]:
        # Strict: a quote that is not closed would take the rest of the file for one cell.
        return csv.reader(lines, delimiter=self._delimiter, strict=True)

    def _records(self, file: BinaryIO) -> Iterator[tuple[int, int, int, list[str]]]:
        """Where each record begins and ends, its first line, and its cells."""
        place, number, start, first = 0, 0, 0, 1

        def lines() -> Iterator[str]:
            nonlocal place, number
            # No more than a row may have is read, wherever its end is.
            while line := file.readline(self._most - (place - start) + 1):
                number += 1
                if place - start + len(line) > self._most:
                    raise DocumentError(
                        f"the row has more bytes than max_row_bytes = {self._most:,}. Split it into several "
                        "rows, or raise the limit. A double quote that is not closed makes one row of all "
                        "that follows.",
                        kind="source",
                        source=Source(self._name, first),
                    )
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    raise self._not_utf8(line, error.start).at(Source(self._name, number)) from None
                place += len(line)
                yield text.removeprefix("\ufeff") if number == 1 else text

        reader = self._reader(lines())
        while True:
            start, first = place, number + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                todo = "Inside double quotes write each quote twice, and close each cell that is opened."
                reason = f"{error}. {todo}"
                if "new-line character" in str(error):  # of old Macs
                    reason = (
                        "lines end in a carriage return alone. Write each as a line feed: tr '\\r' '\\n'."
                    )
                raise DocumentError(
                    f"cannot be read as {_KIND[self._delimiter]}: {reason}",
                    kind="source",
                    source=Source(self._name, first),
                ) from None
            yield start, place, first, cells

    def _check_wide(self, file: BinaryIO) -> None:
        head = file.read(_HEAD)
        file.seek(0)
        try:
            check_wide(head, self._name)
        except DocumentError as error:
            raise error.at(None, self._name) from None

    def _not_utf8(self, line: bytes, place: int) -> DocumentError:
        if looks_like(line) is None or len(line) < _HEAD:
            with self._path.open("rb") as file:
                line = file.read(_HEAD * 4) + line
        return not_utf8(line, place, self._name)

    def _header(self, cells: list[str]) -> list[str]:
        # Pandas writes its index without a name.
        names = [name.strip() or f"column {number + 1}" for number, name in enumerate(cells)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DocumentError(
                f"two columns are named {twice[0][:100]!r}. Rename or remove one.",
                kind="source",
                field=self._name,
            )
        other = next((one for one in ",\t;|" if one != self._delimiter and one in names[0]), None)
        if len(names) == 1 and other is not None:
            raise DocumentError(
                f"the header {names[0][:80]!r} is one column, and is parted by {_SHOWN[other]}. A .csv is "
                "parted by commas, a .tsv by tabs: rename the file, or write it so.",
                kind="source",
                field=self._name,
            )
        return names


_SHOWN = {",": "a comma", "\t": "a tab", ";": "a semicolon", "|": "a bar"}
_KIND = {",": "CSV", "\t": "TSV"}


def _value(column: str, cell: str) -> object:
    """What a cell holds; lists are JSON, all else is text."""
    if column in _SWITCHES and cell.lower() in ("true", "false"):
        return cell.lower() == "true"
    if (column not in _LISTS and column not in _ALONE) or cell.lstrip()[:1] not in ("[", "{"):
        return cell
    try:
        return orjson.loads(cell)
    except orjson.JSONDecodeError as error:
        if column in _ALONE:
            return cell
        raise DocumentError(
            f'expected JSON, such as ["a.png"], found {cell[:80]!r}: {error}. Strings in JSON have double '
            "quotes.",
            kind="json",
            field=column,
        ) from None


@contextmanager
def _long_cells() -> Iterator[None]:
    """The csv module refuses a cell of more than 131,072 characters, unless told for the whole process."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
