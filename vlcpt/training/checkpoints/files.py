"""A checkpoint's files: a manifest written last, the newest that verifies, older ones deleted."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import xxhash

from vlcpt import __version__
from vlcpt.file_writes import sync, write_file
from vlcpt.run_files import step_of

logger = logging.getLogger(__name__)

MANIFEST = "vlcpt_manifest.json"
# In a folder that is being written, until its manifest is there. What begins with a dot is in no manifest.
UNFINISHED = ".vlcpt_unfinished"
# In output_dir and in no checkpoint: a checkpoint cannot vouch for itself.
RECORD = ".vlcpt_checkpoints.json"
_FORMAT = 1
_THREADS = 8  # xxh3 and reading both let other threads run


class CheckpointError(ValueError):
    """A checkpoint that cannot be used or written: which, what was found and what to do."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Args:
        run: Facts of the run that wrote it, see :mod:`vlcpt.training.checkpoints.identity`.
        files: Size in bytes of each file, by its path inside the folder.
    """

    run: Mapping[str, object]
    files: Mapping[str, int]


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
        folder: That of a checkpoint.
        hashes: Whether to read the files; else only what is there and its size.

    Raises:
        CheckpointError: With what differs; its message starts after the folder's name.

    Example:
        >>> verify(Path("nowhere"))
        Traceback (most recent call last):
        vlcpt.training.checkpoints.files.CheckpointError: there is no such folder
    """
    if not folder.is_dir():
        raise CheckpointError("there is no such folder")
    if is_unfinished(folder):
        raise CheckpointError("its saving was interrupted")
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        digest = content.pop("xxh3_128")
        is_sound = _digest(content) == digest and content["format"] == _FORMAT
        listed = {name: (int(one["size"]), str(one["xxh3_128"])) for name, one in content["files"].items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"it has no {MANIFEST}, so it may be incomplete") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST} is damaged") from error
    if not is_sound:
        raise CheckpointError(f"{MANIFEST} is damaged, or of another version of vlcpt")
    files = _files(folder)
    if missing := sorted(listed.keys() - files.keys()):
        raise CheckpointError(f"{_some(missing)} is missing")
    if more := sorted(files.keys() - listed.keys()):
        raise CheckpointError(f"{_some(more)} was added since it was saved")
    for name, (size, _) in listed.items():
        try:
            found = files[name].stat().st_size
        except OSError as error:  # a link to nowhere, or to itself
            raise CheckpointError(f"{name} cannot be read: {error.strerror}") from error
        if found != size:
            raise CheckpointError(f"{name} has {found:,} bytes where {size:,} were saved")
    if hashes:
        with ThreadPoolExecutor(_THREADS) as pool:
            found_hashes = pool.map(hash_file, [files[name] for name in listed])
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


def _flush_and_hash(path: Path) -> str:
    sync(path)
    return hash_file(path)


def hash_file(path: Path, algorithm: str = "xxh3_128") -> str:
    """The hash of a file's content, in hexadecimal digits.

    Args:
        path: The file.
        algorithm: ``xxh3_128``, or one that hashlib knows.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            made = xxhash.xxh3_128 if algorithm == "xxh3_128" else algorithm
            return hashlib.file_digest(file, made).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error


def _digest(content: Mapping[str, object]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


Check = Callable[[Path, Manifest], None]


def find_checkpoint(
    resume_from_checkpoint: str | bool | None,
    output_dir: str | Path,
    *,
    check: Check | None = None,
    hashes: bool = True,
) -> Path | None:
    """The checkpoint to resume from; None to start a new run.

    Args:
        resume_from_checkpoint: False or None: none. True: the newest in ``output_dir`` that verifies.
            ``"auto"``: the same, and None if there is no checkpoint at all; one whose saving was
            interrupted does not count. Else a checkpoint's folder.
        output_dir: The run's folder.
        check: What else makes a checkpoint unusable; it raises a CheckpointError.
        hashes: Whether to read the files, and to log each checkpoint that is skipped; else only sizes are
            compared.

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
        if reason := why_unusable(folder, check, hashes=hashes):
            raise CheckpointError(
                f"resume_from_checkpoint {folder}: {reason}. Give another checkpoint, or true for the "
                "newest that can be used."
            )
        return folder
    skipped: list[str] = []
    found = list_checkpoints(Path(output_dir))
    for folder in reversed(found):
        reason = why_unusable(folder, check, hashes=hashes)
        if not reason:
            return folder
        skipped.append(f"{folder.name}: {reason}")
        if hashes:
            logger.warning("skipped %s", skipped[-1])
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
        f"{'; '.join(skipped)}. Restore one from a copy, or start afresh with --overwrite."
    )


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The folders ``checkpoint-N``, the oldest first.

    Example:
        >>> list_checkpoints(Path("nowhere"))
        []
    """
    found = [path for path in output_dir.glob("checkpoint-*") if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path) or 0)


def why_unusable(folder: Path, check: Check | None = None, *, hashes: bool = True) -> str:
    """Why a checkpoint cannot be used; empty if it can.

    Example:
        >>> why_unusable(Path("nowhere"))
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
    """Raise where a checkpoint lacks what a resume needs; Trainer would start that afresh, silently.

    Args:
        folder: That of the checkpoint.
        processes: Those of the run.

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
            f"{folder.name} has no {', '.join(missing)}, so it cannot be resumed from: it was saved with "
            "save_only_model, or by something else. Give another one, or start a new run from its weights."
        )
    if engine and (tag := (folder / "latest").read_text("utf-8", "replace").strip()) not in names:
        wrong = f"{folder / 'latest'}: it names {tag[:60]!r}, no folder in this checkpoint. Use another one."
        raise CheckpointError(wrong)


def write_record(output_dir: Path, folder: Path) -> None:
    """Note that this run wrote a checkpoint, with a hash of what in it may be a program.

    SHA-256, because xxh3 of the manifest finds damage but does not withstand someone who makes two
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
    """For every file but safetensors, which hold no program, and of their names."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".safetensors"]
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = list(pool.map(partial(hash_file, algorithm="sha256"), files))
    names = [path.relative_to(folder).as_posix() for path in files]
    return hashlib.sha256(json.dumps(list(zip(names, hashes, strict=True))).encode()).hexdigest()


def _record(output_dir: Path) -> dict[str, str]:
    try:
        found = json.loads((output_dir / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def next_steps(output_dir: Path) -> str:
    """Which checkpoint there is to resume from, and how.

    Example:
        >>> next_steps(Path("nowhere"))  # doctest: +ELLIPSIS
        'There is no complete checkpoint. Lower save_total_limit, and start again with --resume_from_che...'
    """
    sound = [one for one in list_checkpoints(output_dir) if not why_unusable(one, hashes=False)]
    return (
        f"{f'{sound[-1].name} is complete' if sound else 'There is no complete checkpoint'}. Lower "
        "save_total_limit, and start again with --resume_from_checkpoint auto."
    )


def flush_of_rank(folder: Path, rank: int) -> None:
    """Flush what a rank has written; rank 0 flushes all, but may be on another machine."""
    for pattern in (f"*rank_{rank}_*", f"rng_state_{rank}.pth") if rank else ():
        for path in folder.rglob(pattern):
            sync(path)


def rotate(output_dir: Path, limit: int | None, *, newest: Path, best: Path | None) -> None:
    """Delete the oldest checkpoints until ``limit`` are left; never the newest nor the best.

    An incomplete one does not count, and is deleted. Checkpoints of later steps than the newest are of a run
    that was given up, so they are older.

    Args:
        output_dir: The run's folder.
        limit: As ``save_total_limit``; None or less than 1: nothing is deleted.
        newest: The one just written.
        best: The one with the best metric so far.
    """
    if not limit or limit < 1:
        return
    found = list_checkpoints(output_dir)
    place = [one.name for one in found].index(newest.name)
    kept = {newest.name} | ({best.name} if best else set())
    others = [one for one in [*found[place + 1 :], *found[:place]] if one.name not in kept]
    broken = [one for one in others if why_unusable(one, hashes=False)]
    sound = [one for one in others if one not in broken]
    excess = max(0, len(sound) + len(kept) - limit)
    for one in [*broken, *sound[:excess]]:
        delete_checkpoint(one)


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint so that it is none from the first moment on: one rename takes its name away."""
    if folder.is_symlink():  # what it leads to belongs to someone else
        folder.unlink()
        return
    doomed = folder.with_name(f".{folder.name}.deleted")
    if doomed.exists():
        shutil.rmtree(doomed)
    folder.rename(doomed)
    sync(doomed.parent)
    shutil.rmtree(doomed)


def finish_deletions(output_dir: Path) -> None:
    """Delete what a run that was killed had begun to delete.

    Example:
        >>> finish_deletions(Path("nowhere"))
    """
    for folder in output_dir.glob(".checkpoint-*.deleted"):
        shutil.rmtree(folder)
