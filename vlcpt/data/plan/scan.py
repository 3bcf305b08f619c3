"""A source is read once: each document becomes lines of one array, and what is lost of it is counted."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple
from zlib import crc32

import numpy as np
from torch.utils.data import Dataset

from vlcpt.data.documents import Document, DocumentError, Image, Medium, Segment, Text, TurnEdge
from vlcpt.data.encode.encoder import DocumentEncoder
from vlcpt.data.encode.streams import TokenStream, closed_stream
from vlcpt.data.encode.tokens import Run
from vlcpt.data.media.files import MediaError, resolve
from vlcpt.data.plan.ledger import NOT_READ, BadDataError, Dropped, TokenCounts, count_tokens
from vlcpt.data.plan.split import OnOverlong, Part, split_stream
from vlcpt.data.prepared.read import PreparedRows
from vlcpt.data.rows.base import FileState, file_state
from vlcpt.data.sources import DocumentSource
from vlcpt.data.workers import WorkerBoard, read_by_workers

OnBadData = Literal["error", "skip"]
PIECE_ROWS = 512  # that a worker reads before it hands them over
PREPARED_ROWS = 1 << 15  # the same where only integers are read
WORTH_WORKERS = 1.0  # seconds of reading; to start workers takes a part of one
# So many rows are read before their texts are encoded, all in one call; or so many characters and bytes of
# media, as all of them are held.
AHEAD, MOST_AHEAD = 64, 1 << 16
_MARKS = ("untagged", "empty_spans", "cut_edges")

# A line is a part of a document, in the order of rows. The numbers of the complete document stand in the line
# of its first part, and are 0 in the others: so sums over lines are sums over documents.
LINE = np.dtype(
    [
        ("row", "i4"),
        ("first", "?"),  # whether it is the first part of its document
        ("images", "i4"),
        ("videos", "i4"),
        *((name, "i4") for name in TokenCounts._fields),
        ("start", "i4"),
        ("stop", "i4"),
        # Of the complete document. 31 bits are enough: a row that was rewritten escapes once in two billion,
        # and the first that does not stops the run.
        ("checksum", "i4"),
    ]
)


class Cost(NamedTuple):
    """What a document that can be trained on costs.

    Args:
        counts: Its tokens, by what becomes of them.
        parts: Its parts, at least one.
        checksum: See :attr:`TokenStream.checksum`.
        images, videos: How many it has.
    """

    counts: TokenCounts
    parts: Sequence[Part]
    checksum: int
    images: int = 0
    videos: int = 0

    def lines(self, row: int) -> Iterator[tuple[int, ...]]:
        """One for each part, as ``LINE`` has them."""
        about = (self.images, self.videos)
        counts = self.counts
        for number, part in enumerate(self.parts):
            own = counts._replace(targets=part.targets, media=part.media, repeated=part.repeated)
            yield (row, not number, *about, *own, part.start, part.stop, self.checksum)
            about, counts = (0, 0), TokenCounts()


Opened = Document | DocumentError
Encoded = Cost | TokenStream | None  # None: not yet


def scan_texts(
    encoder: DocumentEncoder, documents: Sequence[Document], max_length: int
) -> list[Cost | TokenStream | DocumentError]:
    """Encode many documents that hold text and nothing else.

    Args:
        encoder: Gives the tokens.
        documents: What to encode, each with at least one text.
        max_length: Tokens of a sample.

    Returns:
        Of each document what it costs. Its tokens where there is more to say of it: without targets, longer
        than ``max_length``, or cut at the edge of a span; or what is wrong with it.

    Example:
        >>> from vlcpt import load_processor, parse_markup
        >>> from vlcpt.demo import base_path
        >>> texts = ["one <trainable_text>two</trainable_text>", "<trainable_text></trainable_text>three"]
        >>> found = scan_texts(DocumentEncoder(load_processor(base_path())), [*map(parse_markup, texts)], 64)
        >>> found[0].counts.targets, len(found[1])
        (2, 2)
    """
    texts = [[one for one in document.segments if isinstance(one, Text)] for document in documents]
    runs = encoder.runs.uncut(texts)
    closings = np.array([encoder.eos_weight(document) for document in documents], dtype=np.float32)
    ids = np.insert(runs.ids, runs.ends, encoder.eos).astype("<i4")
    weights = np.insert(runs.weights, runs.ends, closings).astype("<f4")
    ends = runs.ends + np.arange(1, len(documents) + 1)
    starts = np.append(0, ends[:-1])
    without_context = (weights[starts] > 0).astype(np.int64)
    weights[starts] = 0
    is_target = weights > 0
    targets = np.add.reduceat(is_target.astype(np.int64), starts)
    places = np.where(is_target, np.arange(1, len(weights) + 1), 0)
    stops = np.maximum.reduceat(places, starts) - starts
    counts = np.stack([ends - starts, targets, stops, without_context, starts, ends], axis=1)
    of_ids, of_weights = ids.data.cast("B"), weights.data.cast("B")
    found: list[Cost | TokenStream | DocumentError] = []
    for number, (read, trained, stop, lost, start, end) in enumerate(counts.tolist()):
        if runs.is_uncut[number] and trained and stop <= max_length:
            of_both = crc32(of_weights[4 * start : 4 * end], crc32(of_ids[4 * start : 4 * end]))
            tokens = TokenCounts(
                read, trained, context=stop - trained, trimmed=read - stop, targets_without_context=lost
            )
            found.append(Cost(tokens, [Part(0, stop, False, trained)], of_both & 0x7FFFFFFF))
            continue
        of_text = slice(start - number, end - number - 1)
        run = Run(runs.ids[of_text], runs.weights[of_text], 0)
        try:
            if not runs.is_uncut[number]:
                run = encoder.runs.cut(texts[number])
        except DocumentError as error:
            found.append(error.at(documents[number].source))
            continue
        closing_weight = float(closings[number])
        found.append(
            closed_stream([run.ids], [run.weights], encoder.eos, closing_weight, cut_edges=run.cut_edges)
        )
    return found


class BadRow(NamedTuple):
    """A document that is not used.

    Args:
        row: Its number in the source.
        dropped: Its line of ``dropped.jsonl``.
        message: The complete error.
        is_bad: Whether it counts against ``max_bad_fraction``: not if only its targets are missing, or
            if it is too long and such documents are to be dropped.
        files: The state of its media, by the paths that the row has, where one of them may be what is wrong.
    """

    row: int
    dropped: Dropped
    message: str
    is_bad: bool
    files: tuple[FileState, ...] = ()


@dataclass
class Scan:
    """What reading some rows of one source gave, or all of them.

    Args:
        rows: How many rows were read.
        lines: ``LINE`` (N,), of the documents that can be trained on, in order.
        marks: ``untagged``, ``empty_spans``, ``cut_edges`` of all documents that could be encoded, and the
            fields that were not read.
        dropped_tokens: Tokens of documents that could be encoded and are not used, by reason.
        unused: The documents that are not used, in order.
        error: What stops the run, if anything; nothing after it was read.
    """

    rows: int = 0
    lines: np.ndarray = field(default_factory=lambda: np.zeros(0, LINE))
    marks: Counter[str] = field(default_factory=Counter)
    dropped_tokens: Counter[str] = field(default_factory=Counter)
    unused: list[BadRow] = field(default_factory=list)
    error: DocumentError | None = None


def joined(scans: Iterable[Scan]) -> Scan:
    """One scan from those of neighbouring pieces.

    Example:
        >>> joined([Scan(3), Scan(4)]).rows
        7
    """
    total, content = Scan(), bytearray()
    for scan in scans:
        content += scan.lines.tobytes()
        total.rows += scan.rows
        total.marks += scan.marks
        total.dropped_tokens += scan.dropped_tokens
        total.unused += scan.unused
    total.lines = np.frombuffer(content, LINE)
    return total


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    Args:
        max_length: Tokens of a sample.
        on_overlong: What becomes of longer documents.
        on_bad_data: Whether the first unusable row stops the run.
        max_bad_in_a_row: With ``skip``, how many unusable rows in a row stop it; None: no number does.
        num_proc: Processes that read, where enough is left to read; 0: this one alone.
        timeout: Seconds in which each of them must come to another row; 0: any time.
    """

    max_length: int
    on_overlong: OnOverlong = "split"
    on_bad_data: OnBadData = "error"
    max_bad_in_a_row: int | None = None
    num_proc: int = 0
    timeout: float = 0.0


class SourceScanner(Dataset[Scan]):
    """The rows of one source in pieces: item k reads piece k, in any process. Iterate over it to read all.

    Of a source that was encoded before, the integers are enough, unless media are to be checked: only rows of
    which there is more to say are read.

    Args:
        source: Where the rows are.
        encoder: Encodes documents; only headers of media are read.
        reading: How they are read.
    """

    def __init__(self, source: DocumentSource, encoder: DocumentEncoder, reading: Reading) -> None:
        self._source = source
        self._encoder = encoder
        self._reading = reading
        self._stops = reading.on_bad_data == "error"
        is_plain = type(encoder) is DocumentEncoder
        self._prepared = source.rows if is_plain and isinstance(source.rows, PreparedRows) else None
        self._piece_rows = PIECE_ROWS
        if self._prepared is not None:  # neighbouring shards
            shard_rows = self._prepared.shard_rows
            self._piece_rows = shard_rows * max(1, PREPARED_ROWS // shard_rows)
        self._board = WorkerBoard(source.names)

    def __len__(self) -> int:
        return -(-len(self._source) // self._piece_rows)

    def __getitem__(self, piece: int) -> Scan:
        rows = range(piece * self._piece_rows, min((piece + 1) * self._piece_rows, len(self._source)))
        try:
            if self._prepared is None:
                return self._read(rows, len(rows))
            return self._read_prepared(self._prepared, rows)
        finally:
            self._board.at(None)

    def __iter__(self) -> Iterator[Scan]:
        """The scans of all pieces in order, whoever reads them.

        Raises:
            DocumentError: At a row that stops the run.
            BadDataError: If too many rows in a row cannot be used.
            LoadingError: If a process that reads died, or stands still.
        """
        last, length = -1, 0  # the last unusable row, and how many there are in a row
        with closing(self._pieces()) as pieces:  # so that workers end with an error
            for scan in pieces:
                if scan.error is not None:
                    raise scan.error
                for unused in scan.unused:
                    if not unused.is_bad:
                        continue
                    length = length + 1 if unused.row == last + 1 else 1
                    last = unused.row
                    if length == self._reading.max_bad_in_a_row:
                        raise BadDataError(f"{length} unusable rows in a row, the last: {unused.message}")
                yield scan

    def _pieces(self) -> Generator[Scan]:
        for piece in range(len(self)):
            start = time.perf_counter()
            yield self[piece]
            following = range(piece + 1, len(self))
            num_proc = self._reading.num_proc
            if num_proc and (time.perf_counter() - start) * len(following) > WORTH_WORKERS:
                yield from read_by_workers(self, following, num_proc, self._reading.timeout, self._board)
                return

    def holds(self, scan: Scan) -> bool:
        """Whether a stored scan is still true: a medium that failed may have been put right.

        Media that did not fail are not looked at.
        """
        return all(
            _media_state(file.path, self._source.root_of(row.row)) == file
            for row in scan.unused
            for file in row.files
        )

    def _read(self, rows: Iterable[int], total: int) -> Scan:
        """What these rows of a piece of ``total`` gave."""
        scan, lines = Scan(total), list[tuple[int, ...]]()
        for row, found, encoded in self._encoded(rows):
            self._board.at(row)
            try:
                lines += self._cost(found, encoded, scan).lines(row)
            except DocumentError as error:
                is_dropped = error.kind == "overlong" and self._reading.on_overlong == "drop"
                is_bad = error.kind != "without_targets" and not is_dropped
                if is_bad and (self._stops or error.kind == "overlong"):
                    scan.error = error
                    break
                dropped = Dropped.by(error, self._source.rows.source(row))
                files = _media_files(found) if is_bad and isinstance(found, Document) else ()
                scan.unused.append(BadRow(row, dropped, str(error), is_bad, files))
        scan.lines = np.array(lines, dtype=LINE)
        return scan

    def _encoded(self, rows: Iterable[int]) -> Iterator[tuple[int, Opened, Encoded]]:
        """Each row's document, or what is wrong with it, and what is known by now of its tokens."""
        ahead: list[tuple[int, Opened]] = []
        held = 0
        for row in rows:
            found: Opened
            self._board.at(row)
            try:
                found = self._source.document(row)
                held += sum(map(_size, found.segments))
            except DocumentError as error:
                found = error
            ahead.append((row, found))
            is_last = self._stops and isinstance(found, DocumentError)
            if is_last or len(ahead) == AHEAD or held > MOST_AHEAD:
                yield from self._with_texts(ahead)
                ahead, held = [], 0
        yield from self._with_texts(ahead)

    def _with_texts(self, opened: list[tuple[int, Opened]]) -> Iterator[tuple[int, Opened, Encoded]]:
        """The same, those that hold text alone encoded together."""
        texts = {row: found for row, found in opened if isinstance(found, Document) and _is_text(found)}
        costs = scan_texts(self._encoder, [*texts.values()], self._reading.max_length) if texts else []
        of_row = dict(zip(texts, costs, strict=True))
        for row, found in opened:
            encoded = of_row.get(row)
            yield (row, encoded, None) if isinstance(encoded, DocumentError) else (row, found, encoded)

    def _cost(self, document: Opened, encoded: Encoded, scan: Scan) -> Cost:
        """What a document costs; its marks are entered in the scan, and its tokens if it cannot be used."""
        if isinstance(document, DocumentError):
            raise document
        scan.marks.update(NOT_READ + name for name in document.not_read)
        found = self._encoder.tokens(document) if encoded is None else encoded
        scan.marks["untagged"] += not document.tagged
        scan.marks["empty_spans"] += document.empty_spans
        if isinstance(found, Cost):
            return found
        scan.marks["cut_edges"] += found.cut_edges
        reading = self._reading
        try:
            parts = split_stream(
                found, reading.max_length, on_overlong=reading.on_overlong, source=document.source
            )
            if not parts:
                is_lost = found.without_context
                raise DocumentError(
                    "its only target is its first token, which nothing predicts"
                    if is_lost
                    else "no token of it is a target",
                    kind="without_targets",
                    source=document.source,
                )
        except DocumentError as error:
            scan.dropped_tokens[error.kind] += len(found)
            raise
        images = sum(isinstance(placed.medium, Image) for placed in found.media)
        return Cost(
            count_tokens(found, parts), parts, found.checksum, images, videos=len(found.media) - images
        )

    def _read_prepared(self, prepared: PreparedRows, rows: range) -> Scan:
        first, shard_rows = rows[0], prepared.shard_rows
        index = prepared.index(range(first // shard_rows, -(-(first + self._piece_rows) // shard_rows)))
        is_plain = (index["targets"] > 0) & (index["length"] <= self._reading.max_length)
        scan = self._read((np.flatnonzero(~is_plain) + first).tolist(), len(rows))
        if scan.error is not None:
            return scan
        index = {name: column[is_plain] for name, column in index.items()}
        for mark in _MARKS:
            scan.marks[mark] += int(index[mark].sum())
        lines = np.zeros(len(index["length"]), LINE)
        lines["row"], lines["first"] = np.flatnonzero(is_plain) + first, True
        for name in ("images", "videos", "targets", "checksum"):
            lines[name] = index[name]
        lines["read"], lines["stop"], lines["media"] = index["tokens"], index["length"], index["pads"]
        lines["special"] = 2 * index["media"]
        lines["context"] = lines["stop"] - lines["targets"] - lines["media"] - lines["special"]
        lines["trimmed"] = lines["read"] - lines["stop"]
        lines["targets_without_context"] = index["without_context"]
        together = np.concatenate([scan.lines, lines])
        scan.lines = together[np.argsort(together["row"], kind="stable")]
        return scan


def _is_text(document: Document) -> bool:
    """Whether it is to be encoded, and there is nothing but text in it."""
    segments = document.segments
    return type(document) is Document and bool(segments) and all(isinstance(one, Text) for one in segments)


def _size(segment: Segment) -> int:
    """Characters, or bytes that came with a row."""
    if isinstance(segment, Text):
        return len(segment.text)
    return 0 if isinstance(segment, TurnEdge) or segment.data is None else len(segment.data)


def _media_files(document: Document) -> tuple[FileState, ...]:
    """The files of a document that a row may name, as they are now."""
    media: tuple[Medium, ...] = (*document.images, *document.videos)
    paths = [medium.path for medium in media if medium.path is not None and medium.data is None]
    return tuple(_media_state(path, document.media_root) for path in paths)


def _media_state(path: str, media_root: str | None) -> FileState:
    """By the path as the row has it: what is stored shows nobody else's folders."""
    root = None if media_root is None else Path(media_root)
    try:
        found: Path | str = resolve(path, root)
    except MediaError:
        found = os.path.join(root or "", path)
    return file_state(found)._replace(path=path)
