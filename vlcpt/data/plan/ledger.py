"""What happened to every document and token that was read, exactly."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from vlcpt.data.documents import DocumentError, Source
from vlcpt.data.encode.encoder import TokenStream
from vlcpt.data.plan.split import Part
from vlcpt.data.shown import table_html
from vlcpt.file_writes import write_file

DOCUMENT_COUNTS = (
    "read",
    "used",
    "not_drawn",
    "untagged",
    "split",
    "without_targets",
    "cut_edges",
    "empty_spans",
    "repeats",
)
NOT_READ = "not read: "  # before the name of a field, among a source's counts of documents


class TokenCounts(NamedTuple):
    """The tokens of one document, by what becomes of them; they add up to ``read``.

    Args:
        read: All.
        targets: Trained.
        context: Text that is read and not trained; ``targets_without_context`` are part of it.
        media: Pad tokens.
        special: Vision start and end.
        trimmed: After a sample's last target, or in a part without one.
        targets_without_context: A document's first token, where it is inside a span.
        repeated: Opening tokens of later parts; outside the sum.
    """

    read: int = 0
    targets: int = 0
    context: int = 0
    media: int = 0
    special: int = 0
    trimmed: int = 0
    targets_without_context: int = 0
    repeated: int = 0


TOKEN_COUNTS = (*TokenCounts._fields, "not_drawn")


def count_tokens(stream: TokenStream, parts: list[Part]) -> TokenCounts:
    """Count a document's tokens.

    Example:
        >>> import numpy as np
        >>> labels = np.array([-100, 7, -100])
        >>> stream = TokenStream(np.arange(3), labels, (labels > 0) * 1.0, (), 0, 0)
        >>> counts = count_tokens(stream, [Part(0, 2, False, 1)])
        >>> counts.targets, counts.context, counts.trimmed
        (1, 1, 1)
    """
    spans = [(part.start + part.repeated, part.stop) for part in parts]
    kept = sum(stop - start for start, stop in spans)
    targets = sum(part.targets for part in parts)
    # A part never cuts a medium. Its start and end are the only special tokens that can be kept:
    # end-of-text that is no target comes after the last one.
    media = [
        placed.tokens
        for placed in stream.media
        if any(start <= placed.start and placed.stop <= stop for start, stop in spans)
    ]
    # A lost target is context, also where it stands in a part that is dropped.
    alone = stream.without_context if spans and spans[0][0] > 0 else 0
    return TokenCounts(
        read=len(stream),
        targets=targets,
        context=kept - targets - sum(media) - 2 * len(media) + alone,
        media=sum(media),
        special=2 * len(media),
        trimmed=len(stream) - kept - alone,
        targets_without_context=stream.without_context,
        repeated=sum(part.repeated for part in parts),
    )


@dataclass
class SourceLedger:
    """The account of one source; the keys are those of ``ledger.json``."""

    documents: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    dropped_documents: Counter[str] = field(default_factory=Counter)
    dropped_tokens: Counter[str] = field(default_factory=Counter)
    samples: int = 0
    share_asked: float | None = None
    share_realised: float | None = None

    @property
    def not_read(self) -> dict[str, int]:
        """Fields that the source's format does not read, with their documents, the most frequent first."""
        return {
            name.removeprefix(NOT_READ): count
            for name, count in self.documents.most_common()
            if count and name.startswith(NOT_READ)
        }

    def imbalance(self) -> str | None:
        """What does not add up, or None."""
        documents, tokens = self.documents, self.tokens
        used = documents["used"] + documents["not_drawn"] + self.dropped_documents.total()
        kept = sum(tokens[key] for key in ("targets", "context", "media", "special", "trimmed", "not_drawn"))
        kept += self.dropped_tokens.total()
        if documents["read"] != used:
            return f"{documents['read']} documents were read but {used} are accounted for"
        if tokens["read"] != kept:
            return f"{tokens['read']} tokens were read but {kept} are accounted for"
        return None

    def as_json(self) -> dict[str, object]:
        """The source as ``ledger.json`` has it."""
        documents: dict[str, object] = {key: self.documents[key] for key in DOCUMENT_COUNTS}
        tokens: dict[str, object] = {key: self.tokens[key] for key in TOKEN_COUNTS}
        documents["dropped"] = dict(sorted(self.dropped_documents.items()))
        tokens["dropped"] = dict(sorted(self.dropped_tokens.items()))
        found: dict[str, object] = {"documents": documents, "tokens": tokens, "samples": self.samples}
        if self.not_read:
            found["not_read"] = self.not_read
        if self.share_realised is not None:
            found["share"] = {"asked": self.share_asked, "realised": self.share_realised}
        return found


def list_reasons(counts: Mapping[str, int]) -> str:
    """Counts by reason, as a message has them.

    Example:
        >>> list_reasons({"medium": 2, "row": 1})
        '2 medium, 1 row'
    """
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


@dataclass(frozen=True)
class Dropped:
    """One document that is not used."""

    source: str
    line: int
    id: str | None
    reason: str
    detail: str

    @classmethod
    def by(cls, error: DocumentError, source: Source) -> Dropped:
        """A document of this source, unless the error names another one."""
        place = error.source or source
        return cls(place.path, place.line, place.id, error.kind, error.detail)

    def as_line(self) -> str:
        """Its line of ``dropped.jsonl``; the default of an id is its place.

        Example:
            >>> Dropped("a.jsonl", 7, None, "markup", "…").as_line()
            '{"source": "a.jsonl", "line": 7, "id": "a.jsonl:7", "reason": "markup", "detail": "…"}\\n'
        """
        whole = {**vars(self), "id": self.id or f"{self.source}:{self.line}"}
        return json.dumps(whole, ensure_ascii=False) + "\n"


class BadDataError(ValueError):
    """More unusable rows than ``max_bad_fraction`` allows, or no usable one.

    Args:
        ledger: The account of all rows, where all were read.
    """

    def __init__(self, message: str, ledger: Ledger | None = None) -> None:
        super().__init__(message)
        self.ledger = ledger


def account_rows(accounts: Sequence[SourceLedger]) -> Iterator[tuple[str, list[int]]]:
    """The rows of a ledger's table: a label, and a count of each account."""

    def row(kind: str, key: str) -> list[int]:
        return [getattr(account, kind)[key] for account in accounts]

    def dropped(kind: str) -> Iterator[tuple[str, list[int]]]:
        for reason in sorted({key for account in accounts for key in +getattr(account, kind)}):
            yield f"  dropped: {reason.replace('_', ' ')}", row(kind, reason)

    # What is deeper is no part of the sum.
    for key, label in (
        ("read", "documents read"),
        ("untagged", "    of these untagged"),
        ("used", "  used"),
        ("split", "    of these split"),
        ("repeats", "    read again"),
        ("not_drawn", "  not drawn"),
    ):
        if key in ("read", "used") or any(row("documents", key)):
            yield label, row("documents", key)
    yield from dropped("dropped_documents")
    if any(row("tokens", "read")):
        yield "tokens read", row("tokens", "read")
    yield "  targets", row("tokens", "targets")
    for key in ("context", "media", "special", "trimmed", "not_drawn"):
        if any(row("tokens", key)):
            yield f"  {key.replace('_', ' ')}", row("tokens", key)
    yield from dropped("dropped_tokens")


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


class Ledger:
    """The account of one planned pass over all sources.

    :attr:`dropped` are its unused documents, :attr:`unmeasured` those of evaluation sets: lines of
    ``dropped.jsonl``, and no part of the account.

    Args:
        sources: Their names, in order.

    Example:
        >>> ledger = Ledger(["train"])
        >>> ledger.sources["train"].documents["read"] += 1
        >>> ledger.check()
        Traceback (most recent call last):
        ...
        RuntimeError: the ledger of 'train' does not balance: 1 documents were read but 0 are accounted for
    """

    def __init__(self, sources: list[str]) -> None:
        self.sources = {name: SourceLedger() for name in sources}
        self.dropped: list[Dropped] = []
        self.unmeasured: list[Dropped] = []
        self.samples = 0
        self.packs = 0
        self.fill: float | None = None

    @property
    def total(self) -> SourceLedger:
        """All sources together."""
        total = SourceLedger()
        for source in self.sources.values():
            total.documents += source.documents
            total.tokens += source.tokens
            total.dropped_documents += source.dropped_documents
            total.dropped_tokens += source.dropped_tokens
            total.samples += source.samples
        return total

    def table(self) -> tuple[list[str], list[tuple[str, list[str]]], str]:
        """What came in, what is used, what was dropped and why, what is trained: as a table shows it.

        Returns:
            The columns, a source each; the rows, a label and a cell of each column; a caption.
        """
        accounts = dict(self.sources)
        if len(accounts) > 1:
            accounts["total"] = self.total
        rows = [
            (label, [f"{number:,}" for number in counts])
            for label, counts in account_rows([*accounts.values()])
        ]
        if len(self.sources) > 1:
            sources = self.sources.values()
            rows.append(("share of targets", [*(_share(one.share_realised) for one in sources), ""]))
            if any(one.share_asked is not None for one in sources):
                rows.append(("  asked", [*(_share(one.share_asked) for one in sources), ""]))
        caption = ""
        if self.fill is not None:
            caption = f"{self.packs:,} pack{'s' * (self.packs != 1)}, {self.fill:.1%} full"
        return [*accounts], rows, caption

    def __repr__(self) -> str:
        total = self.total
        found = f"{total.documents['used']:,} of {total.documents['read']:,} documents used"
        found += f", {total.tokens['targets']:,} targets in {total.tokens['read']:,} tokens"
        return f"<Ledger of {', '.join(self.sources)}: {found}>"

    def _repr_html_(self) -> str:
        return table_html("ledger", *self.table())

    def check(self) -> None:
        """Raise if anything that was read is not accounted for."""
        for name, source in (*self.sources.items(), ("total", self.total)):
            wrong = source.imbalance()
            if wrong:
                raise RuntimeError(f"the ledger of {name!r} does not balance: {wrong}")

    def as_json(self) -> dict[str, object]:
        """The content of ``ledger.json``."""
        return {
            "sources": {name: source.as_json() for name, source in self.sources.items()},
            "total": self.total.as_json(),
            "samples": self.samples,
            "packs": self.packs,
            "fill": self.fill,
        }

    def write(self, directory: Path) -> None:
        """Write ``ledger.json`` and ``dropped.jsonl``, each whole or not at all.

        Raises:
            WriteError: If the disk is full, or the folder cannot be written.
        """
        lines = "".join(one.as_line() for one in (*self.dropped, *self.unmeasured))
        text = json.dumps(self.as_json(), indent=2, ensure_ascii=False) + "\n"
        write_file(directory / "dropped.jsonl", lines, "the documents that are not used")
        write_file(directory / "ledger.json", text, "the account of the data")
