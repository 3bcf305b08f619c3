"""The files of a prepared source: a row for each of its rows, in small batches that are read alone.

A shard is an Arrow file that anything can read. Beside it stand, for all shards together, the integers that
planning needs and the place of every batch, so that one document is one short read, local or over a network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from vlcpt.data.documents import MAX_WEIGHT, Document, DocumentError, Image, Medium, Source, Video
from vlcpt.data.encode.streams import EncodedDocument, TokenStream
from vlcpt.data.encode.vision import PlacedMedium
from vlcpt.data.media.open import MediaError, MediaLimits, open_medium
from vlcpt.data.media.videos import Clip

Row = dict[str, object]
IGNORED = -100
_LARGEST = 2**62  # a row may ask for more pixels than Arrow can write; no image has as many

_CLIP = {
    "height": pa.int32(),
    "width": pa.int32(),
    "total_frames": pa.int64(),
    "video_fps": pa.float64(),
    "indices": pa.list_(pa.int64()),
}
_MEDIUM = {
    "is_video": pa.bool_(),
    "path": pa.string(),
    "data": pa.large_binary(),
    # What the row asked of this medium.
    "min_pixels": pa.int64(),
    "max_pixels": pa.int64(),
    "fps": pa.float64(),
    "max_frames": pa.int64(),
    # What came of it.
    "start": pa.int64(),
    "grid_thw": pa.list_(pa.int64()),
    "size": pa.list_(pa.int64()),
    "lowest": pa.int64(),
    "merge": pa.int32(),
    "patch": pa.int32(),
    "interval": pa.float64(),
    "clip": pa.struct(list(_CLIP.items())),
}
_ERROR = {"kind": pa.string(), "reason": pa.string(), "field": pa.string(), "offset": pa.int64()}
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("line", pa.int64()),
        ("id", pa.string()),
        ("error", pa.struct(list(_ERROR.items()))),  # of a row that is no document; the rest is then empty
        ("tagged", pa.bool_()),
        ("empty_spans", pa.int32()),
        ("without_context", pa.int32()),
        ("cut_edges", pa.int32()),
        ("input_ids", pa.list_(pa.int32())),
        # The loss weights in runs of equal ones; 0 where there is no target.
        ("run_lengths", pa.list_(pa.int32())),
        ("run_weights", pa.list_(pa.float32())),
        ("media", pa.list_(pa.struct(list(_MEDIUM.items())))),
    ]
)
_ARRAYS = ("input_ids", "run_lengths", "run_weights")
_REST = [name for name in SCHEMA.names if name not in _ARRAYS]

# What planning needs of a row. `tokens` is -1 for a row that is no document; `length` ends with the last
# target; `pads` and `media` lie before it.
INDEX = ("tokens", "length", "targets", "pads", "media", "images", "videos", "without_context", "cut_edges",
         "untagged", "empty_spans", "checksum")  # fmt: skip
INDEX_SCHEMA = pa.schema([(name, pa.int32()) for name in INDEX])
PLACES_SCHEMA = pa.schema(
    [("first", pa.int64()), ("shard", pa.int32()), ("offset", pa.int64()), ("size", pa.int64()),
     ("digest", pa.uint64())]
)  # fmt: skip


def document_row(
    document: Document, stream: TokenStream, source: Source, limits: MediaLimits
) -> tuple[Row, list[int]]:
    """A document as its row, media read into it, and its integers in the order of ``INDEX``.

    Args:
        document, stream: The document and its tokens.
        source: Where it stands.
        limits: Of its media.

    Raises:
        DocumentError: If a medium's file cannot be read.
    """
    changes = np.flatnonzero(np.diff(stream.loss_weights)) + 1
    starts = np.append(0, changes)
    root = None if document.media_root is None else Path(document.media_root)
    row: Row = {
        **_place(source, document.id),
        "tagged": document.tagged,
        "empty_spans": document.empty_spans,
        "without_context": stream.without_context,
        "cut_edges": stream.cut_edges,
        "input_ids": stream.input_ids.astype(np.int32),
        "run_lengths": np.diff(np.append(starts, len(stream))).astype(np.int32),
        "run_weights": stream.loss_weights[starts],
        "media": [_medium_row(placed, document, root, limits) for placed in stream.media],
    }
    return row, index_line(document, stream)


def index_line(document: Document, stream: TokenStream) -> list[int]:
    """A document's integers in the order of ``INDEX``."""
    targets = np.flatnonzero(stream.labels >= 0)
    length = int(targets[-1]) + 1 if len(targets) else 0
    kept = [placed.tokens for placed in stream.media if placed.stop <= length]
    media, marks = (len(document.images), len(document.videos)), (not document.tagged, document.empty_spans)
    counts = (len(stream), length, len(targets), sum(kept), len(kept))
    marked = (stream.without_context, stream.cut_edges, *map(int, marks))
    return [*counts, *media, *marked, stream.checksum]


def error_row(error: DocumentError, source: Source) -> tuple[Row, list[int]]:
    """A row that is no document, with what is wrong, and its integers."""
    place = error.source or source
    told = {"kind": error.kind, "reason": _utf8(error.reason), "field": _utf8(error.field)}
    return {**_place(place, place.id), "error": {**told, "offset": error.offset}}, [-1] + [0] * (
        len(INDEX) - 1
    )


def row_source(batch: pa.RecordBatch, number: int) -> Source:
    """Where row ``number`` of a batch stood, and its id."""
    path, line, called = (batch.column(name)[number].as_py() for name in ("path", "line", "id"))
    return Source(path, line, called)


def row_document(batch: pa.RecordBatch, number: int, folder: str = "") -> EncodedDocument:
    """Row ``number`` of a batch as a document of a prepared source in this folder.

    Raises:
        DocumentError: The one that its reading gave when it was prepared, if it is no document.
        ValueError: If its parts do not fit together, as no vlcpt writes them.
    """
    row = batch.select(_REST).slice(number, 1).to_pylist()[0]
    source = Source(row["path"], row["line"], row["id"])
    if (error := row["error"]) is not None:
        raise DocumentError(
            error["reason"], kind=error["kind"], source=source, field=error["field"], offset=error["offset"]
        )
    ids, lengths, weights = (as_numpy(batch.column(name)[number].values) for name in _ARRAYS)
    _require_runs(ids, lengths, weights)
    input_ids = ids.astype(np.int64)
    loss_weights = np.repeat(weights, lengths)
    media = tuple(_placed(one) for one in row["media"])
    _require_places(media, len(input_ids))
    stream = TokenStream(
        input_ids=input_ids,
        labels=np.where(loss_weights > 0, input_ids, IGNORED),
        loss_weights=loss_weights,
        media=media,
        without_context=row["without_context"],
        cut_edges=row["cut_edges"],
    )
    return EncodedDocument(
        tuple(placed.medium for placed in media),
        id=row["id"],
        source=source,
        tagged=row["tagged"],
        empty_spans=row["empty_spans"],
        stream=stream,
        folder=folder,
    )


def as_numpy(array: pa.Array) -> np.ndarray:
    """Numbers without a copy; ``to_numpy`` would import pandas, in every worker.

    Example:
        >>> as_numpy(pa.array([1, 2])).tolist()
        [1, 2]
    """
    return np.from_dlpack(array)


def _place(source: Source, called: str | None) -> Row:
    return {"path": _utf8(source.path), "line": source.line, "id": _utf8(called)}


def _utf8(text: str | None) -> str | None:
    """Halves of characters, which a file's name or a JSON escape may hold, written out."""
    return text and text.encode(errors="backslashreplace").decode()


def _bounded(number: int | None) -> int | None:
    return None if number is None else min(number, _LARGEST)


def _medium_row(
    placed: PlacedMedium, document: Document, root: Path | None, limits: MediaLimits
) -> dict[str, object]:
    medium, clip = placed.medium, placed.clip
    try:
        with open_medium(medium, root, limits) as file:
            data = file.read()
    except (MediaError, OSError) as error:
        field = "images" if isinstance(medium, Image) else "videos"
        raise DocumentError(str(error), kind="medium", source=document.source, field=field) from None
    return {
        "is_video": isinstance(medium, Video),
        "path": _utf8(medium.path),
        "data": data,
        "min_pixels": _bounded(medium.min_pixels),
        "max_pixels": _bounded(medium.max_pixels),
        "fps": medium.fps if isinstance(medium, Video) else None,
        "max_frames": _bounded(medium.max_frames) if isinstance(medium, Video) else None,
        "start": placed.start,
        "grid_thw": placed.grid_thw,
        "size": placed.size,
        "lowest": placed.min_pixels,
        "merge": placed.merge,
        "patch": placed.patch,
        "interval": placed.interval,
        "clip": None if clip is None else {name: getattr(clip, name) for name in _CLIP},
    }


def _require_runs(ids: np.ndarray, lengths: np.ndarray, weights: np.ndarray) -> None:
    """A few bytes may claim runs that take all memory."""
    if (lengths < 0).any() or lengths.sum(dtype=np.int64) != len(ids) or not len(ids):
        raise ValueError(f"its loss weights are not those of {len(ids)} tokens")
    if not ((weights >= 0) & (weights <= MAX_WEIGHT)).all() or (ids < 0).any():
        raise ValueError("a token or a loss weight is out of range")


def _require_places(media: Sequence[PlacedMedium], tokens: int) -> None:
    """Media stand one after the other among the tokens, so that no grid is larger than they are."""
    end = 0
    for placed in media:
        if min(*placed.grid_thw, placed.merge, placed.patch) < 1 or len(placed.grid_thw) != 3:
            raise ValueError(f"the grid {placed.grid_thw} of a medium is none")
        if (
            placed.start < end
            or placed.stop > tokens
            or not placed.tokens
            or not 0 < placed.interval < np.inf
        ):
            raise ValueError("a medium does not stand among its tokens")
        end = placed.stop


def _placed(row: Mapping[str, object]) -> PlacedMedium:
    get: Callable[[str], object] = row.__getitem__
    if get("data") is None:  # its path would be opened, on the machine of whoever trains from it
        raise ValueError("a medium has no bytes")
    limits = {name: get(name) for name in ("min_pixels", "max_pixels")}
    medium: Medium
    if get("is_video"):
        sampling = {name: get(name) for name in ("fps", "max_frames")}
        medium = Video(get("path"), get("data"), **limits, **sampling)  # type: ignore[arg-type]
    else:
        medium = Image(get("path"), get("data"), **limits)  # type: ignore[arg-type]
    clip = get("clip")
    if isinstance(clip, Mapping):
        clip = Clip(**{**clip, "indices": tuple(clip["indices"])})
    return PlacedMedium(
        medium=medium,
        start=get("start"),  # type: ignore[arg-type]
        grid_thw=tuple(get("grid_thw")),  # type: ignore[arg-type]
        size=tuple(get("size")),  # type: ignore[arg-type]
        min_pixels=get("lowest"),  # type: ignore[arg-type]
        merge=get("merge"),  # type: ignore[arg-type]
        patch=get("patch"),  # type: ignore[arg-type]
        interval=get("interval"),  # type: ignore[arg-type]
        clip=clip,  # type: ignore[arg-type]
    )
