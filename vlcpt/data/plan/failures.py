"""Documents that were planned, but fail when training reads them: too many of them end the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TypedDict

from vlcpt.data.plan.ledger import BadDataError, Dropped, list_reasons
from vlcpt.data.plan.plan import Plan


@dataclass(frozen=True)
class FailedSample:
    """A sample that could be planned, but not read: a medium that does not decode, or a changed file.

    Args:
        source, row: Numbers of its source and its row.
        dropped: Its line of ``dropped.jsonl``.
        message: The complete error.
        stops: Whether the run stops here, as ``on_bad_data`` says.
    """

    source: int
    row: int
    dropped: Dropped
    message: str
    stops: bool


class FailureState(TypedDict):
    """What :class:`Failures` knows, as JSON has it: the fields of each :class:`FailedSample`, in order."""

    failed: list[tuple[int, int, tuple[str, int, str | None, str, str], str, bool]]
    in_a_row: list[tuple[int, int]]


class Failures:
    """The documents of a plan that failed since; with those that planning left out they may be too many.

    Args:
        plan: Its ledger is kept true.
        names: Those of the sources.
        max_bad_fraction: The part of a source's rows that may be bad, as in planning.
        max_bad_in_a_row: How many documents may fail with none read in between; None: any number.
    """

    def __init__(
        self, plan: Plan, names: Sequence[str], max_bad_fraction: float, max_bad_in_a_row: int | None
    ) -> None:
        self._plan = plan
        self._names = names
        self._max_fraction = max_bad_fraction
        self._max_in_a_row = max_bad_in_a_row
        self._failed: dict[tuple[int, int], FailedSample] = {}
        self._in_a_row: dict[tuple[int, int], FailedSample] = {}

    def __len__(self) -> int:
        return len(self._failed)

    def enter(self, failed: FailedSample) -> bool:
        """Enter a document in the ledger; False if it is there already.

        It moves from used to dropped with all its tokens, also where other parts of it have been trained.
        """
        key = (failed.source, failed.row)
        self._in_a_row[key] = failed
        if key in self._failed:
            return False
        self._failed[key] = failed
        ledger = self._plan.ledger
        account = ledger.sources[self._names[failed.source]]
        self._plan.enter_failure(account, failed.source, failed.row, failed.dropped.reason)
        ledger.samples = ledger.total.samples
        ledger.dropped.append(failed.dropped)
        return True

    def enter_read(self) -> None:
        """Note that a document was read, so that those which failed before it no longer stand in a row."""
        self._in_a_row.clear()

    def state(self) -> FailureState:
        """What a run that goes on must know: the documents, and which of them stand in a row."""
        return {"failed": [astuple(one) for one in self._failed.values()], "in_a_row": list(self._in_a_row)}

    def restore(self, state: FailureState) -> None:
        """Enter the documents of a :meth:`state` of the same plan."""
        for source, row, dropped, message, stops in state["failed"]:
            self.enter(FailedSample(source, row, Dropped(*dropped), message, stops))
        last = {(source, row) for source, row in state["in_a_row"]}
        self._in_a_row = {key: one for key, one in self._failed.items() if key in last}

    def check(self) -> None:
        """Raise if too many have failed.

        Raises:
            BadDataError: With the counts, the limit and what to do.
        """
        if self._max_in_a_row is not None and len(self._in_a_row) >= self._max_in_a_row:
            last = list(self._in_a_row.values())[-1]
            raise BadDataError(
                f"{len(self._in_a_row)} documents in a row failed when they were read, and "
                f"{self._max_in_a_row} stop a run. Look whether their media can still be reached. The last: "
                f"{last.message}"
            )
        for source, scan in enumerate(self._plan.scans):
            failed = [one for (found, _), one in self._failed.items() if found == source]
            planned = sum(unused.is_bad for unused in scan.unused)
            bad = planned + len(failed)
            reasons = list_reasons(Counter(one.dropped.reason for one in failed))
            if failed and bad > self._max_fraction * scan.rows:
                raise BadDataError(
                    f"{bad} of {scan.rows} rows of {self._names[source]!r} cannot be used, more than "
                    f"max_bad_fraction {self._max_fraction:g}: {planned} were left out in planning, and "
                    f"{len(failed)} failed when they were read. Reasons: {reasons}. Mend them (see the log, "
                    f"or dropped.jsonl of the run), or set max_bad_fraction above {bad / scan.rows:.3g}. "
                    f"The last: {failed[-1].message}"
                )
