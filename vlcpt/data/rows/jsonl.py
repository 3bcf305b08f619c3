"""Rows of JSON by byte offsets, of text files and in memory; what tells whether a file changed."""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import orjson

from vlcpt.data.documents import Document, DocumentError, Source
from vlcpt.data.media.names import BESIDE, media_beside
from vlcpt.data.media.references import without_pictures
from vlcpt.data.rows.decoding import BOM, check_wide, not_utf8, text_of
from vlcpt.data.rows.fields import Row

if TYPE_CHECKING:
    import datasets


TEXT_SUFFIXES = (".txt", ".md")
MAX_ROW_BYTES = 256 * 2**20
"""The default of ``max_row_bytes``: a row takes several times its bytes in memory, in each worker."""

_CHUNK = 1 << 20
_HEAD = 1 << 12  # bytes that tell UTF-16
_SPACED = re.compile(rb'"\s+:')


class FileState(NamedTuple):
    """What tells a changed file, as ``make`` and ``rsync`` have it.

    Args:
        path: Its absolute path, or as a row has it.
        size: Its bytes; -1 where there is no such file.
        changed: When it was last written, in nanoseconds.
        mode: Its kind and permissions.
    """

    path: str
    size: int
    changed: int
    mode: int


def file_state(path: str | Path) -> FileState:
    """The state of a file now.

    Example:
        >>> file_state("/no/such/file")
        FileState(path='/no/such/file', size=-1, changed=0, mode=0)
    """
    path = os.path.abspath(path)
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # no such file, or a name that no file can have
        return FileState(path, -1, 0, 0)
    return FileState(path, found.st_size, found.st_mtime_ns, found.st_mode)


class _Twice(NamedTuple):
    """In the place of an object that holds a key twice, itself or further inside."""

    key: str


def check_keys(data: bytes, parsed: object) -> None:
    """Raise if an object in some JSON has a key twice.

    Args:
        data: JSON that could be parsed.
        parsed: What that gave.

    Raises:
        DocumentError: That names the key.

    Example:
        >>> check_keys(b'{"text": "a", "text": "b"}', {"text": "b"})
        Traceback (most recent call last):
        vlcpt.data.documents.DocumentError: the key 'text' stands twice in one object. Rename or remove one.
    """
    if twice := _inside(_parse_again(data, parsed)):
        raise repeated(twice.key)


def rows_with_repeats(data: bytes, rows: list[object]) -> dict[int, str]:
    """The same of a list: which of its rows have a key twice, and which key.

    Example:
        >>> rows_with_repeats(b'[{"a": 1}, {"b": [{"c": 1, "c": 2}]}]', [{"a": 1}, {"b": [{"c": 2}]}])
        {1: 'c'}
    """
    again = _parse_again(data, rows)
    if not isinstance(again, list):
        return {}
    return {row: twice.key for row, one in enumerate(again) if (twice := _inside(one))}


def repeated(key: str) -> DocumentError:
    """The error about a key."""
    return DocumentError(
        f"the key {key[:100]!r} stands twice in one object. Rename or remove one.", kind="json"
    )


def _parse_again(data: bytes, parsed: object) -> object:
    """The JSON with a :class:`_Twice` where a key repeats; None if the bytes alone show that none does."""
    # With as many ends of keys as there are keys left, none was dropped.
    if data.count(b'":') == _count_keys(parsed) and not _SPACED.search(data):
        return None
    try:
        return json.loads(data, object_pairs_hook=_look)
    except RecursionError:
        raise DocumentError("not JSON that can be read: it is nested too deeply.", kind="json") from None


def _count_keys(parsed: object) -> int:
    found, todo = 0, [parsed]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            found += len(one)
            todo += one.values()
        elif isinstance(one, list):
            todo += one
    return found


def _look(pairs: list[tuple[str, object]]) -> _Twice | None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return _Twice(key)
        seen.add(key)
    return _inside([value for _, value in pairs])


def _inside(value: object) -> _Twice | None:
    if isinstance(value, list):
        return next((twice for one in value if (twice := _inside(one))), None)
    return value if isinstance(value, _Twice) else None


class Rows(ABC):
    """Rows by number: a file, a folder, or memory.

    Args:
        name: What messages call them; of a file its path, before it was unpacked.
    """

    has_columns = False
    """Whether columns can be left unread: see :meth:`only`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._most = MAX_ROW_BYTES

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, number: int) -> Row | Document:
        """Row ``number``; a DocumentError if it cannot be read."""

    def source(self, number: int) -> Source:
        """Where row ``number`` stands."""
        return Source(self._name, number + 1)

    def state(self) -> object:
        """What tells whether they changed; None if nothing does."""
        return file_state(self._name)

    def limit(self, most: int) -> None:
        """Refuse rows of more bytes, where they are read by the row; tables are read by groups of rows."""
        self._most = most

    def only(self, columns: Iterable[str]) -> Rows:
        """The same rows; of tables, these columns alone."""
        return self

    def media_root(self, number: int) -> str | None:
        """Where the media of a row start; None: where those of all rows do."""
        return None

    def left_out(self) -> Mapping[str, int]:
        """Files that lie with them and are not read, by what they are."""
        return {}


class JsonlRows(Rows):
    """A JSONL file through an index of its lines: random access, memory for one line.

    Args:
        path: The file, without compression.
        name: What messages call it.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        super().__init__(name or str(path))
        self._path = path
        _check_start(path, self._name)
        self._bounds = _line_bounds(path)
        sizes = np.diff(self._bounds)
        short = np.flatnonzero(sizes <= len(BOM) + 2)
        blank = []
        with path.open("rb") as file:
            for line in short.tolist():
                file.seek(int(self._bounds[line]))
                if not file.read(int(sizes[line])).removeprefix(BOM).strip():
                    blank.append(line)
        self._lines: Sequence[int] | np.ndarray = range(len(sizes))
        if blank:
            self._lines = np.delete(np.arange(len(sizes)), blank)

    def __len__(self) -> int:
        return len(self._lines)

    def source(self, number: int) -> Source:
        return Source(self._name, int(self._lines[number]) + 1)

    def row(self, number: int) -> Row:
        place = int(self._lines[number])
        start, stop = self._bounds[place : place + 2].tolist()
        check_row_size(stop - start, self._most)
        # By number, not as a file object: that takes three times as long, for each row.
        file = os.open(self._path, os.O_RDONLY)
        try:
            line = os.pread(file, stop - start, start)
        finally:
            os.close(file)
        try:
            return json_object(line, self._name)
        except DocumentError as error:
            if error.kind != "encoding" or (place := _first_bad(line)) < 0:
                raise
            # With what stands around it: one line is often too short to tell encodings apart.
            with self._path.open("rb") as whole:
                whole.seek(max(0, start - _HEAD))
                raise not_utf8(whole.read(_HEAD * 4 + stop - start), place, self._name) from None


class JsonRows(Rows):
    """The rows of a JSON file that holds a list, as compact bytes: read whole once, then by number.

    Args:
        path: The file, without compression.
        name: What messages call it.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        super().__init__(name or str(path))
        try:
            data = path.read_bytes().removeprefix(BOM)
            check_wide(data, self._name)
            rows = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise _not_json(data, error, self._name).at(None, self._name) from None
        except DocumentError as error:
            raise error.at(None, self._name) from None
        if not isinstance(rows, list):
            raise DocumentError(
                f"expected a list of rows, found {type(rows).__name__}.", kind="source", field=self._name
            )
        self._repeats = rows_with_repeats(data, rows)
        # Bytes, not objects: a fraction of the memory, and workers share it with the parent.
        lines = [_compact(row) for row in rows]
        self._ends = np.cumsum([len(line) for line in lines], dtype=np.int64)
        self._lines = b"".join(lines)

    def __len__(self) -> int:
        return len(self._ends)

    def row(self, number: int) -> Row:
        if number in self._repeats:
            raise repeated(self._repeats[number])
        start = int(self._ends[number - 1]) if number else 0
        check_row_size(int(self._ends[number]) - start, self._most)
        if start == int(self._ends[number]):
            raise DocumentError("not JSON that can be read: it is nested too deeply.", kind="json")
        return json_object(self._lines[start : int(self._ends[number])])


class TextRows(Rows):
    """Text files, each of them one row.

    Args:
        path: A file, or a folder that is searched for ``.txt`` and ``.md``.
        files: Which files, where they are known.
        looks_beside: Whether media files that lie with them are named as not read.
    """

    def __init__(
        self, path: Path, files: Sequence[Path] | None = None, *, looks_beside: bool = False
    ) -> None:
        super().__init__(str(path))
        self._folder = path if path.is_dir() else path.parent
        self._looks_beside = looks_beside
        if files is None:
            inside = files_inside(path) if path.is_dir() else [path]
            files = [file for file in inside if file.suffix.lower() in TEXT_SUFFIXES]
        self._files = files
        for file in self._files:
            require_regular(file)

    def __len__(self) -> int:
        return len(self._files)

    def source(self, number: int) -> Source:
        return Source(str(self._files[number]), 1)

    def state(self) -> list[FileState]:
        """What tells whether they changed."""
        return [file_state(file) for file in self._files]

    def left_out(self) -> Mapping[str, int]:
        """Media files that lie with them, which may be theirs."""
        return {BESIDE: media_beside(str(self._folder))} if self._looks_beside else {}

    def row(self, number: int) -> Row:
        check_row_size(self._files[number].stat().st_size, self._most)
        file = self._files[number]
        # Line ends of any system are one character, as when Python reads a text.
        return {"text": text_of(file.read_bytes(), str(file)).replace("\r\n", "\n").replace("\r", "\n")}


class MemoryRows(Rows):
    """Rows or Documents that are in memory already, a ``datasets.Dataset`` included.

    Args:
        rows: A sequence of them.
        name: What messages call it.
    """

    has_columns = True

    def __init__(self, rows: Sequence[object], name: str) -> None:
        super().__init__(name)
        self._rows = _stored(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict[str, object]:  # for spawned workers
        rows = self._rows
        return {**self.__dict__, "_rows": without_pictures(rows) if isinstance(rows, list) else rows}

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


def json_object(line: bytes, file: str = "") -> dict[str, object]:
    """A row from its JSON.

    Args:
        line: In UTF-8, with or without a mark at its start.
        file: Its file's name, for the command that converts another encoding.

    Example:
        >>> json_object(b'{"text": "a"}')
        {'text': 'a'}
    """
    try:
        row = orjson.loads(line.removeprefix(BOM))
    except orjson.JSONDecodeError as error:
        raise _not_json(line, error, file) from None
    if not isinstance(row, dict):
        raise DocumentError(f"expected an object in {{}}, found {type(row).__name__}.", kind="json")
    check_keys(line, row)
    return row


def _not_json(data: bytes, error: orjson.JSONDecodeError, file: str) -> DocumentError:
    """What is wrong with the JSON: its encoding, where that is not UTF-8."""
    try:
        check_wide(data, file)
    except DocumentError as wide:
        return wide
    if (place := _first_bad(data)) >= 0:
        return not_utf8(data, place, file)
    return DocumentError(f"not JSON: {error}.", kind="json")


def _first_bad(data: bytes) -> int:
    """The first byte that is not UTF-8; -1 if all are."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start
    return -1


def _check_start(path: Path, name: str) -> None:
    """Raise where a file begins like UTF-16, of which no line could be read."""
    with path.open("rb") as file:
        start = file.read(_HEAD)
    try:
        check_wide(start, name)
    except DocumentError as error:
        raise error.at(None, name) from None


def _compact(row: object) -> bytes:
    """A row's JSON; nothing for one that is nested more deeply than can be written."""
    try:
        return orjson.dumps(row)
    except orjson.JSONEncodeError:
        return b""


def check_row_size(size: int, most: int) -> None:
    """Raise for a row that would fill memory, before it is read.

    Example:
        >>> check_row_size(300, 256)
        Traceback (most recent call last):
        ...
        vlcpt.data.documents.DocumentError: the row has 300 bytes, above max_row_bytes = 256. Split it into several rows, or raise the limit.
    """  # noqa: E501
    if size > most:
        raise DocumentError(
            f"the row has {size:,} bytes, above max_row_bytes = {most:,}. Split it into several rows, or "
            "raise the limit."
        )


def check_strings(path: Path, most: int, name: str) -> None:
    """Raise for a JSON file with a text above a limit: a list is read whole, so its rows are too late.

    Args:
        path: The file, without compression.
        most: Bytes between two quotes.
        name: What messages call the file.
    """
    if path.stat().st_size <= most:
        return
    with path.open("rb") as file:
        done = last = 0
        while chunk := file.read(_CHUNK):
            quotes = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord('"')) + done
            done += len(chunk)
            bounds = np.concatenate([[last], quotes, [done] if done - last > most else []])
            gaps = np.diff(bounds)
            if len(gaps) and gaps.max() > most:
                raise DocumentError(
                    f"a text at byte {int(bounds[gaps.argmax()]):,} is longer than max_row_bytes = {most:,}. "
                    "Split it into several rows, or raise the limit.",
                    kind="source",
                    field=name,
                )
            last = int(quotes[-1]) if len(quotes) else last


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
