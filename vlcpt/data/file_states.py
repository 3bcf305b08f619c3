"""Whether a file is still what it was when it was read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


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
