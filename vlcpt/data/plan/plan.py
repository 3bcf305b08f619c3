"""One pass over every document: what is read how often, with the account of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from vlcpt.data.encode.encoder import DocumentEncoder
from vlcpt.data.media.files import BESIDE, is_media_of_others, media_beside
from vlcpt.data.plan.kept_scans import remove_old, scan_file, scanned
from vlcpt.data.plan.ledger import (
    NOT_READ,
    BadDataError,
    Ledger,
    SourceLedger,
    TokenCounts,
    list_reasons,
)
from vlcpt.data.plan.mix import draw_documents, passes_for_shares, repeat_documents
from vlcpt.data.plan.scan import Reading, Scan, SourceScanner
from vlcpt.data.prepared.read import PreparedRows
from vlcpt.data.rows.tables import DatasetRows, MemoryRows
from vlcpt.data.sources import DocumentSource

T = TypeVar("T")
MAX_BAD_IN_A_ROW = 100


class Track(Protocol):
    """Passes an iterable on, and shows how far it is, e.g. ``rich.progress.track``."""

    def __call__(self, sequence: Iterable[T], description: str) -> Iterable[T]: ...


def untracked(sequence: Iterable[T], description: str) -> Iterable[T]:
    """The :class:`Track` that shows nothing.

    Example:
        >>> list(untracked([1, 2], "reading"))
        [1, 2]
    """
    return sequence


class Plan:
    """What is read in one pass.

    Args:
        scans: For each source, those documents that can be trained on.
        times: For each source, how often each line of its scan is read; 0 where replay did not draw it.
        ledger: The account of all.
    """

    def __init__(self, scans: Sequence[Scan], times: Sequence[np.ndarray], ledger: Ledger) -> None:
        self.scans = scans
        self.times = times
        self.ledger = ledger
        ends = np.cumsum([len(scan.lines) for scan in scans])
        self._starts = np.append(0, ends[:-1])  # the first line of each source, among those of all
        # Of each sample, its line: a flat array, which workers share with the parent instead of copying it.
        self._lines = np.concatenate(
            [
                _in_order(scan.lines["first"], times) + np.int32(start)
                for scan, times, start in zip(scans, times, self._starts, strict=True)
            ]
        )

    def __len__(self) -> int:
        """Samples of the pass."""
        return len(self._lines)

    def column(self, name: str) -> np.ndarray:
        """A field of ``LINE``, or ``source``, of every sample."""
        if name == "source":
            return np.searchsorted(self._starts, self._lines, side="right") - 1
        return np.concatenate([scan.lines[name] for scan in self.scans])[self._lines]

    def sample(self, number: int) -> tuple[int, np.void]:
        """The source of a sample, and its line."""
        line = int(self._lines[number])
        source = int(np.searchsorted(self._starts, line, side="right")) - 1
        return source, self.scans[source].lines[line - self._starts[source]]

    @cached_property
    def documents(self) -> np.ndarray:
        """The documents that are read, in order: int64 (N, 2), source and row."""
        found = []
        for source, (scan, times) in enumerate(zip(self.scans, self.times, strict=True)):
            rows = scan.lines["row"][scan.lines["first"] & (times > 0)]
            found.append(np.column_stack([np.full(len(rows), source), rows]))
        return np.concatenate(found)

    def first_line(self, number: int) -> np.void:
        """The line of the first part of a document, by its number among :attr:`documents`."""
        source, row = self.documents[number].tolist()
        lines = self.scans[source].lines
        return lines[int(np.searchsorted(lines["row"], row))]

    @cached_property
    def document_numbers(self) -> np.ndarray:
        """For each sample, the number of its document among :attr:`documents`: int32."""
        first = np.concatenate([scan.lines["first"] for scan in self.scans])
        begins = first & (np.concatenate(self.times) > 0)
        return (np.cumsum(begins, dtype=np.int32) - 1)[self._lines]

    def rows_with(self, medium: str) -> np.ndarray:
        """Documents that are read and have ``images`` or ``videos``: int64 (N, 2), source and row."""
        found = []
        for source, (scan, times) in enumerate(zip(self.scans, self.times, strict=True)):
            rows = scan.lines["row"][(scan.lines[medium] > 0) & (times > 0)]
            found.append(np.column_stack([np.full(len(rows), source), rows]))
        return np.concatenate(found)

    def enter_failure(self, account: SourceLedger, source: int, row: int, reason: str) -> None:
        """Move a document from used to dropped, with all its tokens."""
        rows = self.scans[source].lines["row"]
        own = slice(*(int(np.searchsorted(rows, row, side)) for side in ("left", "right")))
        moved = SourceLedger()
        enter_used(moved, self.scans[source].lines[own], self.times[source][own])
        account.dropped_documents[reason] += 1
        account.dropped_tokens[reason] += moved.tokens.pop("read")
        account.documents.subtract(moved.documents)
        account.tokens.subtract(moved.tokens)
        account.samples -= moved.samples


def _in_order(first: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The lines that are read, int32: those of a document together, as often as it is read."""
    if (times == 1).all():
        return np.arange(len(first), dtype=np.int32)
    starts = np.flatnonzero(first)
    parts, repeats = np.diff(starts, append=len(first)), times[starts]
    starts, parts = np.repeat(starts, repeats), np.repeat(parts, repeats)
    inside = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    return (np.repeat(starts, parts) + inside).astype(np.int32)


def enter_unused(ledger: Ledger, account: SourceLedger, scan: Scan) -> None:
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


def enter_used(account: SourceLedger, lines: np.ndarray, times: np.ndarray) -> None:
    """Enter what is used, and what replay did not draw.

    Args:
        account: The source's account.
        lines: Those of its documents.
        times: How often each line is read.
    """
    is_read, first = times > 0, lines["first"]
    account.documents["used"] += int((first & is_read).sum())
    account.documents["not_drawn"] += int((first & ~is_read).sum())
    account.documents["split"] += int((first[:-1] & ~first[1:] & is_read[1:]).sum())  # a second part follows
    account.documents["repeats"] += int((times - 1)[first & is_read].sum())
    account.samples += int(times.sum())
    account.tokens["read"] += int(lines["read"].sum())
    account.tokens["not_drawn"] += int(lines["read"][~is_read].sum())
    for name in TokenCounts._fields[1:]:
        account.tokens[name] += int(lines[name][is_read].sum())


def enter_shares(
    ledger: Ledger,
    sources: Sequence[DocumentSource],
    scans: Sequence[Scan],
    times: Sequence[np.ndarray],
    *,
    train: int,
    replay_share: float,
) -> None:
    """Enter the part of all targets that each source was asked for, and has.

    Args:
        ledger: The account of all sources.
        sources, scans, times: The sources, what reading them gave, and how often each line is read.
        train: How many of the sources define the pass; the others fill ``replay_share``.
        replay_share: Part of all targets that replay makes up.
    """
    targets = [int((scan.lines["targets"] * often).sum()) for scan, often in zip(scans, times, strict=True)]
    for number, source in enumerate(sources):
        account = ledger.sources[source.name]
        # What replay takes is taken from all of them alike.
        share = source.share if number < train else None
        account.share_asked = None if share is None else round(share * (1 - replay_share), 6)
        account.share_realised = round(targets[number] / max(sum(targets), 1), 6)
    if len(sources) == train + 1:
        ledger.sources[sources[train].name].share_asked = replay_share


def make_plan(
    train: Sequence[DocumentSource],
    replay: Sequence[DocumentSource],
    encoder: DocumentEncoder,
    reading: Reading,
    *,
    replay_share: float,
    seed: int,
    max_bad_fraction: float,
    max_documents: int | None = None,
    cache_dir: Path | None,
    track: Track,
) -> Plan:
    """Read every document once and decide what one pass trains on.

    Args:
        train: Sources that define the pass.
        replay: Sources that fill ``replay_share`` of all targets.
        encoder: Encodes documents; only headers of media are read.
        reading: How they are read.
        replay_share: Part of all targets that replay makes up; 0 ≤ share < 1.
        seed: Decides what replay draws and what is repeated.
        max_bad_fraction: The part of a source's rows that may be unusable.
        max_documents: How many documents of all that can be used are drawn; None: all.
        cache_dir: Where what was read is kept, for other processes and later starts. The plan is the same.
        track: What shows the progress.

    Raises:
        DocumentError: At the first unusable row, unless those are skipped.
        BadDataError: If too many are.
        LoadingError: If a process that reads died, or stands still.
    """
    sources = [*train, *replay]
    ledger = Ledger([source.name for source in sources])
    scans: list[Scan] = []
    files: list[Path | None] = []
    for source in sources:
        path = cache_dir and scan_file(cache_dir, source, encoder, reading)
        # While one rank reads, the cores of the others on this machine are free; where all read, one of them
        # shows how far it is.
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if path else 1
        shows = track if path or os.environ.get("RANK", "0") == "0" else untracked
        scanner = SourceScanner(source, encoder, replace(reading, num_proc=ranks * reading.num_proc))
        scan = scanned(scanner, shows(scanner, f"reading {source.name}"), path)
        files.append(path)
        account = ledger.sources[source.name]
        enter_unused(ledger, account, scan)
        for name, count in _not_read(source, scan).items():
            account.documents[NOT_READ + name] = count
        _check_bad(source, scan, max_bad_fraction)
        scans.append(scan)
    if cache_dir is not None:
        remove_old(cache_dir, files)
    try:
        _check_any(ledger, scans, train)
    except BadDataError:
        for source, scan in zip(sources, scans, strict=True):  # of what could be used, nothing is drawn
            enter_used(ledger.sources[source.name], scan.lines, np.zeros(len(scan.lines), np.int32))
        ledger.check()
        raise
    times = _times(scans, train, replay_share, seed, max_documents)
    for source, scan, often in zip(sources, scans, times, strict=True):
        enter_used(ledger.sources[source.name], scan.lines, often)
    enter_shares(ledger, sources, scans, times, train=len(train), replay_share=replay_share)
    ledger.check()
    return Plan(scans, times, ledger)


def _not_read(source: DocumentSource, scan: Scan) -> dict[str, int]:
    """What was not read of a source and no row names; everything, if the source was prepared."""
    if isinstance(source.rows, PreparedRows):
        return source.rows.contents.not_read
    media = sum(int(scan.lines[kind].sum()) for kind in ("images", "videos"))
    return files_beside(source, documents=int(scan.lines["first"].sum()), media=media)


def files_beside(source: DocumentSource, *, documents: int, media: int) -> dict[str, int]:
    """Files that lie beside the rows of a source and are not read, by what they are.

    Args:
        source: The source.
        documents: How many of its documents are used.
        media: How many media these have.

    Example:
        >>> from vlcpt.data.rows.open import SourceConfig
        >>> from vlcpt.data.sources import open_source
        >>> files_beside(open_source(SourceConfig("rows"), [{"text": "a"}]), documents=1, media=0)
        {}
    """
    found: dict[str, int] = {}
    # Media that may be those of rows of which none has one; nothing is beside a saved data set, or one from
    # the Hub, and of rows that could all not be used, their own messages say why.
    root = None if source.unread.format == "text" else source.media_root
    may_be_theirs = not isinstance(source.rows, MemoryRows | DatasetRows) and documents and not media
    # Text for replay lies beside the training data, whose pictures are there.
    if root is not None and may_be_theirs and not is_media_of_others(Path(source.rows.source(0).path), root):
        found[BESIDE] = media_beside(root)
    return found | source.left_out()


def _check_bad(source: DocumentSource, scan: Scan, max_bad_fraction: float) -> None:
    bad = [unused for unused in scan.unused if unused.is_bad]
    if len(bad) > max_bad_fraction * scan.rows:
        raise BadDataError(
            f"{len(bad)} of {scan.rows} rows of {source.name!r} cannot be used, more than "
            f"max_bad_fraction {max_bad_fraction:g}. "
            f"Reasons: {list_reasons(Counter(unused.dropped.reason for unused in bad))}. "
            f"The first: {' | '.join(unused.message for unused in bad[:3])}"
            + (f" | The last: {bad[-1].message}" if len(bad) > 3 else "")
        )


def _check_any(ledger: Ledger, scans: Sequence[Scan], train: Sequence[DocumentSource]) -> None:
    """Raise where nothing can be trained on, in all sources or in one that is to have a share."""
    read = list(zip(train, scans, strict=False))
    groups = [(read, "")]
    groups += [
        ([one], f" of {one[0].name!r}, which has share {one[0].share:g},")
        for one in read
        if one[0].share is not None
    ]
    for group, whose in groups:
        if any(len(scan.lines) for _, scan in group):
            continue
        accounts = [(source, ledger.sources[source.name]) for source, _ in group]
        reasons = sum((account.dropped_documents for _, account in accounts), Counter())
        count = sum(account.documents["read"] for _, account in accounts)
        # A tag does not repair rows that cannot be read.
        todo = {
            f" {source.marking}": None
            for source, account in accounts
            if account.dropped_documents.keys() & {"without_targets", "untagged"} and source.marking
        }
        first = next((row.message for _, scan in group for row in scan.unused if row.is_bad), "")
        raise BadDataError(
            f"none of {count} documents{whose} can be trained on. "
            f"Reasons: {list_reasons(reasons)}.{''.join(todo)}" + (f" The first: {first}" if first else ""),
            ledger,
        )


def _times(
    scans: Sequence[Scan],
    train: Sequence[DocumentSource],
    replay_share: float,
    seed: int,
    max_documents: int | None,
) -> list[np.ndarray]:
    """How often each line of each source is read: as often as its document."""
    rng = np.random.default_rng(seed)
    targets = [
        np.add.reduceat(scan.lines["targets"], np.flatnonzero(scan.lines["first"]), dtype=np.int64)
        for scan in scans
    ]
    passes = passes_for_shares(
        [int(count.sum()) for count in targets[: len(train)]], [source.share for source in train]
    )
    repeats = [repeat_documents(count, times, rng) for count, times in zip(targets, passes, strict=False)]
    if len(scans) > len(train):
        trained = sum(int((count * times).sum()) for count, times in zip(targets, repeats, strict=False))
        replayed = np.concatenate(targets[len(train) :])
        if not replayed.sum():
            raise BadDataError("replay_data has no document that can be trained on, but replay_share is set.")
        wanted = replay_share / (1 - replay_share) * trained
        drawn = draw_documents(replayed, wanted, rng, at_least_one=True)
        repeats += np.split(drawn, np.cumsum([len(count) for count in targets[len(train) : -1]]))
    count = sum(map(len, repeats))
    if max_documents is not None and count > max_documents:
        is_drawn = np.zeros(count, dtype=bool)
        is_drawn[np.random.default_rng(seed).permutation(count)[:max_documents]] = True
        ends = np.cumsum([len(one) for one in repeats[:-1]])
        repeats = [one * own for one, own in zip(repeats, np.split(is_drawn, ends), strict=True)]
    return [
        of_documents.astype(np.int32)[np.cumsum(scan.lines["first"]) - 1]
        for scan, of_documents in zip(scans, repeats, strict=True)
    ]
