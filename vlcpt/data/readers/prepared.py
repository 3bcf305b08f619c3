"""Sources that ``vlcpt prepare`` has encoded, on a disk or at an address: rows that are encoded documents."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from vlcpt.data.documents import DocumentError, Source
from vlcpt.data.readers.storage import default_name
from vlcpt.data.references import shown_url
from vlcpt.data.shards import INDEX, SCHEMA, as_numpy, row_document, row_source
from vlcpt.data.streams import EncodedDocument

WHOLE = "prepared.json"  # written last: without it, a folder is not whole
BEGUN = "preparing.json"
INDEX_FILE = "index.arrow"
PLACES_FILE = "places.arrow"
LAYOUT = 1
_CHUNK = 1 << 20
# What a batch gives that no vlcpt wrote.
_MALFORMED = (pa.ArrowException, OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError)
_KINDS = {"rows": int, "shard_rows": int, "files": dict, "digests": dict, "fingerprint": dict}
# What marks the JSON files as ours, and tells one source from a folder of several.
SOURCE_KIND, SET_KIND = "vlcpt prepared source", "vlcpt prepared set"


@dataclass(frozen=True)
class Member:
    """One source of a prepared set.

    Args:
        path: Its folder or address.
        role: The configuration's key that it was given under, e.g. ``train_data``.
        name: What the ledger calls it.
        share: The part of all targets that was asked for.
    """

    path: str
    role: str
    name: str
    share: float | None


def is_address(path: str) -> bool:
    """Whether a path is one for ``fsspec``.

    Example:
        >>> is_address("s3://bucket/set"), is_address("data/set")
        (True, False)
    """
    return "://" in path


class Folder:
    """A folder's files, on a disk or at an address.

    Args:
        path: A path, or an address that ``fsspec`` knows.
    """

    def __init__(self, path: str) -> None:
        self.path = path.rstrip("/")

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """A file, or a part of it.

        Raises:
            OSError: If it is not there or cannot be read.
        """
        if not is_address(self.path):
            with open(f"{self.path}/{name}", "rb") as file:
                file.seek(start or 0)
                return file.read() if stop is None else file.read(stop - (start or 0))
        files, root = self._files()
        found = files.cat_file(f"{root}/{name}", start, stop)
        return bytes(found)

    def open(self, name: str) -> pa.NativeFile:
        """A file to read from; one at an address is fetched whole. Arrow reads at places, not where another
        process has left off."""
        if is_address(self.path):
            return pa.BufferReader(self.read(name))
        return pa.OSFile(f"{self.path}/{name}")

    def sizes(self) -> dict[str, int]:
        """Bytes of every file in it."""
        if not is_address(self.path):
            return {entry.name: entry.stat().st_size for entry in Path(self.path).iterdir()}
        files, root = self._files()
        return {one["name"].rpartition("/")[2]: one["size"] for one in files.ls(root, detail=True)}

    def json(self, name: str, kinds: tuple[str, ...]) -> dict[str, object] | None:
        """A JSON file of one of these kinds; None where there is none."""
        try:
            found = json.loads(self.read(name))
        except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError, json.JSONDecodeError):
            return None
        return found if isinstance(found, dict) and found.get("kind") in kinds else None

    def _files(self):  # type: ignore[no-untyped-def]
        from fsspec.core import url_to_fs

        # fsspec keeps what it opens, for each process anew: a connection does not survive a fork.
        return url_to_fs(self.path)


def prepared_members(path: str) -> list[Member] | None:
    """The sources of what was prepared at a path; None where nothing was.

    A source alone is its own only member, with the role "".

    Raises:
        DocumentError: If it is not whole, or an address cannot be read.

    Example:
        >>> prepared_members("no/such/folder") is None
        True
    """
    if is_address(path) and default_name(path) != Path(path).name:
        return None  # a data file, which is not fetched
    folder = Folder(path)
    try:
        about = folder.json(WHOLE, (SOURCE_KIND, SET_KIND))
        begun = about is None and folder.json(BEGUN, (SOURCE_KIND, SET_KIND)) is not None
    except (OSError, ValueError, ImportError) as error:
        if not is_address(path):
            return None
        raise _error(
            f"the address cannot be read ({_short(error)}). Check it, and your access.", path
        ) from None
    if begun:
        raise _error(
            "it was not prepared to its end. Run the same vlcpt prepare again: it goes on where it stopped.",
            path,
        )
    if about is None:
        return None
    try:
        if about["kind"] == SOURCE_KIND:
            return [Member(folder.path, "", str(about["name"]), None)]
        return [
            Member(f"{folder.path}/{one['folder']}", one["role"], one["name"], one["share"])
            for one in about["sources"]  # type: ignore[attr-defined]
        ]
    except (LookupError, TypeError):
        raise _error(f"{WHOLE} is damaged. Copy it again, or run vlcpt prepare again.", path) from None


class PreparedRows:
    """The rows of a prepared source, as encoded documents.

    Args:
        path: Its folder, or an address.

    Raises:
        DocumentError: If it is not there, not whole, or of another release's layout.
    """

    def __init__(self, path: str) -> None:
        self._folder = Folder(path)
        about = self._folder.json(WHOLE, (SOURCE_KIND,))
        if about is None:
            raise _error("it is no prepared source. Run vlcpt prepare again.", path)
        if (layout := about.get("layout")) != LAYOUT:
            raise _error(
                f"it has layout {layout}, and this release reads {LAYOUT}. Run vlcpt prepare again.", path
            )
        self.about: Mapping[str, object] = about
        if wrong := [key for key, kind in _KINDS.items() if not isinstance(about.get(key), kind)]:
            raise self._damaged(WHOLE, f"no {', '.join(wrong)}")
        try:
            self._check_files()
            self._index = pa.ipc.open_file(self._verified(INDEX_FILE))
            places = pa.ipc.open_file(self._verified(PLACES_FILE)).get_batch(0)
            places.validate(full=True)
            self._first, self._shard, self._offset, self._size, self._digest = (
                as_numpy(places.column(name)) for name in ("first", "shard", "offset", "size", "digest")
            )
        except DocumentError:
            raise
        except _MALFORMED as error:
            raise self._damaged(WHOLE, _short(error)) from None
        begins = np.append(self._first, int(about["rows"]))  # type: ignore[call-overload]
        sound = begins[0] == 0 and (np.diff(begins) > 0).all() and (self._size > 0).all()
        if not sound or self.shard_rows < 1:
            raise self._damaged(PLACES_FILE, f"it is not that of {about['rows']} rows")
        self._kept: tuple[int, pa.RecordBatch] | None = None

    def __len__(self) -> int:
        return int(self.about["rows"])  # type: ignore[call-overload]

    def __reduce__(self) -> tuple[object, ...]:  # another process opens it itself
        return (PreparedRows, (self._folder.path,))

    @property
    def shard_rows(self) -> int:
        """Rows of each shard but the last."""
        return int(self.about["shard_rows"])  # type: ignore[call-overload]

    def index(self, shards: range) -> dict[str, np.ndarray]:
        """The integers of the rows of these shards, as far as there are so many: int32 by the names of
        ``INDEX``."""
        batches = [
            self._index.get_batch(shard) for shard in shards[: self._index.num_record_batches - shards[0]]
        ]
        found = {name: np.concatenate([as_numpy(batch.column(name)) for batch in batches]) for name in INDEX}
        first = shards[0] * self.shard_rows
        if len(found["length"]) != min(len(self) - first, len(shards) * self.shard_rows):
            raise self._damaged(INDEX_FILE, f"it is not that of {len(self):,} rows")
        return found

    def source(self, number: int) -> Source:
        batch, place = self._batch(number)
        return row_source(batch, place)

    def row(self, number: int) -> EncodedDocument:
        batch, place = self._batch(number)
        try:
            return row_document(batch, place)
        except DocumentError:
            raise
        except _MALFORMED as error:
            raise self._damaged(f"row {number + 1}", _short(error)) from None

    def _batch(self, number: int) -> tuple[pa.RecordBatch, int]:
        """The batch that holds a row, and the row's place in it."""
        place = int(np.searchsorted(self._first, number, side="right")) - 1
        if self._kept is None or self._kept[0] != place:
            self._kept = (place, self._read(place))
        return self._kept[1], number - int(self._first[place])

    def _read(self, place: int) -> pa.RecordBatch:
        shard, start = int(self._shard[place]), int(self._offset[place])
        try:
            content = self._folder.read(shard_name(shard), start, start + int(self._size[place]))
        except OSError as error:
            raise self._damaged(shard_name(shard), _short(error)) from None
        if xxhash.xxh3_64_intdigest(content) != int(self._digest[place]):
            raise self._damaged(shard_name(shard), "it was changed since")
        try:
            batch = pa.ipc.read_record_batch(pa.py_buffer(content), SCHEMA)
            batch.validate(full=True)  # a stranger's file may have a fitting checksum
        except _MALFORMED as error:
            raise self._damaged(shard_name(shard), _short(error)) from None
        return batch

    def _verified(self, name: str) -> pa.NativeFile:
        digests = self.about["digests"]
        assert isinstance(digests, dict)
        file, digest = self._folder.open(name), xxhash.xxh3_64()
        for start in range(0, file.size(), _CHUNK):
            digest.update(file.read_at(min(_CHUNK, file.size() - start), start))
        if digest.hexdigest() != digests[name]:
            raise self._damaged(name, "it was changed since")
        return file

    def _check_files(self) -> None:
        """All files are there, at their length; that their content is whole shows when it is read."""
        wanted = self.about["files"]
        assert isinstance(wanted, dict)
        try:
            found = self._folder.sizes()
        except OSError as error:
            raise self._damaged("the folder", _short(error)) from None
        for name, size in wanted.items():
            if found.get(name) != size:
                what = f"{found[name]:,} bytes of {size:,}" if name in found else "it is missing"
                raise self._damaged(name, what)

    def _damaged(self, name: str, reason: str) -> DocumentError:
        return _error(
            f"{name} is not as it was prepared ({reason}). Copy it again, or run vlcpt prepare again.",
            self._folder.path,
        )


def shard_name(shard: int) -> str:
    """The file of a shard.

    Example:
        >>> shard_name(7)
        '00007.arrow'
    """
    return f"{shard:05d}.arrow"


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _error(reason: str, path: str) -> DocumentError:
    return DocumentError(reason, kind="source", field=shown_url(path) if is_address(path) else path)
