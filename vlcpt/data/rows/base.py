"""What every storage of rows answers by a row's number, and what tells whether a file changed."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from vlcpt.data.documents import Document, DocumentError, Source
from vlcpt.data.rows.fields import Row

MAX_ROW_BYTES = 256 * 2**20
"""The default of ``max_row_bytes``: a row takes several times its bytes in memory, in each worker."""


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


class Rows(ABC):
    """Rows by number: a file, a folder, or memory.

    Args:
        name: What messages call them; for a file its path, before it was unpacked.
        max_row_bytes: A larger row is refused, where rows are read one by one; tables are read by groups.
    """

    has_columns = False
    """Whether columns can be left unread: see :meth:`only`."""

    def __init__(self, name: str, max_row_bytes: int = MAX_ROW_BYTES) -> None:
        self._name = name
        self._most = max_row_bytes

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

    def only(self, columns: Iterable[str]) -> Rows:
        """The same rows; of tables, these columns alone."""
        return self

    def media_root(self, number: int) -> str | None:
        """Where the media of a row start; None: where those of all rows do."""
        return None

    def left_out(self) -> Mapping[str, int]:
        """Files that lie with them and are not read, by what they are."""
        return {}


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


def check_names(path: str, names: list[str]) -> None:
    """Raise if two columns have one name: only one of them would be read."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DocumentError(
            f"two columns are named {twice[0][:100]!r}. Rename or remove one.", kind="source", field=path
        )
