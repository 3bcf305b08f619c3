"""One process at a time writes into a folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from vlcpt.errors import ConfigError
from vlcpt.file_writes import Refusal, Writing, refusal

logger = logging.getLogger(__name__)

LOCK = ".vlcpt.lock"
_TRIES, _PAUSE = 6, 0.1  # another process may just be looking at the lock, or letting go of it
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

# What this process holds. Processes that it forks have another number, and hold nothing.
_held: set[tuple[int, str]] = set()


@contextmanager
def hold(
    folder: Path, name: str = "output_dir", *, shown: Path | None = None, waits: bool = False
) -> Iterator[None]:
    """Be the only process that writes into a folder, which is made if it is not there.

    A process that has the folder may take it again. One that was killed has let go of it. Where the file
    system has no locks, a warning says so.

    Args:
        folder: The folder.
        name: What it is called in the message.
        shown: The folder that the message names, where that is another.
        waits: Whether to wait for a process that holds it.

    Raises:
        ConfigError: If another process holds it, with its number and host, or it cannot be written.
        WriteError: If the disk is full.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with hold(Path(folder)):
        ...         print(holder(Path(folder)), [one.name for one in Path(folder).iterdir()])
        ...     print(any(Path(folder).iterdir()))
        None ['.vlcpt.lock']
        False
    """
    key = (os.getpid(), str(folder.resolve()))
    if key in _held:
        yield
        return
    is_new = not folder.exists()
    descriptor = _take(folder, f"{name} {shown or folder}", waits=waits)
    _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)
        if descriptor is not None:
            _let_go(folder / LOCK, descriptor)
        if is_new:
            with suppress(OSError):  # something was written into it
                folder.rmdir()


def holder(folder: Path) -> str | None:
    """Which other process holds a folder; None if none does, or none that can be known.

    Example:
        >>> holder(Path("no/such/folder")) is None
        True
    """
    path = folder / LOCK
    # Closing any descriptor of a file ends this process's own locks on it.
    if (os.getpid(), str(folder.resolve())) in _held:
        return None
    with suppress(OSError), path.open("rb+") as file:
        try:
            _lock(file.fileno())
        except (BlockingIOError, PermissionError):
            return _described(path)
    return None


def is_abandoned(folder: Path) -> bool:
    """Whether who held a folder has ended without letting go, as one that is killed does.

    Where no lock is left, or the file system has none, that cannot be known, and the answer is no.

    Example:
        >>> is_abandoned(Path("no/such/folder"))
        False
    """
    path = folder / LOCK
    # Closing any descriptor of a file ends this process's own locks on it.
    if (os.getpid(), str(folder.resolve())) in _held:
        return False
    # A shared lock, so that the run of another user can be looked at, who may read it and no more.
    with suppress(OSError), path.open("rb") as file:
        _lock(file.fileno(), fcntl.LOCK_SH)
        return _is_at(path, file.fileno())
    return False


def staging_folder(output: Path) -> Path:
    """Where a merge works that will become ``output``: beside it, and locked, for both may not exist.

    Example:
        >>> staging_folder(Path("runs/merged"))
        PosixPath('runs/.merged.vlcpt-merge')
    """
    return output.parent / f".{output.name}.vlcpt-merge"


def require_free(folder: Path, name: str = "output_dir", *, shown: Path | None = None) -> None:
    """Raise if another process writes into a folder, or none could; nothing is made or taken.

    Raises:
        ConfigError: With the other process's number and host, or the place that cannot be written.

    Example:
        >>> require_free(Path("no/such/folder"))
    """
    if (other := holder(folder)) is not None:
        raise _in_use(f"{name} {shown or folder}", other)
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise _unusable(f"{name} {shown or folder}", f"{place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise _unusable(f"{name} {shown or folder}", f"{place} is read-only, or another user's")


def require_new(output: Path) -> None:
    """Raise if there is anything at the place of a folder that a merge is to make.

    Raises:
        ConfigError: With what to do.

    Example:
        >>> require_new(Path("no/such/folder"))
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} exists and is not empty. Give a new folder for the merged model.")


def _in_use(named: str, other: str) -> ConfigError:
    return ConfigError(
        f"{named} is in use by {other}, which writes into it. Wait until that has ended, stop it, "
        "or give another folder."
    )


def _unusable(named: str, reason: str) -> ConfigError:
    return ConfigError(f"{named} cannot be written: {reason}. Give another folder.")


def _open(folder: Path, named: str) -> int | None:
    """The descriptor of the file to lock; None where the folder is deleted by the process that had made it.

    Raises:
        ConfigError: If nothing can be written there.
        WriteError: If the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A link would be followed, and what it leads to emptied.
        return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except FileNotFoundError:
        return None
    except OSError as error:
        found = refusal(error, folder)
        if found is None or found.is_full:
            raise Writing(folder).error(found or Refusal(str(error), is_full=False)) from error
        raise _unusable(named, found.reason) from error


def _take(folder: Path, named: str, *, waits: bool) -> int | None:
    """The descriptor of the locked file; None where the file system has no locks."""
    path = folder / LOCK
    for _ in count() if waits else range(_TRIES):
        if (descriptor := _open(folder, named)) is None:
            continue
        try:
            _lock(descriptor)
            if _is_at(path, descriptor):
                os.truncate(descriptor, 0)
                with suppress(OSError):  # a full disk: the lock holds without a name
                    os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
                return descriptor
        except (BlockingIOError, PermissionError):
            time.sleep(_PAUSE)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                "%s: its file system has no locks (%s), so a second run in it would not be noticed. "
                "Give each run a folder of its own.",
                named,
                error.strerror,
            )
            return None
        os.close(descriptor)
    raise _in_use(named, _described(path))


def _let_go(path: Path, descriptor: int) -> None:
    """Delete the file while it is locked, so that nobody can lock one that has no name any more."""
    with suppress(OSError):
        if _is_at(path, descriptor):
            path.unlink()
    os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether a file that is open still has its name: who held it before may have deleted it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _described(path: Path) -> str:
    try:
        process, host = path.read_text("utf-8").split()
    except (OSError, ValueError):  # it has only just taken it, or is on a system where it cannot be read
        return "another process"
    return f"process {process} on host {host}"


def _lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> None:
    # Not flock: a forked worker of a loader would inherit that, and hold the folder after a run that
    # was killed. These locks are one process's alone, and reach other machines over NFS.
    fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
