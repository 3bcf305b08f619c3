"""Writes the shards of a prepared source, each whole or not there."""

from __future__ import annotations

import json
import os
import uuid
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import xxhash

from vlcpt.data.documents import DocumentError
from vlcpt.data.encoding import DocumentEncoder
from vlcpt.data.engines import Pieces
from vlcpt.data.media import MediaLimits
from vlcpt.data.planning import MAX_BAD_IN_A_ROW, BadDataError
from vlcpt.data.readers.files import DocumentSource
from vlcpt.data.readers.prepared import shard_name
from vlcpt.data.shards import INDEX_SCHEMA, SCHEMA, Row, document_row, error_row
from vlcpt.data.waiting import Watched
from vlcpt.data.watch import WorkerWatch
from vlcpt.file_writes import Writing, remove, write_file

_MAGIC = 8  # bytes before the schema of an Arrow file
PARTS = ".parts"  # what the index will hold of each shard that is done
_PART = "what the index will hold of a shard"
AGAIN = "Then start it again: it goes on where it stopped."


class ShardFile:
    """Writes one shard, and keeps what the index holds of it.

    Args:
        file: Open for writing, empty.
        first: Number of its first row in the source.
        shard: Its own number.
        batch_bytes: A batch is closed when it holds so much; with a large document it holds more.
    """

    def __init__(self, file: BinaryIO, first: int, shard: int, batch_bytes: int) -> None:
        self._sink = pa.PythonFile(file, "w")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)
        self._offset = _MAGIC + SCHEMA.serialize().size
        self._file = file
        self._first, self._shard, self._batch_bytes = first, shard, batch_bytes
        self._rows: list[Row] = []
        self._bytes = 0
        self.index: list[list[int]] = []
        self.places: list[Mapping[str, int]] = []
        self.not_read: Counter[str] = Counter()

    def add(self, row: Row, index: list[int]) -> None:
        """One more row."""
        self._rows.append(row)
        self.index.append(index)
        media = row.get("media", ())
        assert isinstance(media, list | tuple)
        self._bytes += 200 + 4 * max(index[0], 0) + sum(len(one["data"]) for one in media)
        if self._bytes >= self._batch_bytes:
            self._flush()

    def close(self, path: Path) -> None:
        """End the file, which lies at ``path``, and find where its batches are."""
        self._flush()
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        with path.open("rb") as file:
            for number, place in enumerate(self.places):
                file.seek(place["offset"])
                content = file.read(place["size"])
                self.places[number] = {**place, "digest": xxhash.xxh3_64_intdigest(content)}

    def foreseen(self, rows: int) -> int:
        """Bytes of the whole shard, by the rows that are there."""
        return round((self._offset + self._bytes) / max(len(self.index), 1) * rows)

    def _flush(self) -> None:
        if not self._rows:
            return
        self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, SCHEMA))
        end = self._sink.tell()
        first = self._first + len(self.index) - len(self._rows)
        self.places.append(
            {"first": first, "shard": self._shard, "offset": self._offset, "size": end - self._offset}
        )
        self._offset, self._rows, self._bytes = end, [], 0


class ShardWriter:
    """Encodes the shards with these numbers: the one function that every engine runs.

    Args:
        source: Where the rows are.
        encoder: Makes the encoder, in the process that needs it.
        folder: Where the shards go.
        shard_rows: Rows of each but the last.
        batch_bytes: Of a batch, which is what is read to get one document.
        stops: Whether the first unusable row stops it.
    """

    def __init__(
        self,
        source: DocumentSource,
        encoder: partial[DocumentEncoder],
        folder: Path,
        *,
        shard_rows: int,
        batch_bytes: int,
        stops: bool,
    ) -> None:
        self._source = source
        self._make_encoder = encoder
        self._encoder: DocumentEncoder | None = None
        self._folder = folder
        self._shard_rows = shard_rows
        self._batch_bytes = batch_bytes
        self._stops = stops
        self._watch = WorkerWatch()

    @property
    def watched(self) -> Watched:
        """Which row each process is at."""
        return Watched(self._watch, lambda row: [str(self._source.rows.source(row))])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_encoder": None}

    def __call__(self, pieces: Pieces) -> Pieces:
        try:
            for piece in pieces["piece"]:
                name = shard_name(int(piece))
                with Writing(self._folder, f"its shard {name}", todo=AGAIN, reads=True) as writing:
                    self._write(int(piece), name, writing)
        finally:
            self._watch.done()
        return pieces

    def _write(self, shard: int, name: str, writing: Writing) -> None:
        first = shard * self._shard_rows
        unfinished = self._folder / f".{uuid.uuid4().hex}.partial"
        last, bad = min(first + self._shard_rows, len(self._source)), 0
        try:
            with unfinished.open("wb") as file:
                written = ShardFile(file, first, shard, self._batch_bytes)
                for number in range(first, last):
                    self._watch.at(number)
                    try:
                        bad = self._add(written, number, bad)
                    except DocumentError as error:
                        if self._stops:
                            raise
                        bad += 1
                        written.add(*error_row(error, self._source.rows.source(number)))
                        if bad >= MAX_BAD_IN_A_ROW:
                            raise BadDataError(f"{bad} unusable rows in a row, the last: {error}") from None
                    finally:
                        writing.needed = written.foreseen(last - first)
                written.close(unfinished)
            index = pa.record_batch(
                [pa.array(column, pa.int32()) for column in zip(*written.index, strict=True)], INDEX_SCHEMA
            )
            told = {"places": json.dumps(written.places), "not_read": json.dumps(written.not_read)}
            schema = INDEX_SCHEMA.with_metadata(told)
            write_file(self._folder / PARTS / name, arrow_bytes([index], schema), _PART, todo=AGAIN)
            unfinished.replace(self._folder / name)
        finally:
            remove(unfinished)

    def _add(self, written: ShardFile, number: int, bad: int) -> int:
        if self._encoder is None:
            self._encoder = self._make_encoder()
        document = self._source.document(number)
        written.not_read.update(document.not_read)
        stream = self._encoder.tokens(document)
        limits = self._make_encoder.keywords.get("limits") or MediaLimits()
        source = document.source or self._source.rows.source(number)
        written.add(*document_row(document, stream, source, limits))
        return 0


def arrow_bytes(batches: list[pa.RecordBatch], schema: pa.Schema) -> bytes:
    """Batches as an Arrow file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return bytes(sink.getvalue())
