"""One pass over every document: its parts, its tokens in the ledger, and how often it is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

import numpy as np

from vlcpt.data.documents import Document, DocumentError
from vlcpt.data.encoding import DocumentEncoder
from vlcpt.data.ledger import Dropped, Ledger, SourceLedger, TokenCounts, count_tokens
from vlcpt.data.mixing import draw_documents, passes_for_shares, repeat_documents
from vlcpt.data.readers.files import DocumentSource
from vlcpt.data.splitting import OnOverlong, Part, split_stream

OnBadData = Literal["error", "skip"]
MAX_BAD_IN_A_ROW = 100

T = TypeVar("T")


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


class BadDataError(ValueError):
    """More unusable rows than ``max_bad_fraction`` allows."""


@dataclass(frozen=True)
class PlannedDocument:
    """A document that can be trained on, and where its row is.

    Args:
        source: Number of the source.
        row: Number of the row in it.
        parts: Its samples.
        counts: Its tokens, for the ledger.
        images, videos: How many it has.
    """

    source: int
    row: int
    parts: tuple[Part, ...]
    counts: TokenCounts
    images: int
    videos: int


@dataclass
class Plan:
    """What is read in one pass.

    Args:
        documents: Those that can be trained on, in order of source and row.
        repeats: int64, how often each of them is read; 0 where replay did not draw it.
        ledger: The account of all.
    """

    documents: list[PlannedDocument] = field(default_factory=list)
    repeats: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    ledger: Ledger = field(default_factory=lambda: Ledger([]))


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
        track: What shows the progress.

    Raises:
        DocumentError: At the first unusable row, unless those are skipped.
        BadDataError: If too many are.
    """
    sources = [*train, *replay]
    plan = Plan(ledger=Ledger([source.name for source in sources]))
    for number, source in enumerate(sources):
        plan.documents += _scan(
            number,
            source,
            encoder,
            plan.ledger,
            max_length,
            on_overlong,
            on_bad_data,
            max_bad_fraction,
            track,
        )
    if not any(document.source < len(train) for document in plan.documents):
        accounts = [plan.ledger.sources[source.name] for source in train]
        reasons = sum((account.dropped_documents for account in accounts), Counter())
        raise BadDataError(
            f"none of {sum(account.documents['read'] for account in accounts)} documents can be trained on. "
            f"Reasons: {dict(reasons)}. Mark targets with <trainable_text>."
        )
    targets = np.array([document.counts.targets for document in plan.documents], dtype=np.int64)
    of_source = np.array([document.source for document in plan.documents])
    plan.repeats = _repeats(targets, of_source, sources, len(train), replay_share, seed)
    _account(plan, targets, of_source, sources, len(train), replay_share)
    plan.ledger.check()
    return plan


def _scan(
    number: int,
    source: DocumentSource,
    encoder: DocumentEncoder,
    ledger: Ledger,
    max_length: int,
    on_overlong: OnOverlong,
    on_bad_data: OnBadData,
    max_bad_fraction: float,
    track: Track,
) -> list[PlannedDocument]:
    """Read one source; what cannot be used goes to the ledger."""
    account = ledger.sources[source.name]
    found: list[PlannedDocument] = []
    bad, bad_in_a_row, last = 0, 0, ""
    for row in track(range(len(source)), f"reading {source.name}"):
        account.documents["read"] += 1
        document: Document | None = None
        try:
            document = source.document(row)
            planned = _plan_document(document, number, row, encoder, account, max_length, on_overlong)
        except DocumentError as error:
            if error.kind != "overlong" or on_overlong != "drop":
                if on_bad_data == "error" or error.kind == "overlong":
                    raise
                bad, bad_in_a_row, last = bad + 1, bad_in_a_row + 1, str(error)
                if bad_in_a_row >= MAX_BAD_IN_A_ROW:
                    raise BadDataError(f"{bad_in_a_row} unusable rows in a row, the last: {last}") from None
            else:
                bad_in_a_row = 0
            _drop(ledger, account, source, row, document, error.kind, error.reason)
            continue
        bad_in_a_row = 0
        if planned is None:
            _drop(ledger, account, source, row, document, "without_targets", "no token of it is a target")
        else:
            found.append(planned)
    if bad > max_bad_fraction * len(source):
        raise BadDataError(
            f"{bad} of {len(source)} rows of {source.name!r} cannot be used, more than max_bad_fraction "
            f"{max_bad_fraction:g}. Reasons: {dict(account.dropped_documents)}. The last: {last}"
        )
    return found


def _plan_document(
    document: Document,
    source: int,
    row: int,
    encoder: DocumentEncoder,
    account: SourceLedger,
    max_length: int,
    on_overlong: OnOverlong,
) -> PlannedDocument | None:
    """The document's parts, None without targets; its marks are counted on the way."""
    stream = encoder.tokens(document)
    account.documents["untagged"] += not document.tagged
    account.documents["empty_spans"] += document.empty_spans
    account.documents["cut_edges"] += stream.cut_edges
    try:
        parts = split_stream(stream, max_length, on_overlong=on_overlong, source=document.source)
    except DocumentError as error:
        account.tokens["read"] += len(stream)
        account.dropped_tokens[error.kind] += len(stream)
        raise
    if not parts:
        account.tokens["read"] += len(stream)
        account.documents["without_targets"] += 1
        account.dropped_tokens["without_targets"] += len(stream)
        return None
    counts = count_tokens(stream, parts)
    return PlannedDocument(source, row, tuple(parts), counts, len(document.images), len(document.videos))


def _drop(
    ledger: Ledger,
    account: SourceLedger,
    source: DocumentSource,
    row: int,
    document: Document | None,
    reason: str,
    detail: str,
) -> None:
    account.dropped_documents[reason] += 1
    place = (document.source if document else None) or source.rows.source(row)
    ledger.dropped.append(Dropped(place.path, place.line, document.id if document else None, reason, detail))


def _repeats(
    targets: np.ndarray,
    of_source: np.ndarray,
    sources: Sequence[DocumentSource],
    train: int,
    replay_share: float,
    seed: int,
) -> np.ndarray:
    """How often each document is read."""
    rng = np.random.default_rng(seed)
    repeats = np.zeros(len(targets), dtype=np.int64)
    totals = [int(targets[of_source == number].sum()) for number in range(train)]
    passes = passes_for_shares(totals, [source.share for source in sources[:train]])
    for number in range(train):
        mine = of_source == number
        repeats[mine] = repeat_documents(targets[mine], passes[number], rng)
    wanted = replay_share / (1 - replay_share) * int((targets * repeats).sum())
    replayed = of_source >= train
    if replay_share and not targets[replayed].sum():
        raise BadDataError("replay_data has no document that can be trained on, but replay_share is set.")
    repeats[replayed] = draw_documents(targets[replayed], wanted, rng)
    return repeats


def _account(
    plan: Plan,
    targets: np.ndarray,
    of_source: np.ndarray,
    sources: Sequence[DocumentSource],
    train: int,
    replay_share: float,
) -> None:
    """Enter the documents that were read and not dropped."""
    for document, repeats in zip(plan.documents, plan.repeats.tolist(), strict=True):
        account = plan.ledger.sources[sources[document.source].name]
        counts = document.counts
        account.tokens["read"] += counts.read
        if not repeats:
            account.documents["not_drawn"] += 1
            account.tokens["not_drawn"] += counts.read
            continue
        account.documents["used"] += 1
        account.documents["split"] += len(document.parts) > 1
        account.documents["repeats"] += repeats - 1
        account.samples += repeats * len(document.parts)
        for key in ("targets", "context", "media", "special", "trimmed", "targets_without_context"):
            account.tokens[key] += getattr(counts, key)
        account.tokens["repeated"] += counts.repeated
    read = targets * plan.repeats
    for number, source in enumerate(sources):
        account = plan.ledger.sources[source.name]
        account.share_asked = source.share if number < train else None
        account.share_realised = round(float(read[of_source == number].sum() / max(read.sum(), 1)), 6)
    if len(sources) == train + 1:
        plan.ledger.sources[sources[train].name].share_asked = replay_share
