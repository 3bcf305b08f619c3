"""The folder of a run: free before it starts, and files in it whole or not there."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vlcpt.config.yaml import RESOLVED_HEADER
from vlcpt.errors import ConfigError
from vlcpt.file_writes import write_file
from vlcpt.folder_locks import LOCK
from vlcpt.training.checkpoints.files import RECORD, delete_checkpoint, list_checkpoints

if TYPE_CHECKING:
    from vlcpt.config.yaml import Configs

# What a run writes, and --overwrite takes away first: a model beside an older adapter would load with it.
RUN_FILES = (
    *("config.yaml", "ledger.json", "dropped.jsonl", "train_log.jsonl", RECORD),
    *("adapter_config.json", "adapter_model.safetensors", "config.json", "generation_config.json"),
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
)
PLANS = "plan"  # the folder in which planning is shared and kept; it can be deleted at any time
# What a check leaves, and a run that was stopped before it trained; the lock is that of the run itself.
NO_RUN = ("ledger.json", "dropped.jsonl", "check", PLANS, LOCK)


def prepare_output(configs: Configs, config_path: Path | None = None) -> list[str]:
    """Refuse an output folder that holds another run's work, or empty it if that is asked for.

    Args:
        config_path: See :func:`require_empty`.

    Returns:
        The checkpoints that were deleted.
    """
    # Not at the top: the command line looks at the folder before it waits for torch.
    from vlcpt.data.plan.cache import remove_plans

    output = Path(str(configs.training.output_dir))
    require_empty(output, config_path, vars(configs.training))
    if not configs.training.overwrite:
        return []
    deleted = list_checkpoints(output)
    for folder in deleted:
        delete_checkpoint(folder)
    for path in (path for name in RUN_FILES for path in output.glob(name)):
        if path.is_file():
            path.unlink()
    remove_plans(output / PLANS)
    return [folder.name for folder in deleted]


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
    resumes = training.get("resume_from_checkpoint") not in (None, False, "false")
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


def require_paths(checkpoint: Path, output: Path | None) -> None:
    """Refuse a checkpoint that is not there, or a file of results that cannot be written.

    Raises:
        ConfigError: With what to do.
    """
    if not checkpoint.is_dir():
        raise ConfigError(f"--checkpoint {checkpoint}: no such folder. Give a checkpoint or a saved model.")
    if output and (output.is_dir() or (output.parent.exists() and not output.parent.is_dir())):
        raise ConfigError(f"--output {output}: not a file that can be written. Give a file's name.")


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


def is_resolved(path: Path) -> bool:
    """Whether a configuration was written by a run."""
    return path.read_text(encoding="utf-8").startswith(RESOLVED_HEADER.partition("\n")[0])


def write_json(path: Path, content: Mapping[str, object], what: str = "") -> None:
    """Write a JSON file whole or not at all; a number that JSON does not have becomes null.

    Args:
        what: What it is, for the message of a :class:`vlcpt.file_writes.WriteError`.
    """
    text = json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False)
    write_file(path, text + "\n", what)


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
