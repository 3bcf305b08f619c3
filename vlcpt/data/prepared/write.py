"""``vlcpt prepare``'s shards: each a piece of its source, whole or not there."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from vlcpt import __version__
from vlcpt.data.documents import DocumentError
from vlcpt.data.encode.encoder import DocumentEncoder
from vlcpt.data.plan.cache import source_key
from vlcpt.data.plan.ledger import BadDataError
from vlcpt.data.plan.plan import MAX_BAD_IN_A_ROW, Track, files_beside, untracked
from vlcpt.data.prepared.engines import Engine, Pieces, progress, run_pieces
from vlcpt.data.prepared.fingerprints import differences
from vlcpt.data.prepared.read import (
    BEGUN,
    INDEX_FILE,
    LAYOUT,
    PLACES_FILE,
    SOURCE_KIND,
    WHOLE,
    Folder,
    shard_name,
)
from vlcpt.data.prepared.shards import INDEX_SCHEMA, PLACES_SCHEMA, SCHEMA, Row, document_row, error_row
from vlcpt.data.sources import DocumentSource
from vlcpt.data.workers import LoadingError, Watched, WorkerWatch
from vlcpt.file_writes import WriteError, Writing, human_size, remove, write_file

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
        encoder: Callable[[], DocumentEncoder],
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
        source = document.source or self._source.rows.source(number)
        written.add(*document_row(document, stream, source, self._encoder.options.limits))
        return 0


def arrow_bytes(batches: list[pa.RecordBatch], schema: pa.Schema) -> bytes:
    """Batches as an Arrow file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return bytes(sink.getvalue())


# A shard is at least so many rows, and at most so many; between them there are some hundred shards.
SHARD_ROWS = (512, 8192)
_SHARDS = 512
# Small, because over a network a whole batch comes for one document; what Arrow adds is some kB of it.
BATCH_BYTES = 1 << 17
_PARTIAL = re.compile(r"\..*\.partial")
_SHARD = re.compile(r"\d{5,}\.arrow")


def prepare_source(
    source: DocumentSource,
    encoder: Callable[[], DocumentEncoder],
    folder: Path,
    *,
    fingerprint: Mapping[str, object],
    stops: bool = True,
    engine: Engine = "local",
    num_proc: int = 0,
    timeout: float = 0,
    track: Track = untracked,
) -> None:
    """Encode a source into a folder, or go on where that was interrupted.

    Args:
        source: The source.
        encoder: Makes the encoder.
        folder: Empty, new, or holding the same source as far as it is prepared.
        fingerprint: See :func:`vlcpt.data.prepared.fingerprints.fingerprint`.
        stops: Whether the first unusable row stops it; others are kept with their reason.
        engine, num_proc, timeout: See :func:`vlcpt.data.prepared.engines.run_pieces`.
        track: What shows the progress.

    Raises:
        DocumentError: At an unusable row if that stops it; if the folder holds something else.
        BadDataError: At many unusable rows in a row.
        WriteError: If the disk is full, or the folder cannot be written.
        LoadingError: If a process died, or stands still. Started again, it goes on where it stopped.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from vlcpt import CPTDataset, load_processor
        >>> from vlcpt.data.encode.options import EncodingOptions
        >>> from vlcpt.data.prepared.fingerprints import fingerprint
        >>> from vlcpt.data.sources import open_source
        >>> from vlcpt.demo import base_path
        >>> processor, source = load_processor(base_path()), open_source([{"text": "one two"}])
        >>> with TemporaryDirectory() as folder:
        ...     options = EncodingOptions(train_eos="never")
        ...     made_with = fingerprint(processor, "train", options)
        ...     encoder = partial(DocumentEncoder, processor, options)
        ...     prepare_source(source, encoder, Path(folder), fingerprint=made_with)
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['00000.arrow', 'index.arrow', 'places.arrow', 'prepared.json']
    """
    shard_rows = min(max(SHARD_ROWS[0], -(-len(source) // _SHARDS)), SHARD_ROWS[1])
    about: dict[str, object] = {
        "kind": SOURCE_KIND,
        "layout": LAYOUT,
        "name": source.name,
        "rows": len(source),
        "shard_rows": shard_rows,
        "data": source_key(source),
        "reading": {name: source.reading[name] for name in ("format", "targets", "chat_template")},
        "fingerprint": dict(fingerprint),
    }
    if _is_whole(folder, about):
        return
    with Writing(folder, "the shards of a source", todo=AGAIN):
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
    write_file(folder / BEGUN, _json_bytes(about), "what is being prepared", todo=AGAIN)
    shards = range(-(-len(source) // shard_rows))
    missing = [shard for shard in shards if not _is_done(folder, shard)]
    write = ShardWriter(source, encoder, folder, shard_rows=shard_rows, batch_bytes=BATCH_BYTES, stops=stops)
    with progress(partial(_count_done, folder), len(shards), track, f"encoding {source.name}"):
        try:
            run_pieces(write, missing, engine, num_proc, timeout)
        except WriteError as error:
            raise WriteError(f"{error} {_rest(folder, len(shards))}") from error
        except LoadingError as error:
            raise LoadingError(f"{error} The same command goes on where this one stopped.") from error
        finally:
            _remove_partial(folder)
    _finish(folder, about, len(shards), source)


def remove_prepared(folder: Path) -> None:
    """Delete what was prepared in a folder, whole or not, and nothing else that may be there.

    Example:
        >>> remove_prepared(Path("no/such/folder"))
    """
    if not any((folder / name).is_file() for name in (WHOLE, BEGUN)):
        return
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    for path in folder.iterdir():
        ours = path.name in (INDEX_FILE, PLACES_FILE) or _SHARD.fullmatch(path.name)
        if ours or _PARTIAL.fullmatch(path.name):
            path.unlink()
    for name in (WHOLE, BEGUN):
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _is_whole(folder: Path, about: Mapping[str, object]) -> bool:
    """Whether nothing is left to do; an error if the folder holds another source, or this one prepared
    otherwise."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    whole = Folder(str(folder)).json(WHOLE, (SOURCE_KIND,))
    there = whole or Folder(str(folder)).json(BEGUN, (SOURCE_KIND,))
    todo = "Give another folder, or start afresh in it with --overwrite."
    if there is None:
        raise _error(f"the folder is not empty, and holds nothing that was prepared. {todo}", folder)
    if found := differences(_flat(there), _flat(about)):
        raise _error(f"it was begun from other data or options ({'; '.join(found)}). {todo}", folder)
    if about["data"] is None:
        raise _error(f"nothing tells whether rows in memory are still the same. {todo}", folder)
    return whole is not None


def _flat(about: Mapping[str, object]) -> dict[str, object]:
    """What must be equal to go on."""
    fingerprint, reading = about["fingerprint"], about["reading"]
    assert isinstance(fingerprint, dict)
    assert isinstance(reading, dict)
    own = {key: about.get(key) for key in ("layout", "name", "rows", "shard_rows", "data")}
    return {**own, **reading, **fingerprint}


def _is_done(folder: Path, shard: int) -> bool:
    return (folder / shard_name(shard)).is_file() and (folder / PARTS / shard_name(shard)).is_file()


def _count_done(folder: Path) -> int:
    return sum(_SHARD.fullmatch(name) is not None for name in os.listdir(folder))


def _rest(folder: Path, shards: int) -> str:
    """How much is still to be written, by the shards that are there."""
    done = [(folder / shard_name(shard)).stat().st_size for shard in range(shards) if _is_done(folder, shard)]
    rest = human_size(round(sum(done) / max(len(done), 1) * (shards - len(done))))
    return f"{len(done):,} of its {shards:,} shards are there" + (
        f", and the rest takes about {rest}." if done else "."
    )


def _finish(folder: Path, about: Mapping[str, object], shards: int, source: DocumentSource) -> None:
    """Join what is beside the shards, and say that all is there."""
    index: list[pa.RecordBatch] = []
    places: list[Mapping[str, int]] = []
    not_read: Counter[str] = Counter()
    for shard in range(shards):
        part = pa.ipc.open_file(pa.py_buffer((folder / PARTS / shard_name(shard)).read_bytes()))
        index.append(part.get_batch(0))
        places += json.loads(part.schema.metadata[b"places"])
        not_read.update(json.loads(part.schema.metadata.get(b"not_read", b"{}")))
    joined = {
        INDEX_FILE: arrow_bytes([batch.replace_schema_metadata() for batch in index], INDEX_SCHEMA),
        PLACES_FILE: arrow_bytes([pa.RecordBatch.from_pylist(places, PLACES_SCHEMA)], PLACES_SCHEMA),
    }
    for name, content in joined.items():
        write_file(folder / name, content, "an index of the shards", todo=AGAIN)
    trained = pa.Table.from_batches(index).filter(pc.field("targets") > 0)
    media = pc.sum(trained["images"]).as_py() or pc.sum(trained["videos"]).as_py()
    beside = files_beside(source, documents=trained.num_rows, media=media or 0)
    names = [*map(shard_name, range(shards)), *joined]
    made_by = {name: version(name) for name in ("transformers", "tokenizers", "pillow", "av")}
    whole = {
        **about,
        "files": {name: (folder / name).stat().st_size for name in names},
        "not_read": {**not_read, **beside},
        "digests": {name: xxhash.xxh3_64_hexdigest(content) for name, content in joined.items()},
        "versions": {"vlcpt": __version__, **made_by},
    }
    write_file(folder / WHOLE, _json_bytes(whole), "what is prepared", todo=AGAIN)
    shutil.rmtree(folder / PARTS)
    (folder / BEGUN).unlink()


def _remove_partial(folder: Path) -> None:
    """Remove what processes that were killed had begun; all that have worked here have ended."""
    for path in folder.iterdir():
        if _PARTIAL.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _json_bytes(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _error(reason: str, folder: Path) -> DocumentError:
    return DocumentError(reason, kind="source", field=str(folder))
