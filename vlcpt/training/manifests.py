"""The manifest of a checkpoint: written last, so that a checkpoint is whole or is none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from vlcpt import __version__
from vlcpt.file_writes import sync, write_file

MANIFEST = "vlcpt_manifest.json"
# In a folder that is being written, until its manifest is there. What begins with a dot is in no manifest.
UNFINISHED = ".vlcpt_unfinished"
_FORMAT = 1
_BLOCK = 4 * 2**20  # bytes read at a time
_THREADS = 8  # xxh3 and reading both let other threads run


class CheckpointError(ValueError):
    """A checkpoint that cannot be used or written: which, what was found and what to do."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Args:
        run: Facts of the run that wrote it, see :mod:`vlcpt.training.identity`.
        files: Size in bytes of each file, by its path inside the folder.
    """

    run: Mapping[str, object]
    files: Mapping[str, int]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


def write_manifest(folder: Path, run: Mapping[str, object]) -> Manifest:
    """Flush every file of a folder to disk, and then write what they are.

    Sizes and xxh3 hashes (128 bits) are computed in parallel threads. The manifest appears by a rename, when
    all else is on disk.

    Raises:
        OSError: If the disk is full or a file cannot be read.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp())
        >>> _ = (folder / "weights").write_bytes(b"1234")
        >>> _ = write_manifest(folder, {"seed": 42})
        >>> dict(verify(folder).files)
        {'weights': 4}
    """
    files = _files(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = list(pool.map(_flush_and_hash, files.values()))
    for inner in {file.parent for file in files.values()} | {folder}:
        sync(inner)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    content: dict[str, object] = {
        "format": _FORMAT,
        "vlcpt": __version__,
        "run": dict(run),
        "files": {
            name: {"size": size, "xxh3_128": digest}
            for (name, size), digest in zip(sizes.items(), hashes, strict=True)
        },
    }
    digest = _digest(content)
    write_file(folder / MANIFEST, json.dumps({**content, "xxh3_128": digest}, indent=1))
    (folder / UNFINISHED).unlink(missing_ok=True)
    sync(folder.parent)
    return Manifest(run, sizes)


def verify(folder: Path, *, hashes: bool = True) -> Manifest:
    """Compare a folder with its manifest.

    Args:
        folder: Of a checkpoint.
        hashes: Whether to read the files; else only what is there and its size.

    Raises:
        CheckpointError: With what differs; its message starts after the folder's name.

    Example:
        >>> verify(Path("nowhere"))
        Traceback (most recent call last):
        vlcpt.training.manifests.CheckpointError: there is no such folder
    """
    if not folder.is_dir():
        raise CheckpointError("there is no such folder")
    if is_unfinished(folder):
        raise CheckpointError("its saving was interrupted")
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        digest = content.pop("xxh3_128")
        whole = _digest(content) == digest and content["format"] == _FORMAT
        listed = {name: (int(one["size"]), str(one["xxh3_128"])) for name, one in content["files"].items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"it has no {MANIFEST}, so it may not be whole") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST} is damaged") from error
    if not whole:
        raise CheckpointError(f"{MANIFEST} is damaged, or of another version of vlcpt")
    files = _files(folder)
    if missing := sorted(listed.keys() - files.keys()):
        raise CheckpointError(f"{_some(missing)} is missing")
    if more := sorted(files.keys() - listed.keys()):
        raise CheckpointError(f"{_some(more)} was added since it was saved")
    for name, (size, _) in listed.items():
        if (found := _size(files[name])) != size:
            raise CheckpointError(f"{name} has {found:,} bytes where {size:,} were saved")
    if hashes:
        with ThreadPoolExecutor(_THREADS) as pool:
            found_hashes = pool.map(_hash, [files[name] for name in listed])
            for (name, (_, saved)), found_hash in zip(listed.items(), found_hashes, strict=True):
                if found_hash != saved:
                    raise CheckpointError(f"the content of {name} is not what was saved")
    return Manifest(content["run"], {name: size for name, (size, _) in listed.items()})


def is_unfinished(folder: Path) -> bool:
    """Whether a folder was being written when its run ended: then it is no checkpoint at all."""
    return (folder / UNFINISHED).is_file() and not (folder / MANIFEST).exists()


def _files(folder: Path) -> dict[str, Path]:
    """All files inside, in order, by path; not the manifest, nor what begins with a dot."""
    found = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if not path.is_dir() or path.is_symlink()
    }
    return {name: path for name, path in found.items() if name != MANIFEST and not path.name.startswith(".")}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:  # a link to nowhere, or to itself
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error


def _flush_and_hash(path: Path) -> str:
    sync(path)
    return _hash(path)


def _hash(path: Path) -> str:
    found = xxhash.xxh3_128()
    block = memoryview(bytearray(_BLOCK))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                found.update(block[:count])
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error
    return found.hexdigest()


def _digest(content: Mapping[str, object]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
