"""What ``vlcpt doctor`` shows and writes."""

from __future__ import annotations

import json
import math
from io import StringIO

import pytest
from rich.console import Console

from vlcpt.report.doctor import Diagnosis, Line, cause_lines, doctor_table, joined, judged, verdict_line

PASSED = Line("packed = alone", "passed", 1.5e-6, 1e-5, detail="9 documents")
FAILED = Line("speed", "failed", math.nan, unit="tokens/s", detail="a number is not finite.")
NOT_RUN = Line("every rank calls the towers equally", "not run", detail="one process")


def shown(*lines: Line, width: int = 160) -> str:
    file = StringIO()
    Console(file=file, width=width).print(doctor_table(lines, width))
    return file.getvalue()


def test_the_table_has_result_number_and_tolerance_of_each_line() -> None:
    rows = [line.split("  ") for line in shown(PASSED, NOT_RUN).splitlines()]

    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert ["packed = alone", "passed", "1.5e-06", "1.0e-05", "9 documents"] in cells
    assert ["every rank calls the towers equally", "not run", "–", "–", "one process"] in cells


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_name_and_no_number_is_cut(width: int) -> None:
    """A detail has a line of its own in a narrow terminal, where it would leave no room for the name."""
    text = shown(
        PASSED, Line("save and resume = uninterrupted", "passed", 1234567.0, 0.0, "tokens/s"), width=width
    )

    assert "…" not in text
    assert {"uninterrupted", "1,234,567", "tokens/s", "1.5e-06", "documents"} <= set(text.split())
    assert max(map(len, text.splitlines())) <= width


def test_a_cause_is_a_sentence_below_the_table_and_not_in_it() -> None:
    assert "not finite" not in shown(FAILED)
    assert cause_lines([PASSED, FAILED, NOT_RUN]) == ["speed: a number is not finite."]


def test_what_a_kernel_says_cannot_steer_the_terminal() -> None:
    assert "\x1b" not in shown(Line("speed", "passed", 1.0, detail="\x1b[2J"))


@pytest.mark.parametrize("measured", [math.nan, math.inf, 2e-5])
def test_a_number_that_is_not_at_most_the_tolerance_has_failed(measured: float) -> None:
    assert judged("a", measured, 1e-5, cause="it is wrong").status == "failed"


def test_the_line_of_all_ranks_is_the_first_that_failed() -> None:
    wrong = Line("a", "failed", 2.0, detail="it is wrong")

    assert joined([Line("a", "passed", 1.0), wrong]).detail == "rank 1: it is wrong"
    assert joined([wrong]).detail == "it is wrong"


def test_the_line_of_ranks_that_passed_has_the_largest_number() -> None:
    assert joined([Line("a", "passed", one) for one in (1.0, 3.0, 2.0)]).measured == 3.0


def test_a_number_that_json_does_not_have_is_null() -> None:
    found = Diagnosis({}, {}, [FAILED], {"tokens_per_second": math.inf}, None, 1.0)

    text = json.dumps(found.as_json(), allow_nan=False)

    assert json.loads(text)["lines"][0]["measured"] is None
    assert json.loads(text)["speed"] == {"tokens_per_second": None}
    assert not found.passed


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([PASSED, PASSED], "all is right: 2 checks passed"),
        (
            [PASSED, NOT_RUN],
            "nothing is wrong: 1 check passed; not run, so not proven: every rank calls the towers equally",
        ),
        ([PASSED, FAILED], "not right: speed (1 of 2 checks passed)"),
    ],
)
def test_one_sentence_says_whether_all_is_right_and_what_is_not_proven(lines: list[Line], said: str) -> None:
    assert verdict_line(lines) == said
