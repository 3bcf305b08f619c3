"""What was read, and what is made of it, entered in the ledger."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlcpt.data.joining import SourceScan
from vlcpt.data.ledger import Ledger, SourceLedger, TokenCounts
from vlcpt.data.readers.files import DocumentSource


def enter_unused(ledger: Ledger, account: SourceLedger, scan: SourceScan) -> None:
    """Enter what was read and is not used.

    Args:
        ledger: The account of all sources.
        account: The source's own.
        scan: What reading the source gave.
    """
    account.documents["read"] += scan.rows
    account.documents += scan.marks
    account.dropped_tokens += scan.dropped_tokens
    account.tokens["read"] += scan.dropped_tokens.total()
    for unused in scan.unused:
        account.dropped_documents[unused.dropped.reason] += 1
        account.documents["without_targets"] += unused.dropped.reason == "without_targets"
        ledger.dropped.append(unused.dropped)


def enter_used(account: SourceLedger, scan: SourceScan, repeats: np.ndarray) -> None:
    """Enter what is used, and what replay did not draw.

    Args:
        account: The source's account.
        scan: What reading the source gave.
        repeats: How often each of its documents is read.
    """
    drawn = repeats > 0
    read, parts = scan.documents["read"], scan.documents["parts"]
    account.tokens["read"] += int(read.sum())
    account.documents["not_drawn"] += int((~drawn).sum())
    account.tokens["not_drawn"] += int(read[~drawn].sum())
    account.documents["used"] += int(drawn.sum())
    account.documents["split"] += int((drawn & (parts > 1)).sum())
    account.documents["repeats"] += int((repeats[drawn] - 1).sum())
    account.samples += int((repeats * parts).sum())
    for name in TokenCounts._fields:
        if name != "read":
            account.tokens[name] += int(scan.documents[name][drawn].sum())


def enter_shares(
    ledger: Ledger,
    sources: Sequence[DocumentSource],
    scans: Sequence[SourceScan],
    repeats: Sequence[np.ndarray],
    *,
    train: int,
    replay_share: float,
) -> None:
    """Enter the part of all targets that each source was asked for, and has.

    Args:
        ledger: The account of all sources.
        sources, scans, repeats: The sources, what reading them gave, and how often each document is read.
        train: How many of the sources define the pass; the others fill ``replay_share``.
        replay_share: Part of all targets that replay makes up.
    """
    targets = [
        int((scan.documents["targets"] * times).sum()) for scan, times in zip(scans, repeats, strict=True)
    ]
    for number, source in enumerate(sources):
        account = ledger.sources[source.name]
        # What replay takes is taken from all of them alike.
        share = source.share if number < train else None
        account.share_asked = None if share is None else round(share * (1 - replay_share), 6)
        account.share_realised = round(targets[number] / max(sum(targets), 1), 6)
    if len(sources) == train + 1:
        ledger.sources[sources[train].name].share_asked = replay_share


def enter_failure(
    account: SourceLedger, scan: SourceScan, repeats: np.ndarray, row: int, reason: str
) -> None:
    """Move a document from used to dropped, whole.

    Args:
        account: The source's account.
        scan: What reading the source gave.
        repeats: How often each of its documents is read.
        row: The document's row.
        reason: Why it cannot be read after all.
    """
    place = int(np.searchsorted(scan.documents["row"], row))
    counts = scan.documents.line(place)
    times, parts = int(repeats[place]), counts["parts"]
    account.documents["used"] -= 1
    account.documents["split"] -= parts > 1
    account.documents["repeats"] -= times - 1
    account.samples -= times * parts
    account.dropped_documents[reason] += 1
    account.dropped_tokens[reason] += counts["read"]
    for name in TokenCounts._fields:
        if name != "read":
            account.tokens[name] -= counts[name]
