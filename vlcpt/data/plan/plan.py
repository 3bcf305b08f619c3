"""One pass over every document: what is read how often, and the account of it."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

import numpy as np

from vlcpt.data.encode.encoder import DocumentEncoder
from vlcpt.data.media.names import BESIDE, media_beside
from vlcpt.data.plan.cache import PlanCache
from vlcpt.data.plan.ledger import NOT_READ, Ledger, SourceLedger, TokenCounts, list_reasons
from vlcpt.data.plan.mix import draw_documents, passes_for_shares, repeat_documents
from vlcpt.data.plan.pieces import OrderedScans
from vlcpt.data.plan.scan import COLUMNS, PART_COLUMNS, BadRow, PreparedScanner, Scan, SourceScanner
from vlcpt.data.plan.split import OnOverlong
from vlcpt.data.prepared.read import PreparedRows
from vlcpt.data.rows.jsonl import MemoryRows
from vlcpt.data.sources import DocumentSource

T = TypeVar("T")

_AT_ONCE = 1 << 16  # lines
_KINDS = ("B", "H", "i")  # of one, two and four bytes


class Columns:
    """Lines of named 32-bit integers, to which more can be added.

    A column with one number throughout takes no memory, any other one, two or four bytes a line. Workers
    share it with the process that they were forked from.

    Args:
        names: Of the columns.

    Example:
        >>> columns = Columns(["row", "images"])
        >>> columns.extend({"row": np.arange(3), "images": np.zeros(3, np.int32)})
        >>> len(columns), columns["row"], columns.line(2)
        (3, array([0, 1, 2]), {'row': 2, 'images': 0})
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._columns = {name: _Column() for name in names}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def extend(self, lines: Mapping[str, np.ndarray]) -> None:
        """Add lines: of each column as many integers."""
        added = {len(lines[name]) for name in self._columns}
        if len(added) != 1:
            raise ValueError(f"columns of different lengths: {sorted(added)}")
        for name, column in self._columns.items():
            column.extend(lines[name])
        self._length += added.pop()

    def __getitem__(self, name: str) -> np.ndarray:
        """One column: int64 (N,)."""
        return self._columns[name].stored(self._length).astype(np.int64)

    def lines(self, numbers: np.ndarray | slice) -> dict[str, np.ndarray]:
        """Some lines: int64 (K,) of each column."""
        return {
            name: column.stored(self._length)[numbers].astype(np.int64)
            for name, column in self._columns.items()
        }

    def line(self, number: int) -> dict[str, int]:
        """One line."""
        return {name: int(column.stored(self._length)[number]) for name, column in self._columns.items()}

    def pieces(self) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
        """All lines, some at a time, with their place: in memory all would stand beside what they become."""
        for first in range(0, self._length, _AT_ONCE):
            some = slice(first, min(first + _AT_ONCE, self._length))
            yield some, self.lines(some)


class _Column:
    """One number for all lines, until there is a second one."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._numbers: array[int] | None = None
        self._length = 0

    def extend(self, numbers: np.ndarray) -> None:
        if not len(numbers):
            return
        least, most = int(numbers.min()), int(numbers.max())
        needed = _kind(least, most)
        if self._number is None:
            self._number = least
        if self._numbers is None and not least == most == self._number:
            self._numbers = array(_kind(self._number, self._number), [self._number]) * self._length
        self._length += len(numbers)
        if self._numbers is None:
            return
        kind = max(self._numbers.typecode, needed, key=_KINDS.index)
        if kind != self._numbers.typecode:
            self._numbers = array(
                kind, np.frombuffer(self._numbers, self._numbers.typecode).astype(kind).tobytes()
            )
        self._numbers.frombytes(numbers.astype(kind).tobytes())

    def stored(self, length: int) -> np.ndarray:
        if self._numbers is None:
            return np.broadcast_to(np.int32(self._number or 0), length)
        return np.frombuffer(self._numbers, self._numbers.typecode)


def _kind(least: int, most: int) -> str:
    """The smallest kind that holds numbers from ``least`` to ``most``."""
    for kind in _KINDS:
        limits = np.iinfo(kind)
        if limits.min <= least and most <= limits.max:
            return kind
    raise OverflowError(f"numbers from {least} to {most} take more than 32 bits")


@dataclass
class SourceScan:
    """What reading a whole source gave; see :class:`Scan`.

    Args:
        documents: Those that can be trained on, in order: a line each, of ``COLUMNS``.
        parts: Theirs, in order, of ``PART_COLUMNS``.
        rows, marks, dropped_tokens, unused: As of a scan.
    """

    documents: Columns = field(default_factory=lambda: Columns(COLUMNS))
    parts: Columns = field(default_factory=lambda: Columns(PART_COLUMNS))
    rows: int = 0
    marks: Counter[str] = field(default_factory=Counter)
    dropped_tokens: Counter[str] = field(default_factory=Counter)
    unused: list[BadRow] = field(default_factory=list)


def joined(scans: Iterable[Scan]) -> SourceScan:
    """One scan from those of neighbouring pieces, each of which is let go as soon as it is in.

    Example:
        >>> import numpy as np
        >>> empty = Scan(np.zeros((0, len(COLUMNS))), np.zeros((0, len(PART_COLUMNS))), rows=3)
        >>> joined([empty, empty]).rows
        6
    """
    whole = SourceScan()
    for scan in scans:
        whole.documents.extend(dict(zip(COLUMNS, scan.documents.T, strict=True)))
        whole.parts.extend(dict(zip(PART_COLUMNS, scan.parts.T, strict=True)))
        whole.rows += scan.rows
        whole.marks += scan.marks
        whole.dropped_tokens += scan.dropped_tokens
        whole.unused += scan.unused
    return whole


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


OnBadData = Literal["error", "skip"]
MAX_BAD_IN_A_ROW = 100
SAMPLE_COLUMNS = ("source", "row", *PART_COLUMNS)


class BadDataError(ValueError):
    """More unusable rows than ``max_bad_fraction`` allows, or no usable one.

    Args:
        ledger: The account of all rows, where all were read.
    """

    def __init__(self, message: str, ledger: Ledger | None = None) -> None:
        super().__init__(message)
        self.ledger = ledger


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


@dataclass
class Plan:
    """What is read in one pass.

    Args:
        scans: Of each source, those documents that can be trained on.
        repeats: Of each source, int64, how often each of them is read; 0 where replay did not draw it.
        ledger: The account of all.
    """

    scans: list[SourceScan]
    repeats: list[np.ndarray]
    ledger: Ledger

    def samples(self) -> Columns:
        """Every sample of the pass, of ``SAMPLE_COLUMNS``."""
        found = Columns(SAMPLE_COLUMNS)
        for source, (scan, repeats) in enumerate(zip(self.scans, self.repeats, strict=True)):
            done = 0  # parts
            for some, documents in scan.documents.pieces():
                count = int(documents["parts"].sum())
                parts = scan.parts.lines(slice(done, done + count))
                done += count
                parts["source"] = np.full(count, source)
                parts["row"] = np.repeat(documents["row"], documents["parts"])
                order = _repeated(documents["parts"], repeats[some])
                found.extend({name: column[order] for name, column in parts.items()})
        return found

    def rows_with(self, column: str) -> np.ndarray:
        """Documents that are read and have any of ``images`` or ``videos``: int64 (N, 2), source and row."""
        found = []
        for source, (scan, repeats) in enumerate(zip(self.scans, self.repeats, strict=True)):
            rows = scan.documents["row"][(scan.documents[column] > 0) & (repeats > 0)]
            found.append(np.column_stack([np.full(len(rows), source), rows]))
        return np.concatenate(found)

    def enter_failure(self, account: SourceLedger, source: int, row: int, reason: str) -> None:
        """Move a document from used to dropped, whole."""
        enter_failure(account, self.scans[source], self.repeats[source], row, reason)


def _repeated(parts: np.ndarray, repeats: np.ndarray) -> np.ndarray:
    """The parts of each document together, by number, as often as the document is read."""
    starts = np.repeat(np.cumsum(parts) - parts, repeats)
    counts = np.repeat(parts, repeats)
    inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(starts, counts) + inside


def make_plan(
    train: Sequence[DocumentSource],
    replay: Sequence[DocumentSource],
    encoder: DocumentEncoder,
    *,
    max_length: int,
    replay_share: float,
    seed: int,
    on_overlong: OnOverlong,
    on_bad_data: OnBadData,
    max_bad_fraction: float,
    max_bad_in_a_row: int | None = MAX_BAD_IN_A_ROW,
    num_proc: int = 0,
    timeout: float = 0,
    cache: PlanCache | None = None,
    track: Track = untracked,
) -> Plan:
    """Read every document once and decide what one pass trains on.

    Args:
        train: Sources that define the pass.
        replay: Sources that fill ``replay_share`` of all targets.
        encoder: Encodes documents; only headers of media are read.
        max_length: Tokens of a sample.
        replay_share: Part of all targets that replay makes up; 0 ≤ share < 1.
        seed: Decides what replay draws and what is repeated.
        on_overlong, on_bad_data, max_bad_fraction: See the configuration.
        max_bad_in_a_row: With ``skip``, how many unusable rows in a row stop the run; None: no number does.
        num_proc: Processes that read, where it is worth to start them; 0: this one alone.
        timeout: Seconds in which each of them must come to another row; 0: any time.
        cache: Where processes share the reading, and what was read stays. The plan is the same.
        track: What shows the progress.

    Raises:
        DocumentError: At the first unusable row, unless those are skipped.
        BadDataError: If too many are.
        LoadingError: If a process that reads died, or stands still.
    """
    sources = [*train, *replay]
    ledger = Ledger([source.name for source in sources])
    scans: list[SourceScan] = []
    for source in sources:
        scanner = _scanner_of(source, encoder)(
            source, encoder, max_length=max_length, on_overlong=on_overlong, stops=on_bad_data == "error"
        )
        folder = None if cache is None else cache.folder(source, max_length, on_overlong, on_bad_data)
        ordered = OrderedScans(scanner, num_proc, folder, timeout)
        scan = joined(_scans(source, ordered, max_bad_in_a_row, track))
        enter_unused(ledger, ledger.sources[source.name], scan)
        for name, count in _not_read(source, scan).items():
            ledger.sources[source.name].documents[NOT_READ + name] = count
        _check_bad(source, scan, max_bad_fraction)
        scans.append(scan)
    if cache is not None:
        cache.remove_old()
    _check_any(ledger, scans, train)
    repeats = _repeats(scans, train, replay_share, seed)
    plan = Plan(scans, repeats, ledger)
    for source, scan, times in zip(sources, scans, repeats, strict=True):
        enter_used(ledger.sources[source.name], scan, times)
    enter_shares(ledger, sources, scans, repeats, train=len(train), replay_share=replay_share)
    ledger.check()
    return plan


def _not_read(source: DocumentSource, scan: SourceScan) -> dict[str, int]:
    """What of a source was not read and no row says of itself; of one that was prepared, all."""
    if isinstance(source.rows, PreparedRows):
        return source.rows.not_read
    media = sum(int(scan.documents[kind].sum()) for kind in ("images", "videos"))
    return files_beside(source, documents=len(scan.documents["row"]), media=media)


def files_beside(source: DocumentSource, *, documents: int, media: int) -> dict[str, int]:
    """Files that lie beside the rows of a source and are not read, by what they are.

    Args:
        source: The source.
        documents: How many of its documents are used.
        media: How many media these have.

    Example:
        >>> from vlcpt.data.sources import open_source
        >>> files_beside(open_source([{"text": "a"}]), documents=1, media=0)
        {}
    """
    found: dict[str, int] = {}
    # Media that may be those of rows of which none has one; nothing is beside a saved data set, or one from
    # the Hub, and of rows that could all not be used, their own messages say why.
    is_told = source.unread is not None and source.unread.format != "text" and source.media_root is not None
    if is_told and not isinstance(source.rows, MemoryRows) and documents and not media:
        found[BESIDE] = media_beside(str(source.media_root))
    return found | source.left_out()


def _scanner_of(source: DocumentSource, encoder: DocumentEncoder) -> type[SourceScanner]:
    """What reads a source: of one that was encoded before, the integers are enough, unless media are to be
    looked into."""
    is_prepared = isinstance(source.rows, PreparedRows)
    return PreparedScanner if is_prepared and type(encoder) is DocumentEncoder else SourceScanner


def _scans(
    source: DocumentSource, scans: OrderedScans, max_bad_in_a_row: int | None, track: Track
) -> Iterator[Scan]:
    """Read a source, in order whoever reads it."""
    last, length = -1, 0  # the last unusable row, and how many there are in a row
    with scans:
        for scan in track(scans, f"reading {source.name}"):
            if scan.error is not None:
                raise scan.error
            yield scan
            for unused in scan.unused:
                if not unused.is_bad:
                    continue
                length = length + 1 if unused.row == last + 1 else 1
                last = unused.row
                if max_bad_in_a_row is not None and length >= max_bad_in_a_row:
                    raise BadDataError(f"{length} unusable rows in a row, the last: {unused.message}")


def _check_bad(source: DocumentSource, scan: SourceScan, max_bad_fraction: float) -> None:
    bad = [unused for unused in scan.unused if unused.is_bad]
    if len(bad) > max_bad_fraction * scan.rows:
        raise BadDataError(
            f"{len(bad)} of {scan.rows} rows of {source.name!r} cannot be used, more than "
            f"max_bad_fraction {max_bad_fraction:g}. "
            f"Reasons: {list_reasons(Counter(unused.dropped.reason for unused in bad))}. "
            f"The first: {' | '.join(unused.message for unused in bad[:3])}"
            + (f" | The last: {bad[-1].message}" if len(bad) > 3 else "")
        )


def _check_any(ledger: Ledger, scans: Sequence[SourceScan], train: Sequence[DocumentSource]) -> None:
    """Raise where nothing can be trained on, in all sources or in one that is to have a share."""
    _check_some(ledger, scans, train)
    for scan, source in zip(scans, train, strict=False):
        if source.share is not None:
            _check_some(ledger, [scan], [source], f" of {source.name!r}, which has share {source.share:g},")


def _check_some(
    ledger: Ledger, scans: Sequence[SourceScan], train: Sequence[DocumentSource], whose: str = ""
) -> None:
    if any(len(scan.documents) for scan in scans[: len(train)]):
        return
    accounts = [ledger.sources[source.name] for source in train]
    reasons = sum((account.dropped_documents for account in accounts), Counter())
    read = sum(account.documents["read"] for account in accounts)
    # Of rows that cannot be read, no tag mends any.
    unmarked = [
        source
        for source, account in zip(train, accounts, strict=True)
        if account.dropped_documents.keys() & {"without_targets", "untagged"}
    ]
    todo = "".join({f" {how}": None for source in unmarked if (how := source.marking)})
    first = next((row.message for scan in scans[: len(train)] for row in scan.unused if row.is_bad), "")
    raise BadDataError(
        f"none of {read} documents{whose} can be trained on. "
        f"Reasons: {list_reasons(reasons)}.{todo}" + (f" The first: {first}" if first else ""),
        ledger,
    )


def _repeats(
    scans: list[SourceScan], train: Sequence[DocumentSource], replay_share: float, seed: int
) -> list[np.ndarray]:
    """How often each document of each source is read."""
    rng = np.random.default_rng(seed)
    targets = [scan.documents["targets"] for scan in scans]
    passes = passes_for_shares(
        [int(count.sum()) for count in targets[: len(train)]], [source.share for source in train]
    )
    repeats = [
        _as_one(repeat_documents(count, times, rng)) for count, times in zip(targets, passes, strict=False)
    ]
    if len(scans) == len(train):
        return repeats
    trained = sum(int((count * times).sum()) for count, times in zip(targets, repeats, strict=False))
    replayed = np.concatenate(targets[len(train) :])
    if not replayed.sum():
        raise BadDataError("replay_data has no document that can be trained on, but replay_share is set.")
    wanted = replay_share / (1 - replay_share) * trained
    drawn = draw_documents(replayed, wanted, rng, at_least_one=True)
    ends = np.cumsum([len(count) for count in targets[len(train) :]])
    return repeats + np.split(drawn, ends[:-1])


def _as_one(repeats: np.ndarray) -> np.ndarray:
    """The same numbers, but one for all if they are alike, as without replay and shares."""
    is_same = len(repeats) > 0 and (repeats == repeats[0]).all()
    return np.broadcast_to(repeats[0].copy(), len(repeats)) if is_same else repeats
