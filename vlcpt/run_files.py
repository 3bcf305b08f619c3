"""What a run leaves in its folder: checkpoints by step, its settings, and the record of what was done."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

# What stands beside a run's result: a model card is made of it.
RECORD = ("config.yaml", "ledger.json", "dropped.jsonl", "train_log.jsonl")


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
        folder: Of the run.
        last: The last step whose lines are given; None: all of them.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp())
        >>> _ = (folder / "train_log.jsonl").write_text('{"step": 1}\\n{"step": 2}\\n{"ste')
        >>> [entry["step"] for _, entry in read_log(folder)]
        [1, 2]
    """
    try:
        lines = (folder / "train_log.jsonl").read_text("utf-8").splitlines(keepends=True)
    except (OSError, ValueError):
        return
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        step = entry.get("step") if isinstance(entry, dict) else None
        if isinstance(step, int) and (last is None or step <= last):
            yield line, entry
