"""Rows of tables: Parquet, Arrow, ``datasets`` that were saved or are on the Hub; and rows in memory."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from vlcpt.data.documents import Document, DocumentError
from vlcpt.data.media.references import without_pictures
from vlcpt.data.rows.base import Rows, check_names, file_state
from vlcpt.data.rows.fields import Row
from vlcpt.file_writes import WriteError, Writing

if TYPE_CHECKING:
    import datasets

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
        check_names(str(path), self.schema.names)
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
        is_remote = is_address(self.path)
        files, path = file_system(self.path) if is_remote else (None, self.path)
        # Reading ahead in threads pays where each read has a delay; on a disk it takes half of the time.
        file = pq.ParquetFile(path, filesystem=files, pre_buffer=is_remote, page_checksum_verification=True)
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
                table = pa.ipc.open_file(mapped).read_all()
            except pa.ArrowInvalid:
                mapped.seek(0)
                table = pa.ipc.open_stream(mapped).read_all()
                _check_end(path)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, "Arrow", error) from None
        check_names(str(path), table.schema.names)
        names = [name for name in table.schema.names if self._wanted is None or name in self._wanted]
        self._table = table.select(names)

    def __len__(self) -> int:
        return len(self._table)

    def __reduce__(self) -> tuple[object, ...]:  # a worker maps the file itself instead of copying it
        return (ArrowRows, (self._path, self._wanted))

    def row(self, number: int) -> Row:
        return _row(self._table, number)

    def only(self, columns: Iterable[str]) -> ArrowRows:
        """The same rows with these columns alone."""
        return ArrowRows(self._path, columns)


class DatasetRows(Rows):
    """Rows of a ``datasets.Dataset``, as they are stored: it would decode media past their limits.

    Args:
        rows: The data set.
        name: What messages call it.

    Raises:
        DocumentError: If it is another class of ``datasets``, which has no rows by number.
    """

    has_columns = True

    def __init__(self, rows: datasets.Dataset, name: str) -> None:
        import datasets

        super().__init__(name)
        if not isinstance(rows, datasets.Dataset):
            raise DocumentError(
                f"expected a datasets.Dataset, found {type(rows).__name__}. Choose a split, without "
                "streaming.",
                kind="source",
            )
        self._rows = rows.with_format("arrow")  # paths and bytes, nothing cast or copied

    def __len__(self) -> int:
        return len(self._rows)

    def state(self) -> list[object]:
        """What tells whether they changed: the fingerprint that the data set carries, and its files."""
        files = [file_state(one["filename"]) for one in self._rows.cache_files]
        return [self._name, self._rows._fingerprint, files]

    def only(self, columns: Iterable[str]) -> DatasetRows:
        """The same rows with these columns alone."""
        names = set(columns)
        kept = [name for name in self._rows.column_names if name in names]
        return DatasetRows(self._rows.select_columns(kept), self._name)

    def row(self, number: int) -> Row:
        return self._rows[number].to_pylist()[0]


class MemoryRows(Rows):
    """Rows or Documents that are in memory already.

    Args:
        rows: A sequence of them.
        name: What messages call it.
    """

    def __init__(self, rows: Sequence[object], name: str) -> None:
        super().__init__(name)
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict[str, object]:  # for spawned workers
        rows = self._rows
        return {**self.__dict__, "_rows": without_pictures(rows) if isinstance(rows, list) else rows}

    def state(self) -> None:
        """None: nothing tells whether they changed."""

    def row(self, number: int) -> Row | Document:
        row = self._rows[number]
        if isinstance(row, Mapping | Document):
            return row
        raise DocumentError(f"expected a dict or a Document, found {type(row).__name__}.", kind="row")


def is_dataset(rows: object) -> bool:
    """Whether an object is of a class of ``datasets``, without importing it.

    Example:
        >>> is_dataset([{"text": "a"}])
        False
    """
    return type(rows).__module__.split(".")[0] == "datasets"


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


def saved_rows(path: Path, split: str | None) -> DatasetRows:
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
    return DatasetRows(found, str(path))


def loaded_rows(path: str, split: str) -> DatasetRows:
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
    return DatasetRows(found, path)


def _row(table: pa.Table | pa.RecordBatch, number: int) -> Row:
    return {name: table.column(name)[number].as_py() for name in table.schema.names}


@contextmanager
def _unreadable(what: str) -> Iterator[None]:
    """What Arrow, or the disk, says of a part of a file."""
    try:
        yield
    except (pa.ArrowException, OSError, IndexError) as error:  # the last: fewer rows than it had
        raise DocumentError(f"{what} cannot be read: {error}. Write the file again.", kind="row") from None


def _check_end(path: Path) -> None:
    """Raise if a stream lacks its end mark: cut between two batches, it reads like a complete one."""
    with path.open("rb") as file:
        file.seek(-min(len(_STREAM_END), path.stat().st_size), os.SEEK_END)
        if file.read() != _STREAM_END:
            raise pa.ArrowInvalid("the stream has no end mark: it is cut short. Write it again.")


def _damaged(path: Path | str, kind: str, error: Exception) -> DocumentError:
    reason = " ".join(str(error).split())[:300]
    return DocumentError(f"cannot be read as {kind}: {reason}", kind="source", field=str(path))
