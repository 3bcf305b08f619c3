"""The folder of a run: free before it starts; after it checkpoints by step, settings, what was done."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from vlcpt.errors import ConfigError
from vlcpt.folder_locks import LOCK, is_abandoned

RESOLVED_HEADER = (
    "# The resolved configuration of a run. Paths start at this file. To repeat: --output_dir NEW\n"
)
# What stands beside a run's result: a model card is made of it.
FACTS = "run.json"  # how it was started, what trained where, how it ended
PAGE = "report.html"  # made of the others, so that it need not be copied
RECORD = ("config.yaml", "ledger.json", "dropped.jsonl", "train_log.jsonl", FACTS, "eval.json")
PLANS = "plan"  # the folder in which planning is shared and kept; it can be deleted at any time
# What a check leaves, and a run that was stopped before it trained; the lock is that of the run itself.
NO_RUN = ("ledger.json", "dropped.jsonl", "check", PLANS, LOCK, FACTS, PAGE)


def step_of(folder: Path) -> int | None:
    """The step that a checkpoint's name gives; None where the name is another.

    Example:
        >>> step_of(Path("out/checkpoint-20")), step_of(Path("out/checkpoint-copy"))
        (20, None)
    """
    found = re.fullmatch(r"checkpoint-(0|[1-9][0-9]*)", folder.name)
    return int(found[1]) if found else None


def record_of(checkpoint: Path) -> tuple[Path, int | None]:
    """The folder of a run's record, and the step at which the record ends for a checkpoint of the run.

    Example:
        >>> record_of(Path("out/checkpoint-20")), record_of(Path("out"))
        ((PosixPath('out'), 20), (PosixPath('out'), None))
    """
    step = step_of(checkpoint)
    is_inner = step is not None and not (checkpoint / "config.yaml").is_file()
    return checkpoint.parent if is_inner else checkpoint, step


def read_mapping(path: Path) -> dict[str, object]:
    """What a JSON or YAML file holds if that is a mapping; empty if it holds something else or is not there.

    Example:
        >>> read_mapping(Path("nowhere/config.yaml"))
        {}
    """
    try:
        text = path.read_text("utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def is_killed(folder: Path, facts: Mapping[str, object]) -> bool:
    """Whether a run that says it is running has no process left; False where that cannot be known.

    Args:
        facts: What its ``run.json`` holds.

    Example:
        >>> is_killed(Path("no/such/run"), {"state": "running"})
        False
    """
    return facts.get("state") == "running" and is_abandoned(folder)


def run_settings(checkpoint: Path) -> Iterator[tuple[Path, dict[str, object]]]:
    """The settings in a config.yaml in or above a checkpoint, each with the folder of the file.

    Example:
        >>> list(run_settings(Path("/none/checkpoint-2")))
        []
    """
    for folder in (checkpoint, checkpoint.parent):
        if settings := read_mapping(folder / "config.yaml"):
            yield folder, settings


def read_log(folder: Path, last: int | None = None) -> Iterator[tuple[str, dict[str, object]]]:
    """The lines of a run's ``train_log.jsonl`` and what they say; lines that a crash has cut are left out.

    Args:
        folder: The run's folder.
        last: The last step whose lines are given; None: all of them.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp())
        >>> _ = (folder / "train_log.jsonl").write_text('{"step": 1}\\n{"step": 2}\\n{"ste')
        >>> [entry["step"] for _, entry in read_log(folder)]
        [1, 2]
    """
    try:
        lines = (folder / "train_log.jsonl").read_text("utf-8", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        step = entry.get("step") if isinstance(entry, dict) else None
        if isinstance(step, int) and (last is None or step <= last):
            yield line, entry


def asks_to_resume(resume_from_checkpoint: object) -> bool:
    """Whether a value of ``resume_from_checkpoint`` asks to continue a run.

    Example:
        >>> asks_to_resume("auto"), asks_to_resume("false"), asks_to_resume(None)
        (True, False, False)
    """
    return resume_from_checkpoint not in (None, False, "false")


def require_empty(output: Path, config_path: Path | None, training: Mapping[str, object]) -> None:
    """Refuse an output folder that holds another run's work, unless it is resumed or overwritten.

    Args:
        config_path: The file that the configuration was read from, which the run must not replace.
        training: The settings ``overwrite`` and ``resume_from_checkpoint``, where they are set.

    Raises:
        ConfigError: With what to do.
    """
    written = output / "config.yaml"
    if config_path and written.exists() and written.samefile(config_path) and not is_resolved(written):
        raise ConfigError(
            f"output_dir {output}: the run would write its own config.yaml over {config_path}. "
            "Rename your file, or choose another output_dir."
        )
    resumes = asks_to_resume(training.get("resume_from_checkpoint"))
    if resumes or training.get("overwrite") or not output.exists():
        return
    if any(not is_leftover(path) for path in output.iterdir()):
        resume = "resume it with --resume_from_checkpoint true, or "
        if not any(output.glob("checkpoint-*")):
            resume = "or, as no checkpoint is in it, "
        raise ConfigError(
            f"output_dir {output} is not empty. Give another folder, {resume}delete the run in it with "
            "--overwrite."
        )


def require_paths(
    checkpoint: Path, output: Path | None, per_document: Path | None = None, tokens: Path | None = None
) -> None:
    """Refuse a checkpoint that is not there, or a file of results that cannot be written.

    Raises:
        ConfigError: With what to do.
    """
    require_checkpoint("--checkpoint", checkpoint)
    require_file("--output", output)
    require_file("--per_document", per_document)
    require_file("--tokens", tokens)
    if tokens is not None and tokens.suffix not in (".html", ".jsonl"):
        raise ConfigError(
            f"--tokens {tokens}: give a name that ends in .html, for a page, or in .jsonl, for a line a "
            "document."
        )


def require_checkpoint(option: str, path: Path | None) -> None:
    """Refuse a folder that is not there; None is no path.

    Raises:
        ConfigError: With what to do.
    """
    if path is not None and not path.is_dir():
        raise ConfigError(f"{option} {path}: no such folder. Give a checkpoint or a saved model.")


def require_file(option: str, path: Path | None) -> None:
    """Refuse a path at which no file can be written; None is no path.

    Raises:
        ConfigError: With what to do.
    """
    if path and (path.is_dir() or (path.parent.exists() and not path.parent.is_dir())):
        raise ConfigError(f"{option} {path}: not a file that can be written. Give a file's name.")


def is_leftover(path: Path) -> bool:
    """Whether a file or folder in an output folder is what a start leaves that failed before step 1.

    Its config.yaml, log of the evaluation before step 1 and TensorBoard files hold no work, and the next
    start writes them anew.

    Example:
        >>> is_leftover(Path("out/ledger.json")), is_leftover(Path("out/model.safetensors"))
        (True, False)
    """
    match path.name:
        case "config.yaml":
            return path.is_file() and is_resolved(path)
        case "train_log.jsonl":
            return path.is_file() and not _has_steps(path)
        case "runs":
            files = [one for one in path.rglob("*") if not one.is_dir()]
            return path.is_dir() and all(one.name.startswith("events.out.tfevents.") for one in files)
    return path.name in NO_RUN or re.fullmatch(r"\..*\.partial", path.name) is not None


def _has_steps(log: Path) -> bool:
    """Whether a log has a line of a step, and not only of an evaluation before the first."""
    return any('"step": 0,' not in line for line in log.read_text(encoding="utf-8").splitlines())


def duration(seconds: float) -> str:
    """Seconds for people.

    Example:
        >>> duration(42.4), duration(3725), duration(200_000)
        ('42 s', '1 h 02 min', '2 d 7 h')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def is_resolved(path: Path) -> bool:
    """Whether a configuration was written by a run."""
    return path.read_text(encoding="utf-8").startswith(RESOLVED_HEADER.partition("\n")[0])
