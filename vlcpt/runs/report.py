"""``vlcpt report``: the page of a run once more, or one that compares runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlcpt.errors import ConfigError
from vlcpt.file_writes import write_file
from vlcpt.report.pages.comparison import comparison_page
from vlcpt.report.pages.run import run_page
from vlcpt.run_files import FACTS, PAGE, RECORD, read_mapping, require_file


def report_run(runs: Sequence[Path], output: Path | None = None, evaluation: Path | None = None) -> Path:
    """Write the page of a run, or of several beside each other, from their files alone.

    Args:
        runs: Their folders.
        output: The file; by default ``report.html``, of one run in its folder, of several in this one.
        evaluation: What ``vlcpt eval --output`` wrote about the one run; by default its ``eval.json``.

    Returns:
        The file that was written.

    Raises:
        ConfigError: If a folder holds no run, or the file cannot be one.
    """
    require_file("--output", output)
    for run in runs:
        require_run(run)
    if evaluation is not None and len(runs) > 1:
        raise ConfigError("--evaluation is of one run. Name one; each folder's own eval.json is read anyway.")
    if evaluation is not None and not evaluation.is_file():
        raise ConfigError(f"--evaluation {evaluation}: no such file. `vlcpt eval … --output FILE` writes it.")
    if evaluation is not None and not isinstance(read_mapping(evaluation).get("sets"), dict):
        raise ConfigError(
            f"--evaluation {evaluation}: not what `vlcpt eval --output` writes. Measure with it first."
        )
    if len(runs) == 1:
        path, page = output or runs[0] / PAGE, run_page(runs[0], evaluation=evaluation)
    else:
        path, page = output or Path(PAGE), comparison_page(runs)
    write_file(path, page, "the page")
    return path


def require_run(folder: Path) -> None:
    """Refuse a folder that holds nothing of a run.

    Raises:
        ConfigError: With what to do.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder. Give the output_dir of a run.")
    known = [name for name in RECORD if name != "dropped.jsonl"]
    if not any((folder / name).is_file() for name in known):
        above = " Give the folder above it." if (folder.parent / FACTS).is_file() else ""
        raise ConfigError(f"{folder}: no run is in it, as none of {', '.join(known)} is there.{above}")
