"""``vlcpt prepare``: each shard of a source is written in full or not at all."""

from __future__ import annotations

import json
import logging
import os
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import Dataset

from vlcpt import __version__
from vlcpt.data.documents import Document, DocumentError, Medium, Source
from vlcpt.data.encode.encoder import NUMBERS, DocumentEncoder, TokenStream, numbers_of
from vlcpt.data.encode.vision import medium_errors
from vlcpt.data.media.files import MediaError, media_folder
from vlcpt.data.media.open import MediaLimits, open_medium
from vlcpt.data.plan.kept_scans import source_key
from vlcpt.data.plan.ledger import BadDataError
from vlcpt.data.plan.plan import MAX_BAD_IN_A_ROW, Track, files_beside, untracked
from vlcpt.data.prepared.fingerprint import differences
from vlcpt.data.prepared.read import (
    BEGUN,
    LAYOUT,
    RUNS,
    SCHEMA,
    SOURCE_KIND,
    WHOLE,
    About,
    Failed,
    numbers_in,
    read_json,
    shard_name,
)  # fmt: skip
from vlcpt.data.rows.fields import Row
from vlcpt.data.rows.tables import ParquetRows
from vlcpt.data.sources import DocumentSource
from vlcpt.data.workers import LoadingError, WorkerBoard, read_by_workers
from vlcpt.file_writes import WriteError, Writing, remove, write_json

Engine = Literal["local", "ray"]
Stopped = DocumentError | BadDataError | WriteError
AGAIN = "Then start it again: it goes on where it stopped."
# A shard is at least so many rows, and at most so many; between them there are some hundred shards.
SHARD_ROWS = (512, 8192)
_SHARDS = 256
# A row group, all of which is read to get one document, is closed when it holds so many bytes.
GROUP_BYTES = 1 << 15
MAX_BYTES = (1 << 31) - (1 << 20)  # a page of a Parquet file has at most 2 GiB
_PARQUET = {
    "compression": "none",  # media are compressed already, and tokens hardly get smaller
    "use_dictionary": False,
    "write_statistics": False,
    "write_page_checksum": True,
}
_OURS = re.compile(r"\d{5,}\.parquet|\..*\.partial")


class ShardWriter(Dataset[Stopped | None]):
    """Encodes shards by number, in whatever process, or on whatever machine.

    Item n is None once shard n is written, or its error, into whose text torch would put a trace.

    Args:
        source: Where the rows are.
        encoder: Makes the encoder, in the process that needs it.
        folder: Where the shards go.
        shard_rows: Rows of each but the last.
        stops: Whether the first unusable row stops it.
    """

    def __init__(
        self,
        source: DocumentSource,
        encoder: Callable[[], DocumentEncoder],
        folder: Path,
        *,
        shard_rows: int,
        stops: bool,
    ) -> None:
        self._source = source
        self._make_encoder = encoder
        self._encoder: DocumentEncoder | None = None
        self._folder = folder
        self._shard_rows = shard_rows
        self._group_bytes = GROUP_BYTES  # taken along, so that files are equal wherever they are written
        self._stops = stops
        self.board = WorkerBoard(source.names)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_encoder": None}

    def __getitem__(self, shard: int) -> Stopped | None:
        try:
            self.write(shard)
        except (DocumentError, BadDataError, WriteError) as error:
            return error
        return None

    def __call__(self, shards: dict[str, Sequence[int]]) -> dict[str, Sequence[int]]:
        """Write ``{"shard": [number, …]}`` and give it back, as Ray wants it."""
        for shard in shards["shard"]:
            self.write(int(shard))
        return shards

    def write(self, shard: int) -> None:
        """Write a shard.

        Raises:
            DocumentError: At an unusable row, if that stops it.
            BadDataError: At many unusable rows in a row.
            WriteError: If it cannot be written.
        """
        name, unfinished = shard_name(shard), self._folder / f".{uuid.uuid4().hex}.partial"
        first = shard * self._shard_rows
        rows = range(first, min(first + self._shard_rows, len(self._source)))
        with Writing(self._folder, f"its shard {name}", todo=AGAIN, reads=True) as writing:
            try:
                with unfinished.open("wb") as file:
                    self._write(rows, file, writing)
                    file.flush()
                    os.fsync(file.fileno())
                unfinished.replace(self._folder / name)
            finally:
                self.board.at(None)
                remove(unfinished)

    def _write(self, rows: range, file: BinaryIO, writing: Writing) -> None:
        group: list[Row] = []
        not_read: Counter[str] = Counter()
        size = written = bad = 0
        with pq.ParquetWriter(file, SCHEMA, **_PARQUET) as writer:
            for number in rows:
                self.board.at(number)
                try:
                    row, bad = self._row(number, not_read), 0
                except DocumentError as error:
                    if self._stops:
                        raise
                    row, bad = error_row(error, self._source.rows.source(number)), bad + 1
                    if bad >= MAX_BAD_IN_A_ROW:
                        raise BadDataError(f"{bad} unusable rows in a row, the last: {error}") from None
                group.append(row)
                size += row_bytes(row)
                writing.needed = (written + size) * len(rows) // (number - rows[0] + 1)
                if size >= self._group_bytes or number == rows[-1]:
                    writer.write_batch(pa.RecordBatch.from_pylist(group, SCHEMA))
                    written, group, size = written + size, [], 0
            writer.add_key_value_metadata({"not_read": json.dumps(not_read)})

    def _row(self, number: int, not_read: Counter[str]) -> Row:
        if self._encoder is None:
            self._encoder = self._make_encoder()
        document = self._source.document(number)
        not_read.update(document.not_read)
        source = document.source or self._source.rows.source(number)
        return document_row(document, self._encoder.tokens(document), source, self._encoder.options.limits)


def document_row(document: Document, stream: TokenStream, source: Source, limits: MediaLimits) -> Row:
    """A document as a row of ``SCHEMA``, with the bytes of its media.

    Raises:
        DocumentError: If a medium's file cannot be read, or all of them are too large for a row.
    """
    starts = np.append(0, np.flatnonzero(np.diff(stream.loss_weights)) + 1)
    runs = np.zeros(len(starts), RUNS)
    runs["length"], runs["weight"] = np.diff(starts, append=len(stream)), stream.loss_weights[starts]
    about = About(replace(source, id=document.id), tokens=len(stream), runs=len(runs))
    files = [_file_bytes(placed.medium, document, limits) for placed in stream.media]
    for placed, file in zip(stream.media, files, strict=True):
        medium = replace(placed.medium, data=None)
        about.media.append((len(file), type(medium).__name__, medium))  # type: ignore[arg-type]
    parts = [stream.input_ids.astype("<i4").tobytes(), runs.tobytes(), *files]
    row = _row(about, numbers_of(document, stream), parts)
    if (size := row_bytes(row)) > MAX_BYTES:
        raise DocumentError(
            f"it takes {size:,} bytes with its media, and a prepared document {MAX_BYTES:,} at most. Split "
            "it, or train from the rows.",
            kind="medium",
            source=document.source,
        )
    return row


def error_row(error: DocumentError, source: Source) -> Row:
    """A row that is no document, with what is wrong."""
    failed = Failed(error.kind, error.reason, error.field, error.offset)
    numbers = np.zeros(1, NUMBERS)
    numbers["tokens"] = -1
    return _row(About(error.source or source, failed), numbers[0], [])


def _row(about: About, numbers: np.void, parts: list[bytes]) -> Row:
    given = {name: value for name, value in asdict(about).items() if value}
    return {"about": json.dumps(given), "data": b"".join(parts), "numbers": numbers.tobytes()}


def row_bytes(row: Row) -> int:
    """About how much a row takes in a file."""
    return 100 + len(str(row["about"])) + len(bytes(row["data"]))  # type: ignore[call-overload]


def _file_bytes(medium: Medium, document: Document, limits: MediaLimits) -> bytes:
    root = media_folder(document)
    with medium_errors(medium, document):
        try:
            with open_medium(medium, root, limits) as file:
                return file.read()
        except OSError as error:
            raise MediaError(str(error)) from None


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
        fingerprint: See :func:`vlcpt.data.prepared.fingerprint.fingerprint`.
        stops: Whether the first unusable row stops it; others are kept with their reason.
        engine: ``local``: processes of this machine; ``ray``: Ray Data's ``map_batches``.
        num_proc: Processes of the local engine; 0 and 1: this one.
        timeout: Seconds in which each of them must come to another row; 0: any time.
        track: What shows the progress.

    Raises:
        DocumentError: At an unusable row if that stops it; if the folder holds something else.
        BadDataError: At many unusable rows in a row.
        WriteError: If the disk is full, or the folder cannot be written.
        LoadingError: If a process died, or stands still. Started again, it goes on where it stopped.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from vlcpt import CPTDataset, load_processor
        >>> from vlcpt.data.encode.vision import EncodingOptions
        >>> from vlcpt.data.prepared.fingerprint import fingerprint
        >>> from vlcpt.data.rows.open import SourceConfig
        >>> from vlcpt.data.sources import open_source
        >>> from vlcpt.demo import base_path
        >>> processor = load_processor(base_path())
        >>> source = open_source(SourceConfig("rows"), [{"text": "one two"}])
        >>> with TemporaryDirectory() as folder:
        ...     options = EncodingOptions(train_eos="never")
        ...     made_with = fingerprint(processor, "train", options)
        ...     encoder = partial(DocumentEncoder, processor, options)
        ...     prepare_source(source, encoder, Path(folder), fingerprint=made_with)
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['00000.parquet', 'prepared.json']
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
    write_json(folder / BEGUN, about, "what is being prepared", todo=AGAIN)
    shards = [folder / shard_name(number) for number in range(-(-len(source) // shard_rows))]
    write = ShardWriter(source, encoder, folder, shard_rows=shard_rows, stops=stops)
    written = _Written(
        shards, partial(_write_shards, write, engine=engine, num_proc=num_proc, timeout=timeout)
    )
    try:
        for _ in track(written, f"encoding {source.name}"):
            pass
    except WriteError as error:
        done = sum(path.is_file() for path in shards)
        raise WriteError(f"{error} {done:,} of its {len(shards):,} shards are there.") from error
    except LoadingError as error:
        raise LoadingError(f"{error} The same command goes on where this one stopped.") from error
    finally:  # what processes that were killed had begun; all that have worked here have ended
        for path in folder.glob(".*.partial"):
            path.unlink(missing_ok=True)
    _finish(folder, about, shards, source)


class _Written:
    """Shards as they become written, first those that are there."""

    def __init__(self, shards: Sequence[Path], write: Callable[[Sequence[int]], Iterable[int]]) -> None:
        self._shards, self._write = shards, write

    def __len__(self) -> int:
        return len(self._shards)

    def __iter__(self) -> Iterator[int]:
        missing = [number for number, path in enumerate(self._shards) if not _is_written(path)]
        yield from set(range(len(self))) - {*missing}
        if missing:
            yield from self._write(missing)


def _is_written(path: Path) -> bool:
    """Whether a shard is there to its end, where Parquet has its footer: a copy may have been cut."""
    try:
        pq.read_metadata(path)
    except (OSError, pa.ArrowInvalid):
        return False
    return True


def _write_shards(
    write: ShardWriter, shards: Sequence[int], *, engine: Engine, num_proc: int, timeout: float
) -> Iterator[int]:
    """Write shards, each once, and give the number of each when it is done."""
    if engine == "ray":
        yield from _write_on_ray(write, shards)
        return
    if num_proc < 2 or len(shards) < 2:
        for shard in shards:
            write.write(shard)
            yield shard
        return
    with closing(
        read_by_workers(write, shards, num_proc, timeout, write.board, in_order=False)
    ) as written:  # so that workers end with an error
        for number, failed in enumerate(written):
            if failed is not None:
                raise failed
            yield number


def _write_on_ray(write: ShardWriter, shards: Sequence[int]) -> Iterator[int]:
    import ray

    started = not ray.is_initialized()
    if started:  # RAY_ADDRESS names a cluster; without it one is started here
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    context = ray.data.DataContext.get_current()
    before = (context.enable_progress_bars, context.raise_original_map_exception)
    context.enable_progress_bars, context.raise_original_map_exception = False, True
    try:
        # Blocks are dealt out as processors become free: several each, so that none waits for the last.
        blocks = min(len(shards), 8 * int(ray.cluster_resources().get("CPU", 1)))
        numbers = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=blocks)
        for done in numbers.map_batches(write, batch_size=1).iter_batches(batch_size=None):
            yield from done["shard"]
    except ray.exceptions.RayTaskError as error:
        # Ray's class derives from that of the writer's error; its message is a whole trace.
        raise error.cause if isinstance(error.cause, Stopped) else error from None
    finally:
        context.enable_progress_bars, context.raise_original_map_exception = before
        if started:
            ray.shutdown()


def remove_prepared(folder: Path) -> None:
    """Delete what was prepared in a folder, to its end or not, and nothing else that may be there.

    Example:
        >>> remove_prepared(Path("no/such/folder"))
    """
    if not any((folder / name).is_file() for name in (WHOLE, BEGUN)):
        return
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.is_file():
            path.unlink()
    for name in (WHOLE, BEGUN):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # something else is there
        folder.rmdir()


def _is_whole(folder: Path, about: Mapping[str, object]) -> bool:
    """Whether nothing is left to do; an error if the folder holds another source, or this one prepared
    otherwise."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    whole = read_json(str(folder), WHOLE, (SOURCE_KIND,))
    there = whole or read_json(str(folder), BEGUN, (SOURCE_KIND,))
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


def _finish(
    folder: Path, about: Mapping[str, object], shards: Sequence[Path], source: DocumentSource
) -> None:
    """Count what the shards hold, and say that all is there."""
    not_read, documents, media = Counter[str](), 0, 0
    for path in shards:
        try:
            not_read.update(json.loads(pq.read_metadata(path).metadata[b"not_read"]))
            numbers = numbers_in(ParquetRows(path))
        except (DocumentError, OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise _error(f"{path.name} is damaged ({error}). Delete this file. {AGAIN}", folder) from error
        trained = numbers[numbers["targets"] > 0]
        documents += len(trained)
        media += int(trained["images"].sum() + trained["videos"].sum())
    beside = files_beside(source, documents=documents, media=media)
    made_by = {name: version(name) for name in ("transformers", "tokenizers", "pillow", "av")}
    whole = {
        **about,
        "files": {path.name: path.stat().st_size for path in shards},
        "not_read": {**not_read, **beside},
        "versions": {"vlcpt": __version__, **made_by},
    }
    write_json(folder / WHOLE, whole, "what is prepared", todo=AGAIN)
    (folder / BEGUN).unlink()


def _error(reason: str, folder: Path) -> DocumentError:
    return DocumentError(reason, kind="source", field=str(folder))
