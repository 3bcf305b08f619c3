"""The documents that doctor trains on, of the embedded data: text, images, clips, in any number."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path

import av
import numpy as np
from PIL import Image as PILImage

from vlcpt.demo import base_path, data_path

Row = dict[str, object]
# Loss weights that the documents take in turn: the loss of a step is weighted.
_WEIGHTS = ("", ' weight="0.5"', "", ' weight="3"')
_PIXELS = 28  # to a side of what becomes one token
_PAGE = 2433  # tokens of a document, at most
_FULL = 0.96  # of a pack, because tokens of text are estimated


def documents(count: int) -> list[Row]:
    """Rows of images, clips and text in turn, the media with them; distinct ids.

    Example:
        >>> rows = documents(5)
        >>> [sorted(set(one) - {"id", "text"}) for one in rows]
        [['videos'], ['videos'], ['images'], ['images'], []]
    """
    rows = islice(cycle(_embedded()), count)
    return [{**row, "id": f"document-{number}"} for number, row in enumerate(rows)]


@cache
def _embedded() -> tuple[Row, ...]:
    """Rows of both embedded data sets with a paragraph of text after every fourth, weighted in turn."""
    paragraphs = cycle(Path(base_path()).with_name("general.txt").read_text("utf-8").split("\n"))
    media = [row for pair in zip(_rows("new_train"), _rows("old_replay"), strict=False) for row in pair]
    found: list[Row] = []
    for number, row in enumerate(media[:96]):
        weight = _WEIGHTS[number % len(_WEIGHTS)]
        text = str(row["text"]).replace("<trainable_text>", f"<trainable_text{weight}>")
        found.append({**row, "text": text})
        if number % 4 == 3:
            first, _, rest = next(paragraphs).partition(". ")
            found.append({"text": f"{first}. <trainable_text>{rest}</trainable_text>"})
    return tuple(found)


def _rows(name: str) -> Iterator[Row]:
    folder = Path(data_path())
    for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        media = {
            key: [{"bytes": (folder / one).read_bytes()} for one in row[key]]
            for key in ("images", "videos")
            if key in row
        }
        yield {"text": row["text"], **media}


def clip_seconds(row: Mapping[str, object]) -> list[float]:
    """How long each clip of a row takes, as its file says.

    Example:
        >>> clip_seconds(documents(1)[0])
        [4.0]
    """
    clips = row.get("videos", [])
    assert isinstance(clips, list)
    return [_seconds(one["bytes"]) for one in clips]


@cache
def _seconds(file: bytes) -> float:
    with av.open(BytesIO(file)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate is not None
        return float(stream.frames / stream.average_rate)


def long_documents(max_length: int, tokens: int, *, characters: float) -> list[Row]:
    """Rows that fill packs of ``max_length`` tokens: each three images and as many tokens of text as one has.

    At most as long as a page of a manual with three figures of 800 × 600 (2,433 tokens), and so long that as
    many of them as fit fill a pack.

    Args:
        tokens: Those of all rows together, about.
        characters: How many of a text make a token, about.

    Example:
        >>> len(long_documents(512, 2000, characters=4.0))
        5
    """
    each = round(_FULL * max_length) // -(-max_length // _PAGE)
    height = max(1, round((each / 4 * 3 / 4) ** 0.5))
    width = max(1, each // 4 // height)
    text_tokens = max(4, each - 3 * (height * width + 2))
    general = Path(base_path()).with_name("general.txt").read_text("utf-8").replace("\n", " ")
    length = round(text_tokens * characters)
    general *= 2 + length // len(general)
    count = -(-tokens // each)
    rows: list[Row] = []
    for number in range(count):
        start = number * 997 % (len(general) - length)
        text = general[start : start + length]
        cut = length // 3  # two thirds are trained, as in the reference document of the benchmarks
        images = [{"bytes": _photo(3 * number + place, width, height)} for place in range(3)]
        rows.append(
            {
                "id": f"page-{number}",
                "text": f"<image><image>{text[:cut]}<image><trainable_text>{text[cut:]}</trainable_text>",
                "images": images,
            }
        )
    return rows


def _photo(seed: int, width: int, height: int) -> bytes:
    """A JPEG of coloured patches, ``width`` by ``height`` tokens."""
    rng = np.random.default_rng(seed)
    pixels = np.kron(rng.integers(0, 256, (height, width, 3)), np.ones((_PIXELS, _PIXELS, 1)))
    file = BytesIO()
    PILImage.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def text_of(rows: Sequence[Mapping[str, object]]) -> str:
    """The text of some rows, to count its tokens.

    Example:
        >>> text_of([{"text": "a"}, {"text": "b"}])
        'ab'
    """
    return "".join(str(row["text"]) for row in rows)
