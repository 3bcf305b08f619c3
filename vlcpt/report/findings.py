"""What ``vlcpt check`` found, as one value, which ``--json`` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from vlcpt.data.plan.ledger import Ledger
from vlcpt.report.check import Course, Speed, find_problems
from vlcpt.report.memory import MemoryEstimate


@dataclass(frozen=True)
class Foreseen:
    """How a run would go.

    Args:
        course: Its steps.
        longest: The longest documents with their tokens.
        memory: That of one device, for each way to train.
        advice: What to change, the most pressing first.
    """

    course: Course
    longest: Sequence[tuple[str, int]]
    memory: Mapping[str, MemoryEstimate]
    advice: Sequence[str]


@dataclass(frozen=True)
class Findings:
    """What became of every document, and how a run would go.

    Args:
        ledger: That of the training data.
        evaluations: For each evaluation set.
        foreseen: None where no document can be used.
        speed: None where no GPU was named and this machine has none that is known.
        folder: Where ``ledger.json`` and ``dropped.jsonl`` are.

    Example:
        >>> findings = Findings(Ledger(["pages"]), {}, None, None, "runs/a")
        >>> findings.is_complete, findings.verdict
        (True, 'Every document would be used.')
        >>> sorted(findings.as_json())  # doctest: +NORMALIZE_WHITESPACE
        ['advice', 'complete', 'evaluation', 'folder', 'ledger', 'longest', 'lost', 'memory', 'not_read',
         'problems', 'speed', 'steps', 'verdict']
    """

    ledger: Ledger
    evaluations: Mapping[str, Ledger]
    foreseen: Foreseen | None
    speed: Speed | None
    folder: str

    @property
    def lost(self) -> int:
        """Documents that would not be used, those of evaluation sets included."""
        return count_lost(self.ledger, self.evaluations)

    @property
    def is_complete(self) -> bool:
        """Whether every document would be used."""
        return not self.lost

    @property
    def verdict(self) -> str:
        """The same in a sentence."""
        return say_lost(self.lost)

    def as_json(self) -> dict[str, object]:
        """As docs/commands.md describes it."""
        named = {"train": self.ledger, **{f"eval:{name}": one for name, one in self.evaluations.items()}}
        foreseen = self.foreseen
        return {
            "complete": self.is_complete,
            "verdict": self.verdict,
            "lost": self.lost,
            "ledger": self.ledger.as_json(),
            "evaluation": {name: one.total.as_json() for name, one in self.evaluations.items()},
            "problems": [
                {"data": name, **asdict(problem)}
                for name, one in named.items()
                for problem in find_problems(one.dropped)
            ],
            "not_read": {
                name: source.not_read for name, source in self.ledger.sources.items() if source.not_read
            },
            "steps": None if foreseen is None else _steps(foreseen.course),
            "longest": []
            if foreseen is None
            else [{"document": name, "tokens": tokens} for name, tokens in foreseen.longest],
            "memory": None
            if foreseen is None
            else {name: {**asdict(one), "total": one.total} for name, one in foreseen.memory.items()},
            "advice": [] if foreseen is None else list(foreseen.advice),
            "speed": None if self.speed is None else asdict(self.speed),
            "folder": self.folder,
        }


def _steps(course: Course) -> dict[str, object]:
    return {
        "total": course.steps,
        "epoch": course.steps_per_epoch,
        "items": course.items,
        "processes": course.devices,
        "batch_size": course.rows,
        "accumulation": course.accumulation,
    }


def count_lost(ledger: Ledger, evaluations: Mapping[str, Ledger]) -> int:
    """Documents of all data that would not be used."""
    return sum(one.total.dropped_documents.total() for one in (ledger, *evaluations.values()))


def say_lost(lost: int) -> str:
    """The verdict.

    Example:
        >>> say_lost(1200)
        'Documents that would not be used: 1,200.'
    """
    return f"Documents that would not be used: {lost:,}." if lost else "Every document would be used."
