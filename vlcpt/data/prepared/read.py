"""Sources that ``vlcpt prepare`` has encoded: their folders, and rows that are encoded documents."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import xxhash

from vlcpt.data.documents import DocumentError, Source
from vlcpt.data.encode.streams import EncodedDocument
from vlcpt.data.media.references import shown_url
from vlcpt.data.prepared.shards import INDEX, SCHEMA, as_numpy, index_line, row_document, row_source
from vlcpt.data.rows.open import default_name

WHOLE = "prepared.json"  # written last: without it, a folder is not whole
BEGUN = "preparing.json"
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
        raise prepared_error(
            f"the address cannot be read ({short(error)}). Check it, and your access.", path
        ) from None
    if begun:
        raise prepared_error(
            "it was not prepared to its end. Run the same vlcpt prepare again: it goes on where it stopped.",
            path,
        )
    if about is None:
        return None
    try:
        if about["kind"] == SOURCE_KIND:
            return [Member(folder.path, "", str(about["name"]), None)]
        return [_member(folder, one) for one in about["sources"]]  # type: ignore[attr-defined]
    except (LookupError, TypeError, ValueError):
        raise prepared_error(
            f"{WHOLE} is damaged. Copy it again, or run vlcpt prepare again.", path
        ) from None


def _member(folder: Folder, one: Mapping[str, object]) -> Member:
    """One source of a set, which lies inside its folder whoever wrote the list."""
    inner, role, name, share = (one[key] for key in ("folder", "role", "name", "share"))
    if not isinstance(inner, str) or not isinstance(role, str) or not isinstance(name, str):
        raise TypeError("no text")
    if not (share is None or isinstance(share, int | float)):
        raise TypeError("no number")
    path = PurePosixPath(inner)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in inner or "\0" in inner:
        raise ValueError("a folder outside of it")
    return Member(f"{folder.path}/{inner}", role, name, share)


def short(error: Exception) -> str:
    """An error in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def prepared_error(reason: str, path: str) -> DocumentError:
    """What is wrong with a prepared folder."""
    return DocumentError(reason, kind="source", field=shown_url(path) if is_address(path) else path)


INDEX_FILE = "index.arrow"
PLACES_FILE = "places.arrow"
LAYOUT = 2
_CHUNK = 1 << 20
# What a batch gives that no vlcpt wrote.
_MALFORMED = (pa.ArrowException, OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError)
_KINDS = {"name": str, "rows": int, "shard_rows": int, "files": dict, "digests": dict, "fingerprint": dict,
          "reading": dict}  # fmt: skip


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
            raise prepared_error("it is no prepared source. Run vlcpt prepare again.", path)
        if (layout := about.get("layout")) != LAYOUT:
            raise prepared_error(
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
            raise self._damaged(WHOLE, short(error)) from None
        self._check_places()
        begins = np.append(self._first, int(about["rows"]))  # type: ignore[call-overload]
        sound = begins[0] == 0 and (np.diff(begins) > 0).all() and (self._size > 0).all()
        if not sound or self.shard_rows < 1:
            raise self._damaged(PLACES_FILE, f"it is not that of {about['rows']} rows")
        self._kept: tuple[int, pa.RecordBatch] | None = None
        self._kept_index: tuple[int, pa.RecordBatch] | None = None

    def __len__(self) -> int:
        return int(self.about["rows"])  # type: ignore[call-overload]

    def __reduce__(self) -> tuple[object, ...]:  # another process opens it itself
        return (PreparedRows, (self._folder.path,))

    @property
    def shard_rows(self) -> int:
        """Rows of each shard but the last."""
        return int(self.about["shard_rows"])  # type: ignore[call-overload]

    @property
    def not_read(self) -> dict[str, int]:
        """What was not read when it was prepared, by name, with the number of rows or files."""
        found = self.about.get("not_read", {})
        if isinstance(found, dict) and all(type(count) is int for count in found.values()):
            return found
        raise self._damaged(WHOLE, "no counts of what was not read")

    def index(self, shards: range) -> dict[str, np.ndarray]:
        """The integers of the rows of these shards, as far as there are so many: int32 by the names of
        ``INDEX``."""
        found = self._columns(shards[: max(self._index.num_record_batches - shards[0], 0)])
        first = shards[0] * self.shard_rows
        if len(found["length"]) != min(len(self) - first, len(shards) * self.shard_rows):
            raise self._damaged(INDEX_FILE, f"it is not that of {len(self):,} rows")
        wide = {name: column.astype(np.int64) for name, column in found.items()}
        kept = wide["targets"] + wide["pads"] + 2 * wide["media"]
        is_sound = (kept <= wide["length"]) & (wide["length"] <= np.maximum(wide["tokens"], 0))
        is_sound &= np.all([column >= 0 for name, column in wide.items() if name != "tokens"], axis=0)
        if not is_sound.all():
            row = first + int(np.argmin(is_sound)) + 1
            raise self._damaged(INDEX_FILE, f"the numbers of row {row:,} do not fit together")
        return found

    def _numbers(self, number: int) -> list[object]:
        """The integers of one row."""
        shard, line = divmod(number, self.shard_rows)
        try:
            if self._kept_index is None or self._kept_index[0] != shard:
                self._kept_index = (shard, self._index.get_batch(shard))
            return [self._kept_index[1].column(name)[line].as_py() for name in INDEX]
        except _MALFORMED as error:
            raise self._damaged(INDEX_FILE, short(error)) from None

    def _columns(self, shards: range) -> dict[str, np.ndarray]:
        """The integers of these shards, as they are."""
        try:
            batches = [self._index.get_batch(shard) for shard in shards]
            for batch in batches:
                batch.validate(full=True)
            return {
                name: np.concatenate([as_numpy(batch.column(name)) for batch in batches]) for name in INDEX
            }
        except _MALFORMED as error:
            raise self._damaged(INDEX_FILE, short(error)) from None

    def source(self, number: int) -> Source:
        batch, place = self._batch(number)
        return row_source(batch, place)

    def row(self, number: int) -> EncodedDocument:
        batch, place = self._batch(number)
        try:
            document = row_document(batch, place, self._folder.path)
        except DocumentError:
            raise
        except _MALFORMED as error:
            raise self._damaged(f"row {number + 1}", short(error)) from None
        found = self._numbers(number)
        if found != index_line(document, document.stream):
            raise self._damaged(f"row {number + 1}", f"{INDEX_FILE} says otherwise of it")
        return document

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
            raise self._damaged(shard_name(shard), short(error)) from None
        if xxhash.xxh3_64_intdigest(content) != int(self._digest[place]):
            raise self._damaged(shard_name(shard), "it was changed since")
        try:
            batch = pa.ipc.read_record_batch(pa.py_buffer(content), SCHEMA)
            batch.validate(full=True)  # a stranger's file may have a fitting checksum
        except _MALFORMED as error:
            raise self._damaged(shard_name(shard), short(error)) from None
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
            raise self._damaged("the folder", short(error)) from None
        for name, size in wanted.items():
            if found.get(name) != size:
                what = f"{found[name]:,} bytes of {size:,}" if name in found else "it is missing"
                raise self._damaged(name, what)

    def _check_places(self) -> None:
        """All batches lie inside files that were prepared."""
        sizes = self.about["files"]
        assert isinstance(sizes, dict)
        for shard in np.unique(self._shard).tolist():
            name, mine = shard_name(shard), self._shard == shard
            if name not in sizes:
                raise self._damaged(PLACES_FILE, f"{WHOLE} lists no {name}")
            ends = self._offset[mine] + self._size[mine]
            if (self._offset[mine] < 0).any() or (ends > sizes[name]).any():
                raise self._damaged(PLACES_FILE, f"it goes beyond {name}")

    def _damaged(self, name: str, reason: str) -> DocumentError:
        return prepared_error(
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
