"""Which checkpoints this run wrote: DeepSpeed's are pickles, and a pickle is a program."""

from __future__ import annotations

import json
from pathlib import Path

from vlcpt.training.manifests import CheckpointError, write_whole

# In output_dir and in no checkpoint: a checkpoint cannot vouch for itself.
RECORD = ".vlcpt_checkpoints.json"


def write_record(output_dir: Path, name: str, digest: str) -> None:
    """Note that this run wrote a checkpoint, with the digest of its manifest.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp())
        >>> write_record(folder, "checkpoint-2", "0f3a")
        >>> require_own(folder, folder / "checkpoint-2", "0f3a")
    """
    known = {name: one for name, one in _record(output_dir).items() if (output_dir / name).is_dir()}
    write_whole(output_dir / RECORD, {**known, name: digest})


def require_own(output_dir: Path, folder: Path, digest: str) -> None:
    """Raise unless a checkpoint is in the run's own folder and as the run wrote it.

    Raises:
        CheckpointError: That names ``--trust_checkpoint``.
    """
    is_inside = folder.resolve().parent == output_dir.resolve()
    if not is_inside or _record(output_dir).get(folder.name) != digest:
        raise CheckpointError(
            "this run did not write it, and DeepSpeed would run code that its files may hold. "
            "If you trust who wrote it, add --trust_checkpoint true"
        )


def _record(output_dir: Path) -> dict[str, str]:
    try:
        found = json.loads((output_dir / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
