"""A source is read once: each document becomes lines of an array."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from vlcpt.data.documents import Document, DocumentError, Medium
from vlcpt.data.encode.encoder import DocumentEncoder
from vlcpt.data.media.files import MediaError, resolve
from vlcpt.data.plan.ledger import NOT_READ, BadDataError, Dropped, TokenCounts, count_tokens
from vlcpt.data.plan.split import OnOverlong, split_stream
from vlcpt.data.prepared.read import PreparedRows
from vlcpt.data.rows.base import FileState, file_state
from vlcpt.data.sources import DocumentSource
from vlcpt.data.workers import WorkerBoard, read_by_workers

OnBadData = Literal["error", "skip"]
PIECE_ROWS = 512  # that a worker reads before it hands them over
PREPARED_ROWS = 1 << 15  # the same where only integers are read
WORTH_WORKERS = 1.0  # seconds of reading; to start workers takes a part of one
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
        # Of the part, as :class:`~vlcpt.data.plan.split.Part` has it; it would not fit 31 bits.
        ("frame_pairs", "f4"),
    ]
)


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

    If a source was encoded before, the integers are enough, unless media are to be checked: only rows that
    need more than those are read.

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
        is_plain = encoder.options.media_check == "header"
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
        for row in rows:
            self._board.at(row)
            document = None
            try:
                document = self._source.document(row)
                lines += self._lines(row, document, scan)
            except DocumentError as error:
                is_dropped = error.kind == "overlong" and self._reading.on_overlong == "drop"
                is_bad = error.kind != "without_targets" and not is_dropped
                if is_bad and (self._stops or error.kind == "overlong"):
                    scan.error = error
                    break
                dropped = Dropped.by(error, self._source.rows.source(row))
                files = _media_files(document) if is_bad and document is not None else ()
                scan.unused.append(BadRow(row, dropped, str(error), is_bad, files))
        scan.lines = np.array(lines, dtype=LINE)
        return scan

    def _lines(self, row: int, document: Document, scan: Scan) -> list[tuple[int, ...]]:
        """A document as ``LINE`` has it. Its marks are entered in the scan, as are unused tokens."""
        scan.marks.update(NOT_READ + name for name in document.not_read)
        stream = self._encoder.tokens(document)
        scan.marks["untagged"] += not document.tagged
        scan.marks["empty_spans"] += document.empty_spans
        scan.marks["cut_edges"] += stream.cut_edges
        reading = self._reading
        try:
            parts = split_stream(
                stream, reading.max_length, on_overlong=reading.on_overlong, source=document.source
            )
            if not parts:
                is_lost = stream.without_context
                raise DocumentError(
                    "its only target is its first token, which nothing predicts"
                    if is_lost
                    else "no token of it is a target",
                    kind="without_targets",
                    source=document.source,
                )
        except DocumentError as error:
            scan.dropped_tokens[error.kind] += len(stream)
            raise
        counts, checksum = count_tokens(stream, parts), stream.checksum
        lines: list[tuple[int, ...]] = []
        for part in parts:
            images, videos = (0, 0) if lines else (len(document.images), len(document.videos))
            own = counts._replace(targets=part.targets, media=part.media, repeated=part.repeated)
            spans = (part.start, part.stop, checksum, part.frame_pairs)
            lines.append((row, not lines, images, videos, *own, *spans))
            counts = TokenCounts()
        return lines

    def _read_prepared(self, prepared: PreparedRows, rows: range) -> Scan:
        first, shard_rows = rows[0], prepared.shard_rows
        index = prepared.index(range(first // shard_rows, -(-(first + self._piece_rows) // shard_rows)))
        is_plain = (index["targets"] > 0) & (index["length"] <= self._reading.max_length)
        scan = self._read((np.flatnonzero(~is_plain) + first).tolist(), len(rows))
        if scan.error is not None:
            return scan
        index = index[is_plain]
        for mark in _MARKS:
            scan.marks[mark] += int(index[mark].sum())
        lines = np.zeros(len(index), LINE)
        lines["row"], lines["first"] = np.flatnonzero(is_plain) + first, True
        for name in ("images", "videos", "targets", "checksum", "frame_pairs"):
            lines[name] = index[name]
        lines["read"], lines["stop"], lines["media"] = index["tokens"], index["length"], index["pads"]
        lines["special"] = 2 * index["media"]
        lines["context"] = lines["stop"] - lines["targets"] - lines["media"] - lines["special"]
        lines["trimmed"] = lines["read"] - lines["stop"]
        lines["targets_without_context"] = index["without_context"]
        together = np.concatenate([scan.lines, lines])
        scan.lines = together[np.argsort(together["row"], kind="stable")]
        return scan


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
