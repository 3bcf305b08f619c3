"""Where every token went: bars and a table of what ``ledger.json`` holds."""

from __future__ import annotations

from collections.abc import Mapping

from vlcpt.report.screen import Sheet

_KINDS = ("targets", "context", "media", "special", "trimmed", "not_drawn", "dropped")


def ledger_bars(ledger: Mapping[str, object]) -> list[tuple[str, dict[str, int]]]:
    """For each source, and for all together first, what became of its tokens."""
    found = [("all sources", ledger.get("total"))]
    sources = ledger.get("sources")
    if isinstance(sources, dict) and len(sources) > 1:
        found += [(str(name), one) for name, one in sources.items()]
    bars = []
    for name, one in found:
        tokens = one.get("tokens") if isinstance(one, dict) else None
        if isinstance(tokens, dict):
            bars.append((name, {kind.replace("_", " "): count(tokens.get(kind)) for kind in _KINDS}))
    return [(name, counts) for name, counts in bars if sum(counts.values())]


def count(value: object) -> int:
    """A count, or the sum of counts by reason; nothing of what is none."""
    if isinstance(value, dict):
        return sum(count(one) for one in value.values())
    return value if isinstance(value, int) else 0


def ledger_sheet(ledger: Mapping[str, object]) -> Sheet | None:
    """The ledger in numbers, a column a source."""
    sources, total = ledger.get("sources"), ledger.get("total")
    accounts = {**sources, "total": total} if isinstance(sources, dict) else {}
    rows = []
    for part in ("documents", "tokens"):
        found = {name: _counts(one, part) for name, one in accounts.items()}
        for key in dict.fromkeys(key for counts in found.values() for key in counts):
            label = key.replace("_", " ") if key != "read" else f"{part} read"
            if key == "read" or any(counts.get(key) for counts in found.values()):
                cells = [f"{counts.get(key, 0):,}" for counts in found.values()]
                rows.append((label if key == "read" else f"  {label}", cells))
    return Sheet("ledger", [*accounts], rows, "One planned pass over the data.") if rows else None


def _counts(account: object, part: str) -> dict[str, int]:
    """Counts of documents or tokens, each reason for which they were dropped apart."""
    counts = account.get(part) if isinstance(account, dict) else None
    found: dict[str, int] = {}
    for key, value in counts.items() if isinstance(counts, dict) else ():
        inner = value.items() if isinstance(value, dict) else ()
        found |= {f"dropped: {reason}": count(one) for reason, one in inner} if inner else {}
        if not isinstance(value, dict):
            found[str(key)] = count(value)
    return found


def dropped_count(ledger: Mapping[str, object]) -> int:
    """How many documents were dropped."""
    found = _counts(ledger.get("total"), "documents")
    return sum(number for key, number in found.items() if "dropped: " in key)
