"""Which checkpoint a run goes on from: the newest that verifies, and never none without saying so."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

from vlcpt.training.manifests import CheckpointError, Manifest, is_unfinished, verify

logger = logging.getLogger(__name__)

Check = Callable[[Path, Manifest], None]


def find_checkpoint(
    resume_from_checkpoint: str | bool | None,
    output_dir: str | Path,
    *,
    check: Check | None = None,
    hashes: bool = True,
    tell: Callable[[str], None] = logger.warning,
) -> Path | None:
    """The checkpoint to go on from; None to start fresh.

    Args:
        resume_from_checkpoint: False or None: fresh. True: the newest in ``output_dir`` that verifies.
            ``"auto"``: the same, and fresh if there is no checkpoint at all; one whose saving was
            interrupted is none. Else a checkpoint's folder.
        output_dir: The run's folder.
        check: What else makes a checkpoint unusable; it raises a CheckpointError.
        hashes: Whether to read the files, or to compare only their sizes.
        tell: Gets a message for each checkpoint that is passed over.

    Raises:
        CheckpointError: If a checkpoint was asked for and none can be used, with the reason for each.

    Example:
        >>> find_checkpoint(False, "anywhere") is None
        True
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint not in (True, "auto"):
        folder = Path(str(resume_from_checkpoint))
        if reason := fault(folder, check, hashes=hashes):
            raise CheckpointError(
                f"resume_from_checkpoint {folder}: {reason}. Give another checkpoint, or true for the "
                "newest that can be used."
            )
        return folder
    passed: list[str] = []
    found = list_checkpoints(Path(output_dir))
    for folder in reversed(found):
        reason = fault(folder, check, hashes=hashes)
        if not reason:
            return folder
        passed.append(f"{folder.name}: {reason}")
        tell(f"passed over {passed[-1]}")
    if all(is_unfinished(folder) for folder in found):
        if resume_from_checkpoint == "auto":
            return None
        raise CheckpointError(
            f"resume_from_checkpoint is true but {output_dir} holds no checkpoint"
            f"{' that was saved to its end' if found else ''}. "
            "Give the folder of one, or 'auto' to start fresh where there is none."
        )
    raise CheckpointError(
        f"none of the checkpoints in {output_dir} can be used, and a fresh start would write over them: "
        f"{'; '.join(passed)}. Restore one from a copy, or start afresh with --overwrite."
    )


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The folders ``checkpoint-N``, the oldest first.

    Example:
        >>> list_checkpoints(Path("nowhere"))
        []
    """
    if not output_dir.is_dir():
        return []
    found = {
        int(path.name.rpartition("-")[2]): path
        for path in output_dir.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-(0|[1-9][0-9]*)", path.name) and path.is_dir()
    }
    return [found[step] for step in sorted(found)]


def fault(folder: Path, check: Check | None = None, *, hashes: bool = True) -> str:
    """Why a checkpoint cannot be used; empty if it can.

    Example:
        >>> fault(Path("nowhere"))
        'there is no such folder'
    """
    try:
        manifest = verify(folder, hashes=hashes)
        if check:
            check(folder, manifest)
    except CheckpointError as error:
        return str(error)
    return ""


def require_states(folder: Path, processes: int) -> None:
    """Raise where a checkpoint lacks what is needed to go on; Trainer would start that anew, silently.

    Args:
        folder: Of the checkpoint.
        processes: Of the run.

    Raises:
        CheckpointError: With the files that are missing.
    """
    names = {path.name for path in folder.iterdir()}
    engine = any(name.startswith("global_step") for name in names)
    needed = ["trainer_state.json", *(["latest"] if engine else ["optimizer.pt", "scheduler.pt"])]
    if not any(name.startswith("rng_state") for name in names):
        needed.append("rng_state.pth" if processes == 1 else "rng_state_0.pth")
    if missing := [name for name in needed if name not in names]:
        raise CheckpointError(
            f"{folder.name} has no {', '.join(missing)}, so it cannot be gone on from: it was saved with "
            "save_only_model, or by something else. Give another one, or start a new run from its weights."
        )
