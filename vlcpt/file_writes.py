"""Files are written in full or not at all; one message says what prevents that."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

# The errors of a disk that is full.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# torch writes its files from C++, and names neither the file nor the number of the error.
_TORCH = re.compile(r"inline_container\.cc|PytorchStreamWriter|iostream error|file write failed")
# As Rust's libraries, shutil's lists and torch's shared memory write it.
_NUMBER = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]|unable to (?:resize|allocate)[^\n]*\((\d+)\)")
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")
_HINTS = {
    errno.EFBIG: " (of ulimit -f, or of the file system)",
    errno.EEXIST: " (in the place of its folder)",
}


class WriteError(OSError):
    """What could not be written and why, with its path, what it takes and what is free."""


@dataclass(frozen=True)
class Refusal:
    """Why something could not be written.

    Args:
        reason: In the system's words.
        is_full: Whether room would help.
    """

    reason: str
    is_full: bool


@dataclass
class Writing:
    """A block that writes, itself or through a library: what prevents that becomes a :class:`WriteError`.

    Args:
        path: The file or folder that is written.
        what: What it is, for the message; empty where the path says it.
        needed: Bytes that it takes; None where that is not known.
        todo: What else to do, besides to make room or to choose another place.
        reads: Whether the block also reads files: then an error counts that no reader meets, or that names
            something in ``path``.

    Raises:
        WriteError: For what the system, torch, safetensors, tokenizers or Arrow say of a full disk, a used
            up quota, a limit on the size of files, or a place that cannot be written. All else passes.

    Example:
        >>> with Writing(Path("/dev/full"), "a test", needed=3):  # doctest: +ELLIPSIS
        ...     _ = Path("/dev/full").write_text("abc")
        Traceback (most recent call last):
        vlcpt.file_writes.WriteError: /dev/full (a test) could not be written: No space left on device. It ...
    """

    path: Path
    what: str = ""
    _: KW_ONLY
    needed: int | None = None
    todo: str | None = None
    reads: bool = False

    def require_room(self) -> None:
        """Raise where ``needed`` is more than is free, before anything is written.

        Raises:
            WriteError: With both.
        """
        assert self.needed is not None
        if free_bytes(self.path) < self.needed:
            raise self.error(Refusal("there is too little room", is_full=True))

    def error(self, found: Refusal) -> WriteError:
        """The one error about something that could not be written."""
        name = f"{self.path} ({self.what})" if self.what else str(self.path)
        size = "" if self.needed is None else f"It takes about {human_size(self.needed)}, and "
        place = "Make room, or choose a place on another disk." if found.is_full else "Choose another place."
        return WriteError(
            f"{name} could not be written: {found.reason}. {size}{human_size(free_bytes(self.path))} are "
            f"free there. {place}{f' {self.todo}' if self.todo else ''}"
        )

    def refused(self, error: BaseException) -> WriteError | None:
        """What prevented a write, as the one error; None for an error about something else."""
        found = refusal(error, self.path, reads=self.reads)
        return None if found is None else self.error(found)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, WriteError) and (found := self.refused(error)):
            raise found from error


def refusal(error: BaseException, path: Path, *, reads: bool = False) -> Refusal | None:
    """Why something could not be written; None if the error is about something else.

    Args:
        error: Itself, or what it was raised from.
        path: That of what was written.
        reads: See :class:`Writing`.

    Example:
        >>> refusal(OSError(errno.EDQUOT, ""), Path("a")).reason, refusal(KeyError("a"), Path("a"))
        ('Disk quota exceeded', None)
        >>> refusal(Exception("No space left on device (os error 28)"), Path("a")).is_full
        True
    """
    seen: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in seen:
        # Libraries raise errors of their own about it, when they also read.
        if (found := _one_refusal(one, path, reads=reads or one is not error)) is not None:
            return found
        seen.append(one)
        one = one.__cause__ or one.__context__
    return None


def _one_refusal(error: BaseException, path: Path, *, reads: bool) -> Refusal | None:
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _NUMBER.search(str(error))):
        number = int(found[1] or found[2] or found[3])
    if number is None:
        if isinstance(error, RuntimeError) and _TORCH.search(str(error)):
            return Refusal("the disk took only a part of it", is_full=True)
        return None
    is_full = number in _NO_ROOM
    is_ours = isinstance(error, OSError) and (not reads or _is_inside(error, path))
    if not is_full and number != errno.EROFS and not is_ours:
        return None
    hint = _HINTS.get(number, "")
    if number == errno.ENOSPC and not _free_names(path):
        hint = " (for one more file, however small: its file system has no free inode)"
    return Refusal(os.strerror(number) + hint, is_full)


def write_file(
    path: Path,
    content: str | bytes | Sequence[bytes | memoryview],
    what: str = "",
    *,
    todo: str | None = None,
    flush: bool = True,
) -> None:
    """Write a file so that it is complete and on the disk, or as it was before. Its folder is made.

    Args:
        path: That of the file.
        content: All of it, or its parts.
        what: What it is, for the message; empty where the path says it.
        todo: What else to do where it cannot be written.
        flush: Whether to wait for the disk. Without, a machine that stops may leave a file of this name with
            other content, so who reads it must be able to tell.

    Raises:
        WriteError: If it cannot be written; nothing is left of it then.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_file(Path(folder, "new/a.txt"), "abc")
        ...     [path.name for path in Path(folder, "new").iterdir()]
        ['a.txt']
    """
    # A lone surrogate, of a file's name say, is written as JSON writes it.
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    parts = [data] if isinstance(data, bytes) else data
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")  # two may write to one name
    with Writing(path, what, needed=sum(map(len, parts)), todo=todo):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.writelines(parts)
                file.flush()
                if flush:
                    os.fsync(file.fileno())  # a network's file system may say only now that it is full
            partial.replace(path)
            if flush:
                sync(path.parent)
        finally:
            remove(partial)


def append_lines(path: Path, text: str, what: str = "", *, todo: str | None = None) -> None:
    """Add lines to a file, all of them or none. Its folder is made.

    Raises:
        WriteError: If they cannot be written; the file is as it was then.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     append_lines(Path(folder, "a.txt"), "abc")
        ...     append_lines(Path(folder, "a.txt"), "def")
        ...     Path(folder, "a.txt").read_text()
        'abcdef'
    """
    data = text.encode(errors="backslashreplace")
    with Writing(path, what, needed=len(data), todo=todo):
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab", buffering=0) as file:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(file.fileno(), rest) :]
        except OSError:
            if path.is_file():
                os.truncate(path, before)
            raise


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file if it is there and can be deleted: a failure here must not hide the one before it."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


def free_bytes(path: Path) -> int:
    """What is free for this user where a file or folder is, or would be.

    Example:
        >>> free_bytes(Path("no/such/file")) > 0
        True
    """
    return shutil.disk_usage(_existing(path)).free


def human_size(count: int) -> str:
    """Bytes, as people read them.

    Example:
        >>> human_size(999), human_size(12_345), human_size(15_200_000_000), human_size(10**18)
        ('999 bytes', '12.3 kB', '15.2 GB', '1,000.0 PB')
    """
    size, unit = float(count), 0
    while size >= 999.95 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:,.1f} {_UNITS[unit]}" if unit else f"{count} bytes"


def _is_inside(error: OSError, path: Path) -> bool:
    """Whether an error names something in a folder, and is not only that it is missing."""
    named = error.filename2 or error.filename
    return isinstance(named, str) and error.errno != errno.ENOENT and Path(named).is_relative_to(path)


def _existing(path: Path) -> Path:
    place = path.absolute()
    while not os.path.isdir(place) and place != place.parent:  # of a name too long, Path would raise
        place = place.parent
    return place


def _free_names(path: Path) -> bool:
    """Whether the file system can take another file; some do not count them, and say 0 of 0."""
    found = os.statvfs(_existing(path))
    return not found.f_files or found.f_favail > 0


def write_json(path: Path, content: Mapping[str, object], what: str = "", *, todo: str | None = None) -> None:
    """Write a JSON file completely or not at all; a number that JSON does not have becomes null.

    Args:
        what, todo: What it is and what to do, for the message of a :class:`vlcpt.file_writes.WriteError`.
    """
    write_file(path, json_text(content), what, todo=todo)


def json_text(content: Mapping[str, object], *, ensure_ascii: bool = False) -> str:
    """The text of a JSON file; a number that JSON does not have becomes null.

    Example:
        >>> json_text({"loss": float("nan")})
        '{\\n  "loss": null\\n}\\n'
    """
    return json.dumps(_finite(content), indent=2, ensure_ascii=ensure_ascii, allow_nan=False) + "\n"


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
