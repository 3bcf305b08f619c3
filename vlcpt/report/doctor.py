"""What ``vlcpt doctor`` found: a table for a person, a JSON file for a bug report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vlcpt import __version__
from vlcpt.report.numbers import number
from vlcpt.report.screen import plain_table, visible

Status = Literal["passed", "failed", "not run"]
FORMAT = 1  # of the JSON file
_STYLES: Mapping[Status, str] = {"passed": "green", "failed": "bold red", "not run": "yellow"}


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Args:
        name: What was checked.
        status: What came of it.
        measured: The number that was found; None where nothing was measured.
        tolerance: What it may be at most; None for a measurement that cannot fail.
        unit: That of both.
        detail: The cause where it failed, the reason where it was not run, else more numbers.
    """

    name: str
    status: Status
    measured: float | None = None
    tolerance: float | None = None
    unit: str = ""
    detail: str = ""


def judged(
    name: str, measured: float, tolerance: float, *, unit: str = "", cause: str, detail: str = ""
) -> Line:
    """A line that passed if the number is at most the tolerance.

    Args:
        cause: What is wrong where it is more, or not a number.
        detail: What to add where it passed.

    Example:
        >>> judged("packed = alone", 1e-7, 1e-5, cause="documents see each other").status
        'passed'
        >>> judged("packed = alone", math.nan, 1e-5, cause="documents see each other").detail
        'documents see each other'
    """
    is_right = measured <= tolerance  # False of NaN
    return Line(
        name, "passed" if is_right else "failed", measured, tolerance, unit, detail if is_right else cause
    )


def joined(lines: Sequence[Line]) -> Line:
    """One line of those of all ranks: the first that failed, else the one with the largest number.

    Example:
        >>> joined([Line("a", "passed", 1.0), Line("a", "failed", 2.0, detail="it is wrong")]).detail
        'rank 1: it is wrong'
    """
    for rank, line in enumerate(lines):
        if line.status == "failed":
            return (
                Line(**{**asdict(line), "detail": f"rank {rank}: {line.detail}"}) if len(lines) > 1 else line
            )
    return max(lines, key=lambda line: -math.inf if line.measured is None else line.measured)


@dataclass(frozen=True)
class Diagnosis:
    """All that was found.

    Args:
        machine: Versions and devices.
        run: What was examined, and how it runs.
        lines: Those of the table.
        speed: What the run will reach; None where it was not measured.
        memory: Bytes that were foreseen, and the peak; None where it was not measured.
        seconds: All of it took.
    """

    machine: Mapping[str, str]
    run: Mapping[str, object]
    lines: Sequence[Line]
    speed: Mapping[str, float | None] | None
    memory: Mapping[str, int] | None
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(line.status != "failed" for line in self.lines)

    def as_json(self) -> dict[str, object]:
        """The content of ``doctor.json``; a number that JSON does not have is null."""
        return {
            "format": FORMAT,
            "vlcpt": __version__,
            "passed": self.passed,
            "seconds": round(self.seconds, 1),
            "machine": dict(self.machine),
            "run": dict(self.run),
            "lines": [{key: _finite(value) for key, value in asdict(line).items()} for line in self.lines],
            "speed": None if self.speed is None else {key: _finite(one) for key, one in self.speed.items()},
            "memory": None if self.memory is None else dict(self.memory),
        }


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


_WIDE = 110  # columns of a terminal that leave details enough room beside the numbers


def doctor_table(lines: Sequence[Line], width: int) -> Table:
    """A line a check: what came of it, the number, and what it may be at most.

    Args:
        width: Columns of the terminal. In a narrow one details are below the name of the check.

    Example:
        >>> lines = [Line("speed", "passed", 1234.0, unit="tokens/s", detail="99 targets/s")]
        >>> [len(doctor_table(lines, width).columns) for width in (80, 120)]
        [4, 5]
    """
    table, is_wide = plain_table("doctor"), width >= _WIDE
    table.add_column("check", overflow="fold")
    table.add_column("result", no_wrap=True)
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("at most", justify="right", no_wrap=True)
    if is_wide:
        table.add_column("", overflow="fold")
    for line in lines:
        # A cause is a sentence and has a place of its own below.
        detail = Text("" if line.status == "failed" else visible(line.detail), "dim")
        name = Text(visible(line.name))
        cells: list[Text | str] = [
            Text(line.status, _STYLES[line.status]),
            _shown(line.measured, line.unit),
            _shown(line.tolerance, ""),
        ]
        if is_wide:
            table.add_row(name, *cells, detail)
        else:
            table.add_row(Group(name, Padding(detail, (0, 0, 0, 2))) if detail else name, *cells)
    return table


def cause_lines(lines: Sequence[Line]) -> list[str]:
    """What is wrong, a line each; empty where nothing is.

    Example:
        >>> cause_lines([Line("speed", "failed", detail="the loss is NaN")])
        ['speed: the loss is NaN']
    """
    return [f"{line.name}: {line.detail}" for line in lines if line.status == "failed"]


def verdict_line(lines: Sequence[Line]) -> str:
    """The one sentence of it all: whether all is right, and what is not proven.

    Example:
        >>> verdict_line([Line("a", "passed"), Line("b", "passed")])
        'all is right: 2 checks passed'
        >>> verdict_line([Line("a", "passed"), Line("b", "failed"), Line("c", "not run")])
        'not right: b (1 of 2 checks passed; not run, so not proven: c)'
    """
    names = {
        status: [line.name for line in lines if line.status == status]
        for status in ("passed", "failed", "not run")
    }
    passed, count = len(names["passed"]), len(names["passed"]) + len(names["failed"])
    unproven = f"not run, so not proven: {', '.join(names['not run'])}" if names["not run"] else ""
    if names["failed"]:
        more = f"; {unproven}" if unproven else ""
        return f"not right: {', '.join(names['failed'])} ({passed} of {count} checks passed{more})"
    checks = f"{passed} check{'s' * (passed != 1)} passed"
    return f"nothing is wrong: {checks}; {unproven}" if unproven else f"all is right: {checks}"


def _shown(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{compact(value)} {unit}".strip()


def compact(value: float) -> str:
    """A number of any size, in few characters.

    Example:
        >>> compact(0.0), compact(1.5e-6), compact(1234.5)
        ('0', '1.5e-06', '1,234')
    """
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    return f"{value:.1e}" if abs(value) < 0.01 else number(value)
