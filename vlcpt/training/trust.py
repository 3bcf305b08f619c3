"""Which checkpoints this run wrote: DeepSpeed's are pickles, and a pickle is a program."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vlcpt.file_writes import write_file
from vlcpt.training.manifests import CheckpointError

# In output_dir and in no checkpoint: a checkpoint cannot vouch for itself.
RECORD = ".vlcpt_checkpoints.json"
_THREADS = 8


def write_record(output_dir: Path, folder: Path) -> None:
    """Note that this run wrote a checkpoint, with a hash of what in it may be a program.

    SHA-256, because xxh3 of the manifest finds damage but does not withstand somebody who wants two
    files to look alike.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp()) / "checkpoint-2"
        >>> folder.mkdir()
        >>> write_record(folder.parent, folder)
        >>> require_own(folder.parent, folder)
    """
    known = {name: one for name, one in _record(output_dir).items() if (output_dir / name).is_dir()}
    text = json.dumps({**known, folder.name: _sha256(folder)}, indent=1)
    write_file(output_dir / RECORD, text, "which checkpoints this run wrote")


def require_own(output_dir: Path, folder: Path) -> None:
    """Raise unless a checkpoint is in the run's own folder and as the run wrote it.

    Raises:
        CheckpointError: That names ``--trust_checkpoint``.
    """
    is_inside = folder.resolve().parent == output_dir.resolve()
    if not is_inside or _record(output_dir).get(folder.name) != _sha256(folder):
        raise CheckpointError(
            "this run did not write it, and DeepSpeed would run code that its files may hold. "
            "If you trust who wrote it, add --trust_checkpoint true"
        )


def _sha256(folder: Path) -> str:
    """Of every file but safetensors, which hold no program, and of their names."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".safetensors"]
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = list(pool.map(_file_digest, files))
    names = [path.relative_to(folder).as_posix() for path in files]
    return hashlib.sha256(json.dumps(list(zip(names, hashes, strict=True))).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record(output_dir: Path) -> dict[str, str]:
    try:
        found = json.loads((output_dir / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
