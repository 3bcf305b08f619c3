"""Rows are read once: what each document costs, and what is lost of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
from torch.utils.data import Dataset

from vlcpt.data.documents import Document, DocumentError, Image, Medium, Segment, Source, Text, TurnEdge
from vlcpt.data.encode.encoder import DocumentEncoder
from vlcpt.data.encode.streams import TokenStream, closed_stream
from vlcpt.data.encode.tokens import Run
from vlcpt.data.media.open import MediaError, resolve
from vlcpt.data.plan.ledger import NOT_READ, Dropped, TokenCounts, count_tokens
from vlcpt.data.plan.split import OnOverlong, split_stream
from vlcpt.data.prepared.read import PreparedRows
from vlcpt.data.rows.jsonl import FileState, file_state
from vlcpt.data.sources import DocumentSource
from vlcpt.data.workers import Watched, WorkerWatch


class TextScan(NamedTuple):
    """What one document costs; it is one part, of its first ``stop`` tokens.

    Args:
        stop: Its tokens up to the last target.
        checksum: See :attr:`TokenStream.checksum`.
        counts: Its tokens, by what becomes of them.
    """

    stop: int
    checksum: int
    counts: TokenCounts


def scan_texts(
    encoder: DocumentEncoder, documents: Sequence[Document], max_length: int
) -> list[TextScan | TokenStream | DocumentError]:
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
    found: list[TextScan | TokenStream | DocumentError] = []
    for number, (read, trained, stop, lost, start, end) in enumerate(counts.tolist()):
        if not (runs.is_uncut[number] and trained and stop <= max_length):
            of_text = slice(start - number, end - number - 1)
            run = Run(runs.ids[of_text], runs.weights[of_text], 0)
            if not runs.is_uncut[number]:
                try:
                    run = encoder.runs.cut(texts[number])
                except DocumentError as error:
                    found.append(error.at(documents[number].source))
                    continue
            closing = float(closings[number])
            found.append(
                closed_stream([run.ids], [run.weights], encoder.eos, closing, cut_edges=run.cut_edges)
            )
            continue
        of_both = crc32(of_weights[4 * start : 4 * end], crc32(of_ids[4 * start : 4 * end])) & 0x7FFFFFFF
        tokens = TokenCounts(
            read=read,
            targets=trained,
            context=stop - trained,
            media=0,
            special=0,
            trimmed=read - stop,
            targets_without_context=lost,
            repeated=0,
        )
        found.append(TextScan(stop, of_both, tokens))
    return found


# A piece is at least so many rows, and there are at most so many pieces: each becomes a file.
PIECE_ROWS = 512
MAX_PIECES = 512
# So many rows are read before their texts are encoded, all in one call; or so many characters and bytes of
# media, as all of them are held.
AHEAD, MOST_AHEAD = 64, 1 << 16
Opened = Document | DocumentError
Encoded = TextScan | TokenStream | DocumentError | None  # None: not yet
# One row a document that can be trained on. Its tokens follow the ledger's names.
COLUMNS = ("row", "parts", "images", "videos", *TokenCounts._fields)
# The checksum is that of the whole document. Its 31 bits are enough: a row that was rewritten escapes once in
# two billion, and the first that does not stops the run.
PART_COLUMNS = ("start", "stop", "repeated", "targets", "media", "checksum")


class BadRow(NamedTuple):
    """A document that is not used.

    Args:
        row: Its number in the source.
        dropped: Its line of ``dropped.jsonl``.
        message: The error whole.
        is_bad: Whether it counts against ``max_bad_fraction``: not if only its targets are missing, or
            if it is too long and such documents are to be dropped.
        files: Its media as they were, by the paths that the row has, where one of them is what is wrong.
    """

    row: int
    dropped: Dropped
    message: str
    is_bad: bool
    files: tuple[FileState, ...] = ()


@dataclass
class Scan:
    """What reading some rows of one source gave.

    Args:
        documents: int32 (N, len(COLUMNS)), those that can be trained on, in order.
        parts: int32 (P, len(PART_COLUMNS)), theirs, in order.
        rows: How many rows were read.
        marks: ``untagged``, ``empty_spans``, ``cut_edges`` of all documents that could be encoded.
        dropped_tokens: Tokens of documents that could be encoded and are not used, by reason.
        unused: The documents that are not used, in order.
        error: What stops the run, if anything; nothing after it was read.
    """

    documents: np.ndarray
    parts: np.ndarray
    rows: int
    marks: Counter[str] = field(default_factory=Counter)
    dropped_tokens: Counter[str] = field(default_factory=Counter)
    unused: list[BadRow] = field(default_factory=list)
    error: DocumentError | None = None


class SourceScanner(Dataset[Scan]):
    """The rows of one source in pieces: item k reads piece k. Pieces can be read in any process.

    Args:
        source: Where the rows are.
        encoder: Encodes documents; only headers of media are read.
        max_length: Tokens of a sample.
        on_overlong: What becomes of longer documents.
        stops: Whether the first unusable row stops the run.
    """

    def __init__(
        self,
        source: DocumentSource,
        encoder: DocumentEncoder,
        *,
        max_length: int,
        on_overlong: OnOverlong,
        stops: bool,
    ) -> None:
        self._source = source
        self._encoder = encoder
        self._max_length = max_length
        self._on_overlong = on_overlong
        self._stops = stops
        self._piece_rows = self._rows_of_a_piece()
        self._watch = WorkerWatch()

    @property
    def watched(self) -> Watched:
        """Which row each worker is at."""
        return Watched(self._watch, lambda row: [str(self._source.rows.source(row))])

    def _rows_of_a_piece(self) -> int:
        return max(PIECE_ROWS, -(-len(self._source) // MAX_PIECES))

    def __len__(self) -> int:
        return -(-len(self._source) // self._piece_rows)

    def __getitem__(self, piece: int) -> Scan:
        rows = range(piece * self._piece_rows, min((piece + 1) * self._piece_rows, len(self._source)))
        return self._read(rows, len(rows))

    def holds(self, scan: Scan) -> bool:
        """Whether a stored scan is still true: a medium that failed may have been put right."""
        return all(
            _media_state(file.path, self._source.root_of(row.row)) == file
            for row in scan.unused
            for file in row.files
        )

    def _read(self, rows: Iterable[int], total: int) -> Scan:
        """What these rows of a piece of ``total`` gave."""
        try:
            return self._scan(rows, total)
        finally:
            self._watch.done()

    def _scan(self, rows: Iterable[int], total: int) -> Scan:
        documents: list[tuple[int, ...]] = []
        parts: list[tuple[int, ...]] = []
        scan = Scan(np.zeros(0), np.zeros(0), total)
        columns: tuple[int, ...] | str
        for row, found, text in self._opened(rows):
            self._watch.at(row)
            document = found if isinstance(found, Document) else None
            try:
                if isinstance(found, DocumentError):
                    raise found
                if isinstance(text, DocumentError):
                    raise text
                assert document is not None
                scan.marks.update(NOT_READ + name for name in document.not_read)
                if isinstance(text, TextScan):
                    columns = self._text(found, row, text, parts, scan)
                else:
                    columns = self._document(found, row, text, parts, scan)
            except DocumentError as error:
                is_bad = error.kind != "overlong" or self._on_overlong != "drop"
                if is_bad and (self._stops or error.kind == "overlong"):
                    scan.error = error
                    break
                dropped = self._dropped(row, error.source, error.kind, error.detail)
                files = _media_files(document) if document else ()
                scan.unused.append(BadRow(row, dropped, str(error), is_bad, files))
                continue
            if isinstance(columns, str):
                dropped = self._dropped(row, found.source, "without_targets", columns)
                scan.unused.append(BadRow(row, dropped, columns, False))
            else:
                documents.append(columns)
        scan.documents = np.array(documents, dtype=np.int32).reshape(-1, len(COLUMNS))
        scan.parts = np.array(parts, dtype=np.int32).reshape(-1, len(PART_COLUMNS))
        return scan

    def _opened(self, rows: Iterable[int]) -> Iterator[tuple[int, Opened, Encoded]]:
        """Each row's document, or what is wrong with it, and what is known by now of its tokens."""
        ahead: list[tuple[int, Opened]] = []
        held = 0
        for row in rows:
            found: Opened
            self._watch.at(row)
            try:
                found = self._source.document(row)
                held += sum(map(_size, found.segments))
            except DocumentError as error:
                found = error
            ahead.append((row, found))
            is_last = self._stops and isinstance(found, DocumentError)
            if is_last or len(ahead) == AHEAD or held > MOST_AHEAD:
                yield from self._scanned(ahead)
                ahead, held = [], 0
        yield from self._scanned(ahead)

    def _scanned(self, opened: list[tuple[int, Opened]]) -> Iterator[tuple[int, Opened, Encoded]]:
        texts = {row: found for row, found in opened if isinstance(found, Document) and _is_text(found)}
        scans = scan_texts(self._encoder, [*texts.values()], self._max_length) if texts else []
        of_row = dict(zip(texts, scans, strict=True))
        for row, found in opened:
            yield row, found, of_row.get(row)

    def _text(
        self, document: Document, row: int, text: TextScan, parts: list[tuple[int, ...]], scan: Scan
    ) -> tuple[int, ...]:
        """The same as :meth:`_document` of a document that :func:`scan_texts` has found to be one part."""
        scan.marks["untagged"] += not document.tagged
        scan.marks["empty_spans"] += document.empty_spans
        parts.append((0, text.stop, False, text.counts.targets, 0, text.checksum))
        return (row, 1, 0, 0, *text.counts)

    def _document(
        self,
        document: Document,
        row: int,
        stream: TokenStream | None,
        parts: list[tuple[int, ...]],
        scan: Scan,
    ) -> tuple[int, ...] | str:
        """The document's columns, or why it has no target; its parts and marks are entered on the way."""
        if stream is None:
            stream = self._encoder.tokens(document)
        try:
            found = split_stream(
                stream, self._max_length, on_overlong=self._on_overlong, source=document.source
            )
        except DocumentError as error:
            scan.dropped_tokens[error.kind] += len(stream)
            raise
        finally:
            scan.marks["untagged"] += not document.tagged
            scan.marks["empty_spans"] += document.empty_spans
            scan.marks["cut_edges"] += stream.cut_edges
        if not found:
            scan.dropped_tokens["without_targets"] += len(stream)
            if stream.without_context:
                return "its only target is its first token, which nothing predicts"
            return "no token of it is a target"
        counts = count_tokens(stream, found)
        checksum = stream.checksum
        parts += [
            (part.start, part.stop, part.repeated, part.targets, part.media, checksum) for part in found
        ]
        images = sum(isinstance(placed.medium, Image) for placed in stream.media)
        return (row, len(found), images, len(stream.media) - images, *counts)

    def _dropped(self, row: int, source: Source | None, reason: str, detail: str) -> Dropped:
        place = source or self._source.rows.source(row)
        return Dropped(place.path, place.line, place.id, reason, detail)


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


PREPARED_ROWS = 1 << 15  # arrays of so many numbers leave no holes behind when they are joined


class PreparedScanner(SourceScanner):
    """As :class:`SourceScanner`, with equal results: an item is the scan of some neighbouring shards.

    Only rows of which there is more to say are read: those that are no document, have no target, or are
    longer than ``max_length``.
    """

    def _rows_of_a_piece(self) -> int:
        return self._rows.shard_rows * self._shards_of_a_piece

    @property
    def _shards_of_a_piece(self) -> int:
        return max(1, PREPARED_ROWS // self._rows.shard_rows)

    @property
    def _rows(self) -> PreparedRows:
        assert isinstance(self._source.rows, PreparedRows)
        return self._source.rows

    def __getitem__(self, piece: int) -> Scan:
        shards = self._shards_of_a_piece
        index = self._rows.index(range(piece * shards, (piece + 1) * shards))
        first, length, targets = piece * self._piece_rows, index["length"], index["targets"]
        plain = (targets > 0) & (length <= self._max_length)
        scan = self._read((np.flatnonzero(~plain) + first).tolist(), len(length))
        if scan.error is not None:
            return scan
        for mark in ("untagged", "empty_spans", "cut_edges"):
            scan.marks[mark] += int(index[mark][plain].sum())
        row = np.flatnonzero(plain) + first
        index = {name: column[plain] for name, column in index.items()}
        length, nothing = index["length"], np.zeros_like(index["length"])
        counts = {
            "row": row,
            "parts": nothing + 1,
            "images": index["images"],
            "videos": index["videos"],
            "read": index["tokens"],
            "targets": index["targets"],
            "context": length - index["targets"] - index["pads"] - 2 * index["media"],
            "media": index["pads"],
            "special": 2 * index["media"],
            "trimmed": index["tokens"] - length,
            "targets_without_context": index["without_context"],
            "repeated": nothing,
        }
        parts = {
            "start": nothing,
            "stop": length,
            "repeated": nothing,
            "targets": index["targets"],
            "media": index["pads"],
            "checksum": index["checksum"],
        }
        read_row, read_parts = (scan.documents[:, COLUMNS.index(name)] for name in ("row", "parts"))
        of_part = np.concatenate([np.repeat(read_row, read_parts), row])
        scan.documents = _in_order(scan.documents, counts, COLUMNS, np.concatenate([read_row, row]))
        scan.parts = _in_order(scan.parts, parts, PART_COLUMNS, of_part)
        return scan


def _in_order(
    read: np.ndarray, columns: dict[str, np.ndarray], names: tuple[str, ...], rows: np.ndarray
) -> np.ndarray:
    """Lines that were read one by one, and those of the columns, in the order of their rows."""
    together = np.concatenate([read, np.stack([columns[name] for name in names], axis=1)])
    return together[np.argsort(rows, kind="stable")].astype(np.int32)
