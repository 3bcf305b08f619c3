"""Each form of a row is the same documents from every storage, and with pictures in memory."""

import base64
import copy
import json
import tarfile
from io import BytesIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage

from tests.support import opened, png
from vlcpt import Text

PNG = png(1)
PICTURE = "PICTURE"  # where a row has its one medium

ASK = {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What?"}]}
BY_INDEX = {"type": "image", "index": 0}
MATCHED = {"image_name": PICTURE, "raw_url": "http://example.org/b", "matched_text_index": 1}
TURNS = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "Noise."}]
# Format, rows: the second one makes Arrow fill what the first one has with nulls, or the other way round.
FORMS = {
    "vlcpt": (
        "vlcpt",
        [{"text": "<image>a <trainable_text>b</trainable_text>", "images": [PICTURE]}, {"text": "a"}],
    ),
    "segments": (
        "segments",
        [
            {
                "segments": [
                    {"type": "image", "image": PICTURE},
                    {"type": "text", "text": "a", "trainable": True, "weight": 0.5},
                    {"type": "text", "text": "b", "trainable": False},
                ]
            }
        ],
    ),
    "sharegpt": (
        "sharegpt",
        [{"conversations": TURNS, "images": [PICTURE]}, {"conversations": TURNS[1:], "system": "s"}],
    ),
    "sharegpt with switches": (
        "sharegpt",
        [
            {
                "conversations": [
                    TURNS[0],
                    {"from": "gpt", "value": "a", "loss": False},
                    {"from": "gpt", "value": "b", "loss_weight": 0.5},
                    {"from": "gpt", "value": "c", "train": True},
                    {"from": "gpt", "value": "d", "weight": 0.0},
                    {"from": "gpt", "value": "e", "loss_scale": 2.0},
                    {
                        "from": "gpt",
                        "value": "fgh",
                        "train_detail": [{"begin_offset": 1, "end_offset": 1, "train": True}],
                    },
                ],
                "images": [PICTURE],
            }
        ],
    ),
    "messages": (
        "messages",
        [
            {
                "messages": [
                    {"role": "user", "content": "<image>What?"},
                    {"role": "assistant", "content": "a", "loss": False},
                    {"role": "assistant", "content": "Noise."},
                ],
                "images": [PICTURE],
            }
        ],
    ),
    "messages of parts": (
        "messages",
        [{"messages": [ASK, {"role": "assistant", "content": [{"type": "text", "text": "Noise."}]}]}],
    ),
    "messages of parts with image_url": (
        "messages",
        [
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": PICTURE, "detail": "low"}},
                            {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
                        ],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
                ]
            }
        ],
    ),
    "messages of parts with sizes": (
        "messages",
        [
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "max_pixels": 3136, "resized_height": 28},
                            {"type": "text", "text": "a"},
                        ],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
                ],
                "images": [PICTURE],
            }
        ],
    ),
    "messages of parts with index": (
        "messages",
        [
            {
                "messages": [
                    {"role": "user", "content": [BY_INDEX, {"type": "text", "text": "a"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
                ],
                "images": [PICTURE],
            }
        ],
    ),
    "messages with chat_template_kwargs": (
        "messages",
        [
            {
                "messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a"}],
                "images": [PICTURE],
                "chat_template_kwargs": {"max_pixels": 3136},
            },
            {
                "messages": [{"role": "assistant", "content": "a"}],
                "chat_template_kwargs": {"enable_thinking": False},
            },
        ],
    ),
    "alpaca": (
        "alpaca",
        [
            {"instruction": "<image>a", "input": "b", "output": "c", "images": [PICTURE]},
            {"instruction": "a", "output": "c", "history": [["d", "e"], ["f", "g"]], "system": "s"},
        ],
    ),
    "query": (
        "query",
        [
            {"query": "<image>a", "response": "b", "images": [PICTURE], "history": [["c", "d"]]},
            {"instruction": "a", "response": "b", "system": "s"},
        ],
    ),
    "docmatix": (
        "docmatix",
        [
            {
                "images": [PICTURE],
                "texts": [
                    {"user": "a", "assistant": "b", "source": "s"},
                    {"user": "c", "assistant": "d"},
                ],
            }
        ],
    ),
    "caption": ("caption", [{"image": PICTURE, "caption": "a"}]),
    "caption under text": ("caption", [{"image": PICTURE, "text": "a"}]),
    "obelics": ("obelics", [{"images": [None, PICTURE], "texts": ["a", None], "metadata": "[]"}]),
    "mmc4": (
        "mmc4",
        [
            {
                "text_list": ["a", "b"],
                "image_info": [MATCHED],
                "similarity_matrix": [[0.1, 0.3]],
            }
        ],
    ),
}  # fmt: skip
BY_NAME_ALONE = {"mmc4"}
AN_ADDRESS = {"messages of parts with image_url"}  # a text, or a picture in memory
STORAGES = ("jsonl", "json", "parquet", "arrow", "saved", "memory", "tar")


def filled(value, picture):
    """A row with something in the place of its picture."""
    if isinstance(value, dict):
        return {key: filled(one, picture) for key, one in value.items()}
    if isinstance(value, list):
        return [filled(one, picture) for one in value]
    return picture if isinstance(value, str) and value == PICTURE else value


def stored(folder, storage, rows):
    """The rows in this storage, in a folder that has the picture a.png, and what opens them."""
    path = folder / f"rows.{storage}"
    if storage == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif storage == "json":
        path.write_text(json.dumps(rows))
    elif storage == "parquet":
        pq.write_table(pa.Table.from_pylist(columns(rows)), path)
    elif storage == "arrow":
        table = pa.Table.from_pylist(columns(rows))
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    elif storage == "saved":
        datasets.Dataset.from_list(columns(rows)).save_to_disk(path)
        (path / "a.png").write_bytes(PNG)
    elif storage == "memory":
        return copy.deepcopy(rows)
    else:
        with tarfile.open(path, "w") as archive:
            for number, row in enumerate(rows):
                members = [(f"{number}.json", json.dumps(row).encode())]
                members += [(f"{number}.a.png", PNG)] if "a.png" in json.dumps(row) else []
                for name, data in members:
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, BytesIO(data))
    return path


def columns(rows):
    """Rows with every field, as tables have them."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def read(source, folder, **options):
    found = opened(source, media_root=folder, **options)
    return [found.document(number) for number in range(len(found))]


def told(document):
    """All of a document but how its picture is called."""
    segments = [
        (type(one).__name__, one.min_pixels, one.max_pixels) if hasattr(one, "max_pixels") else one
        for one in document.segments
    ]
    return segments, document.not_read


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("form", FORMS)
def test_a_form_gives_the_same_documents_from_every_storage(tmp_path, form, storage):
    format, rows = FORMS[form]
    (tmp_path / "a.png").write_bytes(PNG)
    rows = filled(rows, "a.png")

    expected = read(stored(tmp_path, "jsonl", rows), tmp_path, format=format)
    found = read(stored(tmp_path, storage, rows), tmp_path)  # and recognised

    assert [told(one) for one in found] == [told(one) for one in expected]
    # Each row's own picture, read from the file or with its bytes.
    assert [image.path for image in expected[0].images] == ["a.png"]
    for document in found:
        for image in document.images:
            assert (image.path, image.data) == (("0.a.png", PNG) if storage == "tar" else ("a.png", None))


@pytest.mark.parametrize("storage", STORAGES)
def test_rows_of_plain_text_are_their_characters_from_every_storage(tmp_path, storage):
    texts = ["<image>a <trainable_text>b</trainable_text> \\<image>", "<Trainable-Text> <img>a.png</img>"]
    rows = [{"text": text, "image_path": "a.png", "score": n} for n, text in enumerate(texts)]
    (tmp_path / "a.png").write_bytes(PNG)
    found = read(stored(tmp_path, storage, rows), tmp_path, format="text")
    assert [one.segments for one in found] == [(Text(text, trainable=True),) for text in texts]
    assert [one.not_read for one in found] == [(), ()]


@pytest.mark.parametrize("storage", ["jsonl", "parquet", "arrow", "saved", "memory"])
@pytest.mark.parametrize("form", [form for form in FORMS if form not in BY_NAME_ALONE | AN_ADDRESS])
def test_a_form_gives_the_same_documents_with_bytes_in_a_struct(tmp_path, form, storage):
    format, rows = FORMS[form]
    data = base64.b64encode(PNG).decode() if storage == "jsonl" else PNG
    found = read(
        stored(tmp_path, storage, filled(rows, {"bytes": data, "path": None})), tmp_path, format=format
    )
    named = read(stored(tmp_path, "jsonl", filled(rows, "a.png")), tmp_path, format=format)

    assert [told(one) for one in found] == [told(one) for one in named]
    assert [image.data for one in found for image in one.images] == [PNG]


@pytest.mark.parametrize("form", [form for form in FORMS if form not in BY_NAME_ALONE])
def test_a_form_takes_a_picture_in_memory(tmp_path, form):
    format, rows = FORMS[form]
    picture = PILImage.open(BytesIO(PNG))
    found = read(filled(rows, picture), tmp_path)
    named = read(stored(tmp_path, "jsonl", filled(rows, "a.png")), tmp_path, format=format)

    assert [told(one) for one in found] == [told(one) for one in named]
    (image,) = [image for one in found for image in one.images]
    assert PILImage.open(BytesIO(image.data)).tobytes() == picture.tobytes()
