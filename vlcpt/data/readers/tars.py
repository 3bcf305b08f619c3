"""Rows of a WebDataset tar: members with the same key, such as ``0001.jpg`` and ``0001.txt``, are one row."""

from __future__ import annotations

import logging
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import orjson

from vlcpt.data.documents import DocumentError, Source
from vlcpt.data.file_states import FileState, file_state
from vlcpt.data.readers.encodings import text_of
from vlcpt.data.readers.fields import Row
from vlcpt.data.readers.rows import json_object

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
VIDEO_SUFFIXES = ("mp4", "mov", "webm", "mkv", "avi")

# The key is the path up to the first dot of the file's name, as in WebDataset; hidden files have none.
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")


class TarRows:
    """A tar by an index of its members: random access, memory for the index and one row.

    A row has the fields of the ``.json``, ``caption`` from the ``.txt``, and ``image`` or ``images``
    (``video`` or ``videos``) with the bytes. Where the ``.json`` lists media itself, it names members.

    Args:
        path: The file, without compression.
        name: What messages call it.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self._path = path
        self._name = name or str(path)
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

    def source(self, number: int) -> Source:
        return Source(self._name, number + 1)

    def state(self) -> FileState:
        """What tells whether they changed."""
        return file_state(self._name)

    def row(self, number: int) -> Row:
        members: dict[str, bytes] = {}
        with self._path.open("rb") as file:
            for place in range(int(self._starts[number]), int(self._starts[number + 1])):
                start = int(self._name_ends[place - 1]) if place else 0
                name = self._names[start : int(self._name_ends[place])].decode()
                offset, size = self._places[place].tolist()
                suffix = name.rpartition(".")[2].lower()
                if name in members:
                    raise DocumentError(f"two members are named {name!r}. Rename or remove one.")
                if suffix in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, "txt", "json"):
                    file.seek(offset)
                    members[name] = file.read(size)
        return _row_of(members)


def _check_end(path: Path, offset: int) -> None:
    """Raise unless an archive ends where its members do: tarfile takes a cut or damaged one for whole.

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


def _row_of(members: Mapping[str, bytes]) -> Row:
    row: dict[str, object] = {}
    images: dict[str, object] = {}
    videos: dict[str, object] = {}
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
        else:
            (images if suffix in IMAGE_SUFFIXES else videos)[name] = {"bytes": data, "path": name}
    _put_media(row, images, "image", "images")
    _put_media(row, videos, "video", "videos")
    return {**row, "id": row.get("id") or key}


def _put_media(row: dict[str, object], found: dict[str, object], singular: str, plural: str) -> None:
    """Bytes into the fields: under the names that the JSON gives, or all in the archive's order."""
    named = next((field for field in (plural, singular) if row.get(field)), None)
    if named is None:
        if found:
            row.update(
                {singular: next(iter(found.values()))} if len(found) == 1 else {plural: [*found.values()]}
            )
        return
    references = row[named]
    is_list = isinstance(references, list)
    by_name = {alias: medium for name, medium in found.items() for alias in _aliases(name)}
    filled = []
    for reference in references if isinstance(references, list) else [references]:
        if not isinstance(reference, str) or reference not in by_name:
            shown = orjson.dumps(reference).decode()[:100]
            raise DocumentError(
                f"names {shown}, but the row's files are {', '.join(found) or 'none'}.",
                kind="reference",
                field=named,
            )
        filled.append(by_name[reference])
    row[named] = filled if is_list else filled[0]


def _aliases(name: str) -> tuple[str, str, str]:
    """What a JSON may call a member: its path, its file name, or what follows the key."""
    base = name.rpartition("/")[2]
    return name, base, base.partition(".")[2]
