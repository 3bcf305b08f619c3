"""What a run has left in its folder, read as plain values; what is missing is said."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

from vlcpt.data.rows.open import default_name
from vlcpt.eval_names import Number, measured_in
from vlcpt.report.numbers import as_number
from vlcpt.run_files import FACTS, is_killed, read_log, read_mapping

DROPPED = 20  # lines of dropped.jsonl that are read
_MODELS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
_MISSING = {
    "train_log.jsonl": "there are no curves",
    "ledger.json": "it is not known where the tokens went",
    "config.yaml": "its settings are not known",
    FACTS: "how it ended, what trains, versions and devices are not known",
}
Point = tuple[float, float]


@dataclass(frozen=True)
class RunRecord:
    """A run, as its files tell it.

    Args:
        folder: That of the run.
        name: By which it is shown.
        log: The lines of ``train_log.jsonl``.
        ledger, config, facts, evaluation: What ``ledger.json``, ``config.yaml``, ``run.json`` and
            ``eval.json`` hold; empty where they are not there.
        dropped: The first lines of ``dropped.jsonl``.
        missing: Sentences about files that are not there, or are cut.
        has_model: Whether the folder holds a model or adapter.
        is_killed: Whether it has not ended, and its process is gone.
    """

    folder: Path
    name: str
    log: Sequence[Mapping[str, object]] = ()
    ledger: Mapping[str, object] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)
    evaluation: Mapping[str, object] = field(default_factory=dict)
    dropped: Sequence[Mapping[str, object]] = ()
    missing: Sequence[str] = ()
    has_model: bool = False
    is_killed: bool = False

    @property
    def steps(self) -> int:
        """The last step that is logged."""
        return max((number for line in self.log if isinstance(number := line.get("step"), int)), default=0)

    @property
    def retention(self) -> tuple[str, ...]:
        """The sets that hold what the model knew before."""
        if isinstance(named := self.evaluation.get("retention"), list):
            return tuple(map(str, named))
        sources = self.config.get("retention_data")
        entries = sources if isinstance(sources, list) else [sources] if sources else []
        return tuple(_name(one) for one in entries)

    @property
    def evaluated(self) -> Mapping[str, Mapping[str, object]]:
        """What the file of ``vlcpt eval`` holds, by set."""
        found = self.evaluation.get("sets")
        sets = found if isinstance(found, dict) else {}
        return {str(name): one for name, one in sets.items() if isinstance(one, dict)}

    @property
    def results(self) -> Mapping[str, Mapping[str, object]]:
        """What ``vlcpt eval`` measured, by set; what is no number is left out."""
        return {name: _measured(one) for name, one in self.evaluated.items()}

    @cached_property
    def evaluations(self) -> Sequence[tuple[float, Mapping[str, Mapping[Number, float]]]]:
        """The evaluations in training: a step, and by set its numbers."""
        found = ((line.get("step"), measured_in(line)) for line in self.log)
        return [(float(str(step)), sets) for step, sets in found if sets]

    @property
    def sets(self) -> list[str]:
        """The sets that were measured in training, in order."""
        return [*dict.fromkeys(name for _, sets in self.evaluations for name in sets)]

    def set_curve(self, name: str, number: Number = "loss") -> list[Point]:
        """A number of a set, by step."""
        found = [(step, as_number(sets[name].get(number))) for step, sets in self.evaluations if name in sets]
        return [(step, value) for step, value in found if value is not None]

    def curve(self, key: str, scale: float = 1.0) -> list[Point]:
        """The values of a key of the log, by step."""
        return [
            (float(str(line["step"])), value * scale)
            for line in self.log
            if (value := as_number(line.get(key))) is not None
        ]

    def curves(self, prefix: str) -> dict[str, list[Point]]:
        """The curves of all keys that begin so, by the rest of their names."""
        keys = dict.fromkeys(key for line in self.log for key in line if key.startswith(prefix))
        return {key[len(prefix) :]: self.curve(key) for key in keys}


def read_record(folder: Path, *, name: str | None = None, evaluation: Path | None = None) -> RunRecord:
    """Read a run's folder. No file must be there, and none must be whole.

    Args:
        name: By which the run is shown; by default the folder's.
        evaluation: What ``vlcpt eval --output`` wrote; by default ``eval.json`` in the folder.

    Example:
        >>> read_record(Path("nowhere")).missing[0]
        'train_log.jsonl is missing: there are no curves.'
    """
    missing = [
        f"{file} is missing: {what}." for file, what in _MISSING.items() if not (folder / file).is_file()
    ]
    read = {file: read_mapping(folder / file) for file in ("ledger.json", "config.yaml", FACTS)}
    facts = read[FACTS]
    for file, found in read.items():
        if not found and (folder / file).is_file():
            missing.append(f"{file} cannot be read: {_MISSING[file]}.")
    log = [entry for _, entry in read_log(folder)]
    if _is_cut(folder / "train_log.jsonl"):
        missing.append("train_log.jsonl is cut: its last line is left out.")
    return RunRecord(
        folder,
        name or folder.resolve().name,
        log,
        read["ledger.json"],
        read["config.yaml"],
        facts,
        read_mapping(evaluation or folder / "eval.json"),
        _dropped(folder / "dropped.jsonl"),
        missing,
        any((folder / one).is_file() for one in _MODELS),
        is_killed(folder, facts),
    )


def _measured(result: Mapping[str, object]) -> dict[str, object]:
    """The numbers of a set, its share of targets that need their image, and intervals that have two."""
    found: dict[str, object] = {key: one for key, one in result.items() if as_number(one) is not None}
    if isinstance(relying := result.get("reliance"), dict):
        found["reliance"] = {str(key): one for key, one in relying.items() if as_number(one) is not None}
    if isinstance(intervals := result.get("intervals"), dict):
        found["intervals"] = {
            str(name): bounds
            for name, bounds in intervals.items()
            if isinstance(bounds, list) and len(bounds) == 2 and None not in map(as_number, bounds)
        }
    return found


def _is_cut(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) == 0:
                return False
            file.seek(-1, 2)
            return file.read() != b"\n"
    except OSError:
        return False


def _dropped(path: Path) -> list[Mapping[str, object]]:
    found: list[Mapping[str, object]] = []
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in islice(file, DROPPED):
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                found += [entry] if isinstance(entry, dict) else []
    except OSError:
        return []
    return found


def _name(source: object) -> str:
    """The name of a source, which is its file's where it has no other."""
    entry = source if isinstance(source, dict) else {"path": source}
    return str(entry.get("name") or default_name(str(entry.get("path", ""))))
