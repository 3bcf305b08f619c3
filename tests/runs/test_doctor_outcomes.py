"""What ranks know of the checks of others; real ranks are in test_doctor_ranks.py."""

from __future__ import annotations

from vlcpt.report.doctor import Line
from vlcpt.runs.doctor.outcomes import Outcome, verdict


def ended(measured: float) -> Outcome:
    return Outcome(Line("speed", "passed", measured))


def raised(cause: str, order: int) -> Outcome:
    return Outcome(Line("speed", "failed", detail=cause), order)


def test_ranks_that_have_passed_are_at_the_same_place() -> None:
    found = verdict("speed", {0: ended(1), 1: ended(2)}, ranks=2, timeout=9)

    assert (found.line.measured, found.is_shared) == (2, True)


def test_the_rank_that_raised_first_is_the_cause() -> None:
    """The next ones may only have lost their connection to it."""
    found = verdict("speed", {0: raised("closed by peer", 2), 1: raised("no memory", 1)}, ranks=2, timeout=9)

    assert (found.line.detail, found.is_shared) == ("rank 1: no memory", True)


def test_a_rank_that_raised_alone_has_left_the_others() -> None:
    assert not verdict("speed", {0: ended(1), 1: raised("no memory", 1)}, ranks=2, timeout=9).is_shared


def test_ranks_that_wait_for_the_one_that_raised_are_named() -> None:
    found = verdict("speed", {1: raised("no memory", 1), 2: ended(1)}, ranks=4, timeout=9)

    assert found.line.detail == "rank 1: no memory (ranks 0, 3 then waited for it)"


def test_of_a_thousand_ranks_that_wait_eight_are_named() -> None:
    found = verdict("speed", {1000: raised("no memory", 1)}, ranks=1001, timeout=9)

    assert found.line.detail.endswith("(ranks 0, 1, 2, 3, 4, 5, 6, 7 and 992 more then waited for it)")


def test_a_rank_that_does_not_come_has_failed() -> None:
    found = verdict("speed", {0: ended(1)}, ranks=2, timeout=9)

    assert (found.line.status, found.is_shared) == ("failed", False)
    assert found.line.detail == "rank 1 did not end this check within 9 seconds (ddp_timeout)"
