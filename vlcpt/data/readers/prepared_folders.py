"""Folders that ``vlcpt prepare`` wrote, on a disk or at an address, and the sources that one holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa

from vlcpt.data.documents import DocumentError
from vlcpt.data.readers.storage import default_name
from vlcpt.data.references import shown_url

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
