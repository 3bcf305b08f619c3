"""Sources that ``vlcpt prepare`` has encoded: their folders, and rows that are encoded documents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

from vlcpt.data.documents import MAX_WEIGHT, DocumentError, Image, Medium, Source, Video
from vlcpt.data.encode.encoder import IGNORE_INDEX, NUMBERS, EncodedDocument, TokenStream
from vlcpt.data.media.files import shown_url
from vlcpt.data.rows.base import Rows, file_state
from vlcpt.data.rows.fields import Row
from vlcpt.data.rows.open import default_name
from vlcpt.data.rows.tables import ParquetRows, file_system, is_address

WHOLE = "prepared.json"  # written last: without it, preparing has not ended
BEGUN = "preparing.json"
# What marks the JSON files as ours, and tells one source from a folder of several.
SOURCE_KIND, SET_KIND = "vlcpt prepared source", "vlcpt prepared set"
LAYOUT = 5

# A row of a shard is a row of the source. The columns are few: each makes it slower to read one row.
SCHEMA = pa.schema(
    [
        pa.field("about", pa.string(), nullable=False),  # JSON: see About
        pa.field("data", pa.binary(), nullable=False),  # input_ids as int32, RUNS, the bytes of each medium
        pa.field("numbers", pa.binary(NUMBERS.itemsize), nullable=False),  # what planning reads
    ]
)
RUNS = np.dtype([("length", "<i4"), ("weight", "<f4")])  # neighbouring tokens of one loss weight


@dataclass
class Failed:
    """What is wrong with a row that is no document: the arguments of a ``DocumentError``."""

    kind: str
    reason: str
    field: str | None
    offset: int | None


@dataclass
class About:
    """What a row says besides its tokens and the bytes of its media.

    Args:
        source: Where it stood, with its id.
        error: Why it is no document; the rest is then empty, and ``tokens`` among its numbers is -1.
        tokens, runs: How many there are.
        media: Each with its bytes. Its path is its name in messages, and is never opened.
    """

    source: Source
    error: Failed | None = None
    tokens: int = 0
    runs: int = 0
    media: list[tuple[int, Literal["Image"], Image] | tuple[int, Literal["Video"], Video]] = field(
        default_factory=list
    )


@dataclass
class Contents:
    """What ``prepared.json`` says of a source.

    Args:
        name, rows, reading: The source's own.
        shard_rows: Rows of each shard but the last.
        files: The bytes of each shard, by its name.
        fingerprint: What it was encoded with.
        not_read: What was not read when it was prepared, by name, with the number of rows or files.
    """

    name: str
    rows: int
    shard_rows: int
    files: dict[str, int]
    fingerprint: dict[str, object]
    reading: dict[str, object]
    not_read: dict[str, int]


@dataclass(frozen=True)
class Member:
    """One source of a prepared set.

    Args:
        folder: Its folder or address.
        role: The configuration's key that it was given under, e.g. ``train_data``.
        name: What the ledger calls it.
        share: The part of all targets that was asked for.
    """

    folder: str
    role: str
    name: str
    share: float | None


_ABOUT, _CONTENTS, _MEMBERS = TypeAdapter(About), TypeAdapter(Contents), TypeAdapter(list[Member])


def read_json(folder: str, name: str, kinds: tuple[str, ...]) -> dict[str, object] | None:
    """A JSON file of one of these kinds, in a folder or at an address; None where there is none.

    Example:
        >>> read_json("no/such/folder", WHOLE, (SOURCE_KIND,)) is None
        True
    """
    try:
        files, root = file_system(folder)
        found = json.loads(files.cat_file(f"{root}/{name}"))
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return found if isinstance(found, dict) and found.get("kind") in kinds else None


def prepared_from(path: str) -> str | None:
    """The key of the rows that a prepared source was made of (``source_key``); None for what is none.

    Example:
        >>> prepared_from("no/such/folder") is None
        True
    """
    try:
        about = read_json(path, WHOLE, (SOURCE_KIND,))
    except (OSError, ValueError, ImportError):  # no folder, and no address that can be read
        return None
    key = None if about is None else about.get("data")
    return key if isinstance(key, str) else None


def prepared_members(path: str) -> list[Member] | None:
    """The sources of what was prepared at a path; None where nothing was.

    A source alone is its own only member, with the role "".

    Raises:
        DocumentError: If preparing has not ended, or an address cannot be read.

    Example:
        >>> prepared_members("no/such/folder") is None
        True
    """
    if is_address(path) and default_name(path) != Path(path).name:
        return None  # a data file, which is not fetched
    try:
        about = read_json(path, WHOLE, (SOURCE_KIND, SET_KIND))
        begun = about is None and read_json(path, BEGUN, (SOURCE_KIND, SET_KIND)) is not None
    except (OSError, ValueError, ImportError) as error:
        if not is_address(path):
            return None
        reason = f"the address cannot be read ({_short(error)}). Check it, and your access."
        raise _error(reason, path) from None
    if begun:
        raise _error(
            "it was not prepared to its end. Run the same vlcpt prepare again: it goes on where it stopped.",
            path,
        )
    if about is None:
        return None
    folder = path.rstrip("/")
    try:
        if about["kind"] == SOURCE_KIND:
            return [Member(folder, "", str(about["name"]), None)]
        members = _MEMBERS.validate_python(about["sources"])
        return [replace(one, folder=f"{folder}/{_inner(one.folder)}") for one in members]
    except (LookupError, ValueError):
        todo = "Copy it again, or run vlcpt prepare again with --overwrite."
        raise _error(f"{WHOLE} is damaged. {todo}", path) from None


def _inner(folder: str) -> str:
    """The folder of a source, which lies inside that of its set, whoever wrote the list."""
    path = PurePosixPath(folder)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in folder or "\0" in folder:
        raise ValueError("a folder outside of it")
    return folder


class PreparedRows(Rows):
    """The rows of a prepared source, as encoded documents.

    Args:
        path: Its folder, or an address.

    Raises:
        DocumentError: If it is not there, a file of it is missing or cut, or another release wrote it.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._path = path.rstrip("/")
        about = read_json(path, WHOLE, (SOURCE_KIND,))
        if about is None:
            raise _error("it is no prepared source. Run vlcpt prepare again.", path)
        if (layout := about.get("layout")) != LAYOUT:
            raise _error(
                f"it has layout {layout}, and this release reads {LAYOUT}. Run vlcpt prepare again.", path
            )
        self._about = about
        try:
            self.contents = _CONTENTS.validate_json(json.dumps(about), strict=True)
        except ValueError:
            reason = "a key is missing, or its value is of another type"
            raise self._damaged(WHOLE, reason) from None
        self._rows, self.shard_rows = self.contents.rows, self.contents.shard_rows
        self._check_files()
        self._shards: dict[int, ParquetRows] = {}

    def __len__(self) -> int:
        return self._rows

    def __reduce__(self) -> tuple[object, ...]:  # another process opens it itself
        return (PreparedRows, (self._path,))

    def state(self) -> object:
        """What tells whether it changed: also where its files were written over. None for an address."""
        if is_address(self._path):
            return None
        return [self._about, [file_state(f"{self._path}/{name}") for name in self.contents.files]]

    def index(self, shards: range) -> np.ndarray:
        """The numbers of the rows of these shards, as far as there are so many: ``NUMBERS`` (N,)."""
        shards = shards[: max(len(self.contents.files) - shards[0], 0)]
        found = np.concatenate([self._numbers(shard) for shard in shards])
        wide = {name: found[name].astype(np.int64) for name in found.dtype.fields or ()}
        kept = wide["targets"] + wide["pads"] + 2 * wide["media"]
        is_sound = (kept <= wide["length"]) & (wide["length"] <= np.maximum(wide["tokens"], 0))
        is_sound &= np.all([column >= -(name == "tokens") for name, column in wide.items()], axis=0)
        if not is_sound.all():
            row = shards[0] * self.shard_rows + int(np.argmin(is_sound)) + 1
            raise self._damaged(f"row {row:,}", "its numbers do not fit together")
        return found

    def source(self, number: int) -> Source:
        try:
            return _about(self._row(number)).source
        except ValueError:  # it is damaged, as reading it says
            return super().source(number)

    def row(self, number: int) -> EncodedDocument:
        row = self._row(number)
        with self._as_damaged(f"row {number + 1}"):
            about = _about(row)
        if about.error is not None:
            raise DocumentError(**vars(about.error), source=about.source)
        with self._as_damaged(f"row {number + 1}"):
            return _document(row, about, self._path)

    def _numbers(self, shard: int) -> np.ndarray:
        with self._as_damaged(shard_name(shard)):
            return numbers_in(self._shard(shard))

    def _row(self, number: int) -> Row:
        shard, line = divmod(number, self.shard_rows)
        with self._as_damaged(shard_name(shard)):
            return self._shard(shard).row(line)

    def _shard(self, shard: int) -> ParquetRows:
        if shard not in self._shards:
            rows = ParquetRows(f"{self._path}/{shard_name(shard)}")
            expected = min(self.shard_rows, self._rows - shard * self.shard_rows)
            if rows.schema != SCHEMA or len(rows) != expected:
                raise ValueError("its columns, or the number of its rows, are others")
            self._shards[shard] = rows
        return self._shards[shard]

    @contextmanager
    def _as_damaged(self, name: str) -> Iterator[None]:
        """What is wrong with a file or a row, which no vlcpt wrote so, as an error of the folder."""
        try:
            yield
        except DocumentError as error:
            raise self._damaged(name, error.reason) from None
        except (ValueError, TypeError) as error:
            raise self._damaged(name, _short(error)) from None

    def _check_files(self) -> None:
        """All files are there, with their length; pages show when they are read whether they changed."""
        shards = -(-self._rows // max(self.shard_rows, 1))
        if self.shard_rows < 1 or shards < 1 or [*self.contents.files] != [*map(shard_name, range(shards))]:
            raise self._damaged(WHOLE, f"its shards are not those of {self._rows:,} rows")
        try:
            files, root = file_system(self._path)
            found = {one["name"].rpartition("/")[2]: one["size"] for one in files.ls(root, detail=True)}
        except OSError as error:
            raise self._damaged("the folder", _short(error)) from None
        for name, size in self.contents.files.items():
            if found.get(name) != size:
                what = f"{found[name]:,} bytes of {size:,}" if name in found else "it is missing"
                raise self._damaged(name, what)

    def _damaged(self, name: str, reason: str) -> DocumentError:
        return _error(
            f"{name} is not as it was prepared ({reason}). Copy it again, or run vlcpt prepare again with "
            "--overwrite.",
            self._path,
        )


def _about(row: Row) -> About:
    try:
        return _ABOUT.validate_python(json.loads(str(row["about"])))
    except ValueError:
        raise ValueError("its column about is not as vlcpt writes it") from None


def _document(row: Row, about: About, folder: str) -> EncodedDocument:
    """A row as a document of a prepared source in this folder.

    Raises:
        ValueError, TypeError: If its parts do not fit together, as no vlcpt writes them.
    """
    data, numbers = bytes(row["data"]), np.frombuffer(row["numbers"], NUMBERS)[0]  # type: ignore[call-overload]
    sizes = [4 * about.tokens, RUNS.itemsize * about.runs, *(size for size, _, _ in about.media)]
    if min(sizes) < 0 or sum(sizes) != len(data):
        raise ValueError(f"its parts take {sizes} of {len(data)} bytes")
    ends = [*accumulate(sizes)]
    ids = np.frombuffer(data, "<i4", about.tokens).astype(np.int64)
    runs = np.frombuffer(data, RUNS, about.runs, ends[0])
    lengths, weights = runs["length"], runs["weight"]
    # A few bytes may claim runs that take all memory.
    if not len(ids) or lengths.min() < 0 or lengths.sum(dtype=np.int64) != len(ids):
        raise ValueError(f"its loss weights are not those of {len(ids)} tokens")
    if not (weights.min() >= 0 and weights.max() <= MAX_WEIGHT) or ids.min() < 0:  # also where one is NaN
        raise ValueError("a token or a loss weight is out of range")
    loss_weights = np.repeat(weights, lengths)
    stream = TokenStream(
        input_ids=ids,
        labels=np.where(loss_weights > 0, ids, IGNORE_INDEX),
        loss_weights=loss_weights,
        media=(),
        without_context=int(numbers["without_context"]),
        cut_edges=int(numbers["cut_edges"]),
    )
    media: list[Medium] = [
        replace(medium, data=data[start:stop])  # so its path is not opened
        for (_, _, medium), (start, stop) in zip(about.media, pairwise(ends[1:]), strict=True)
    ]
    return EncodedDocument(
        tuple(media),
        id=about.source.id,
        source=about.source,
        tagged=not numbers["untagged"],
        empty_spans=int(numbers["empty_spans"]),
        stream=stream,
        numbers=numbers,
        folder=folder,
    )


def numbers_in(shard: ParquetRows) -> np.ndarray:
    """What planning needs of the rows of a shard: ``NUMBERS`` (N,)."""
    column = shard.table(["numbers"])["numbers"].combine_chunks()
    return np.frombuffer(column.buffers()[1], NUMBERS, len(column))


def shard_name(shard: int) -> str:
    """The file of a shard.

    Example:
        >>> shard_name(7)
        '00007.parquet'
    """
    return f"{shard:05d}.parquet"


def _short(error: Exception) -> str:
    """An error in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _error(reason: str, path: str) -> DocumentError:
    return DocumentError(reason, kind="source", field=shown_url(path) if is_address(path) else path)
