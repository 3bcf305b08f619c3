"""A row of a prepared source: an encoded document with its media's bytes, or what is wrong with a row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from vlcpt.data.documents import MAX_WEIGHT, Document, DocumentError, Image, Medium, Source, Video
from vlcpt.data.encode.streams import IGNORE_INDEX, NUMBERS, EncodedDocument, TokenStream, numbers_of
from vlcpt.data.media.files import MediaError
from vlcpt.data.media.open import MediaLimits, open_medium
from vlcpt.data.rows.fields import Row

_LARGEST = 2**62  # a row may ask for more pixels than Parquet can write; no image has as many
MAX_BYTES = (1 << 31) - (1 << 20)  # a page of a Parquet file has at most 2 GiB

_MEDIUM = {
    "is_video": pa.bool_(),
    "path": pa.string(),  # its name in messages; never opened
    "data": pa.binary(),
    # What the row asks of this medium.
    "min_pixels": pa.int64(),
    "max_pixels": pa.int64(),
    "fps": pa.float64(),
    "max_frames": pa.int64(),
}
_ERROR = {"kind": pa.string(), "reason": pa.string(), "field": pa.string(), "offset": pa.int64()}
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("line", pa.int64()),
        ("id", pa.string()),
        ("error", pa.struct(list(_ERROR.items()))),  # of a row that is no document; the rest is then empty
        ("input_ids", pa.list_(pa.int32())),
        # The loss weights in runs of equal ones; 0 where there is no target.
        ("run_lengths", pa.list_(pa.int32())),
        ("run_weights", pa.list_(pa.float32())),
        ("files", pa.list_(pa.struct(list(_MEDIUM.items())))),
        # What planning reads. `tokens` is -1 for a row that is no document.
        *((name, pa.int32()) for name in NUMBERS),
    ]
)


def document_row(document: Document, stream: TokenStream, source: Source, limits: MediaLimits) -> Row:
    """A document as its row, media read into it.

    Args:
        document, stream: The document and its tokens.
        source: Where it stands.
        limits: Of its media.

    Raises:
        DocumentError: If a medium's file cannot be read, or all of them are too large for a row.
    """
    starts = np.append(0, np.flatnonzero(np.diff(stream.loss_weights)) + 1)
    row: Row = {
        **_place(source, document.id),
        "input_ids": stream.input_ids.astype(np.int32),
        "run_lengths": np.diff(np.append(starts, len(stream))).astype(np.int32),
        "run_weights": stream.loss_weights[starts],
        "files": [_medium_row(placed.medium, document, limits) for placed in stream.media],
        **numbers_of(document, stream),
    }
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
    place = error.source or source
    found = {"kind": error.kind, "reason": _utf8(error.reason), "field": _utf8(error.field)}
    numbers = dict.fromkeys(NUMBERS, 0) | {"tokens": -1}
    return {**_place(place, place.id), "error": {**found, "offset": error.offset}, **numbers}


def row_bytes(row: Row) -> int:
    """About how much a row takes in a file."""
    ids, files = row.get("input_ids", []), row.get("files", [])
    assert isinstance(ids, np.ndarray | list)
    assert isinstance(files, list)
    return 200 + 4 * len(ids) + sum(len(one["data"]) for one in files)


def row_source(row: Row) -> Source:
    """Where a row stood, and its id."""
    return Source(str(row["path"]), row["line"], row["id"])  # type: ignore[arg-type]


def row_document(row: Row, folder: str) -> EncodedDocument:
    """A row as a document of a prepared source in this folder.

    Raises:
        DocumentError: The one that its reading gave when it was prepared, if it is no document.
        ValueError, TypeError: If its parts do not fit together, as no vlcpt writes them.
    """
    source, error = row_source(row), row["error"]
    if isinstance(error, dict):
        raise DocumentError(**error, source=source)
    ids, lengths = (np.array(row[name], dtype=np.int64) for name in ("input_ids", "run_lengths"))
    weights = np.array(row["run_weights"], dtype=np.float32)
    # A few bytes may claim runs that take all memory.
    if (lengths < 0).any() or lengths.sum() != len(ids) or not len(ids):
        raise ValueError(f"its loss weights are not those of {len(ids)} tokens")
    if not ((weights >= 0) & (weights <= MAX_WEIGHT)).all() or (ids < 0).any():
        raise ValueError("a token or a loss weight is out of range")
    loss_weights = np.repeat(weights, lengths)
    numbers = {name: int(row[name]) for name in NUMBERS}  # type: ignore[call-overload]
    return EncodedDocument(
        tuple(_medium(one) for one in row["files"]),  # type: ignore[attr-defined]
        id=source.id,
        source=source,
        tagged=not numbers["untagged"],
        empty_spans=numbers["empty_spans"],
        stream=TokenStream(
            input_ids=ids,
            labels=np.where(loss_weights > 0, ids, IGNORE_INDEX),
            loss_weights=loss_weights,
            media=(),
            without_context=numbers["without_context"],
            cut_edges=numbers["cut_edges"],
        ),
        numbers=numbers,
        folder=folder,
    )


def _place(source: Source, called: str | None) -> Row:
    return {"path": _utf8(source.path), "line": source.line, "id": _utf8(called)}


def _utf8(text: str | None) -> str | None:
    """Halves of characters, which a file's name or a JSON escape may hold, written out."""
    return text and text.encode(errors="backslashreplace").decode()


def _medium_row(medium: Medium, document: Document, limits: MediaLimits) -> Row:
    root = None if document.media_root is None else Path(document.media_root)
    try:
        with open_medium(medium, root, limits) as file:
            data = file.read()
    except (MediaError, OSError) as error:
        field = "images" if isinstance(medium, Image) else "videos"
        raise DocumentError(str(error), kind="medium", source=document.source, field=field) from None
    asked = {name: getattr(medium, name, None) for name in ("min_pixels", "max_pixels", "fps", "max_frames")}
    for name, value in asked.items():
        asked[name] = value if value is None or name == "fps" else min(value, _LARGEST)
    return {"is_video": isinstance(medium, Video), "path": _utf8(medium.path), "data": data, **asked}


def _medium(row: Mapping[str, object]) -> Medium:
    if row["data"] is None:  # its path would be opened, on the machine of whoever trains from it
        raise ValueError("a medium has no bytes")
    asked = {name: row[name] for name in ("path", "data", "min_pixels", "max_pixels")}
    if not row["is_video"]:
        return Image(**asked)  # type: ignore[arg-type]
    return Video(**asked, fps=row["fps"], max_frames=row["max_frames"])  # type: ignore[arg-type]
