"""Rows of a WebDataset tar: members with the same key, such as ``0001.jpg`` and ``0001.txt``, are one row."""

from __future__ import annotations

import logging
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson

from vlcpt.data.documents import Document, DocumentError, Image, Medium, Segment, Video, modality_of
from vlcpt.data.media.files import MEDIA_SUFFIXES, is_video_name
from vlcpt.data.rows.base import MAX_ROW_BYTES, Rows, check_row_size
from vlcpt.data.rows.decoding import text_of
from vlcpt.data.rows.fields import Row
from vlcpt.data.rows.text_files import json_object

logger = logging.getLogger(__name__)

UNNAMED = "files of a tar that their row does not name"
# Where rows name files, and the keys of structs in these that do.
_FIELDS = ("images", "image", "videos", "video", "messages", "segments", "image_info", "image_files")
_NAME_KEYS = frozenset(("image", "image_url", "video", "video_url", "path", "url", "image_name", "raw_url"))

# The key is the path up to the first dot of the file's name, as in WebDataset; hidden files have none.
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")


class TarRows(Rows):
    """A tar by an index of its members: random access, memory for the index and one row.

    A row has the fields of the ``.json``, ``caption`` from the ``.txt``, and ``image`` or ``images``
    (``video`` or ``videos``) with the bytes. Where the ``.json`` names media itself, it names members: see
    :func:`with_own_files`.

    Args:
        path: The file, without compression.
        name: What messages call it.
        max_row_bytes: See :class:`Rows`.
    """

    def __init__(self, path: Path, name: str | None = None, max_row_bytes: int = MAX_ROW_BYTES) -> None:
        super().__init__(name or str(path), max_row_bytes)
        self._path = path
        names: list[bytes] = []
        places: list[tuple[int, int]] = []
        starts: list[int] = []
        key, skipped = None, 0
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    archive.members = []  # type: ignore[attr-defined]  # it would keep every member
                    if member.issparse():
                        raise tarfile.ReadError(f"member {member.name!r} is sparse")
                    match = _MEMBER.fullmatch(member.name.removeprefix("./"))
                    if not member.isreg() or match is None:
                        skipped += not member.isdir()
                        continue
                    if match[1] != key:
                        key = match[1]
                        starts.append(len(names))
                    names.append(member.name.encode("utf-8", "replace"))
                    places.append((member.offset_data, member.size))
                _check_end(path, archive.offset)
        except (tarfile.TarError, OSError) as error:
            raise DocumentError(
                f"cannot be read as tar: {error}. It is damaged or cut short; write it again.",
                kind="source",
                field=self._name,
            ) from None
        if skipped:
            logger.info(
                "%s: %d members are no files of a row (links, hidden, no suffix)", self._name, skipped
            )
        # Flat arrays: a list of objects for each member would be many times larger, and copied by workers.
        self._names = b"".join(names)
        self._name_ends = np.cumsum([len(one) for one in names], dtype=np.int64)
        self._places = np.array(places, dtype=np.int64).reshape(-1, 2)
        self._starts = np.array([*starts, len(names)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def row(self, number: int) -> Row:
        members: dict[str, bytes] = {}
        with self._path.open("rb") as file:
            for place in range(int(self._starts[number]), int(self._starts[number + 1])):
                start = int(self._name_ends[place - 1]) if place else 0
                name = self._names[start : int(self._name_ends[place])].decode()
                offset, size = self._places[place].tolist()
                if name in members:
                    raise DocumentError(f"two members are named {name!r}. Rename or remove one.")
                suffix = name.rpartition(".")[2].lower()
                if suffix in ("txt", "json"):
                    check_row_size(size, self._most)
                is_read = suffix in (*MEDIA_SUFFIXES, "txt", "json")
                file.seek(offset)
                members[name] = file.read(size) if is_read else b""
        return _row_of(members)


def _check_end(path: Path, offset: int) -> None:
    """Raise unless an archive ends where its members do: tarfile takes a cut or damaged one for complete.

    Args:
        path: The archive.
        offset: Where no further member was found.
    """
    with path.open("rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"at byte {offset:,} is neither a member nor the end mark")
        while chunk := file.read(1 << 20):
            if chunk.strip(b"\0"):
                raise tarfile.ReadError(
                    "more follows its end mark, as where archives were put together by cat"
                )


class TarRow(dict[str, object]):
    """The fields of a row, with the files of its key: what it names is one of them.

    Args:
        fields: Those of the ``.json`` and the ``.txt``.
        files: The bytes of its media by the members' names.
    """

    def __init__(self, fields: Mapping[str, object], files: Mapping[str, bytes]) -> None:
        super().__init__(fields)
        self.files = files


def with_own_files(document: Document, row: TarRow) -> tuple[Document, tuple[str, ...]]:
    """The document with the bytes of the files that its row names, whatever its format; never others.

    Returns:
        The document, and what is said of files that no part of it is.

    Raises:
        DocumentError: If a name is that of no file of the row's key.

    Example:
        >>> row = TarRow({}, {"d/1.a.png": b"x"})
        >>> with_own_files(Document((Image("a.png"),)), row)[0].images[0].data
        b'x'
    """
    by_name = {alias: name for name in row.files for alias in _aliases(name)}
    used: set[str | None] = set()

    def own(segment: Segment) -> Segment:
        if not isinstance(segment, Image | Video):
            return segment
        if segment.data is None and segment.path is not None:
            name = by_name.get(_plain(segment.path))
            if name is None:
                raise DocumentError(
                    f"names {orjson.dumps(segment.path[:100]).decode()}, but the row's files are "
                    f"{', '.join(row.files)[:300] or 'none'}. A row in a tar names files of its own key.",
                    kind="medium",
                    field=_field_of(row, segment),
                )
            segment = replace(segment, path=name, data=row.files[name])
        used.add(segment.path)
        return segment

    segments = tuple(map(own, document.segments))
    unused = (UNNAMED,) if row.files.keys() - used else ()
    return (replace(document, segments=segments) if used else document), unused


def _field_of(row: Row, medium: Medium) -> str:
    """The field that names a medium, for messages."""
    for field in _FIELDS:
        if any(name == medium.path for name in _names(row.get(field), is_name=True)):
            return field
    return f"{modality_of(medium)}s"


def _names(value: object, *, is_name: bool) -> Iterator[str]:
    """Every name of a file in a field: what stands alone, in a list, or under a key that is for names."""
    if isinstance(value, str) and is_name:
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _names(one, is_name=is_name)
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _names(one, is_name=key in _NAME_KEYS)


def _row_of(members: Mapping[str, bytes]) -> TarRow:
    row: dict[str, object] = {}
    files: dict[str, bytes] = {}
    key, is_captioned = "", False
    for name, data in members.items():
        match = _MEMBER.fullmatch(name.removeprefix("./"))
        assert match is not None  # the index holds no others
        key, extension = match[1], match[2].lower()
        suffix = extension.rpartition(".")[2]
        if suffix == "json":
            row = {**json_object(data, name), **row}
        elif suffix == "txt":
            if is_captioned:
                raise DocumentError(f"it has two texts, the second is {name!r}. Keep one of them.")
            is_captioned = True
            try:
                row["caption"] = text_of(data, name)
            except DocumentError as error:
                raise error.at(None, extension) from None
        elif suffix in MEDIA_SUFFIXES:
            files[name] = data
        else:
            row[f".{suffix}"] = True  # a field that no format reads, and so is named
    named = {
        one for field in _FIELDS for name in _names(row.get(field), is_name=True) for one in _possible(name)
    }
    # What no part, segment or list names stands in the fields of all formats, in the archive's order.
    free = [name for name in files if not named.intersection(_aliases(name))]
    for singular, plural, is_video in (("image", "images", False), ("video", "videos", True)):
        of_kind = [name for name in free if is_video_name(name) == is_video]
        if not of_kind or row.get(singular) or row.get(plural):
            continue
        found = [{"bytes": files[name], "path": name} for name in of_kind]
        alone = len(found) == 1 and "<trainable_text" not in str(row.get("text"))
        row |= {singular: found[0]} if alone else {plural: found}
    return TarRow({**row, "id": row.get("id") or key}, files)


def _plain(name: str) -> str:
    return name.removeprefix("./")


def _possible(name: str) -> tuple[str, ...]:
    """A name, and of a URL also its last part, by which MMC4 and OBELICS find their files."""
    if "://" in name[:10]:
        return (name, name.partition("?")[0].rpartition("/")[2])
    return (_plain(name),)


def _aliases(name: str) -> tuple[str, ...]:
    """What a row may call a member: its path, a part of it from any folder on, or what follows the key."""
    parts = _plain(name).split("/")
    return (*("/".join(parts[start:]) for start in range(len(parts))), parts[-1].partition(".")[2])
