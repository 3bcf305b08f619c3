"""What of a row is not read is named; a row that would lose its only medium by it is an error."""

import base64
import json
import re
import time

import datasets
import numpy
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image as PILImage

from tests.support import opened, png
from vlcpt import CPTDataset, DocumentError, load_processor, read_documents
from vlcpt.data.formats.marked import OTHER_BRACKETS
from vlcpt.data.formats.unread import LINKS, list_unread
from vlcpt.data.plan.ledger import BadDataError
from vlcpt.data.rows import tars
from vlcpt.demo import base_path

PNG = png(1)
JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(range(200, 256)) * 2
TEXT = {"text": "Fig. 1 shows a valve."}
CHAT = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Noise."}]}


@pytest.fixture
def rows(tmp_path):
    """Writes rows beside the picture a.png."""
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "plain").write_bytes(PNG)

    def write(*found):
        path = tmp_path / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
        return path

    return write


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (TEXT | {"image_path": "a.png"}, "image_path"),
        (TEXT | {"file_name": "a.png"}, "file_name"),
        (TEXT | {"image_url": "a.png"}, "image_url"),
        (TEXT | {"image_url": "https://example.org/b.jpg?w=9"}, "image_url"),
        (TEXT | {"image_url": {"url": "b.webp"}}, "image_url"),
        (TEXT | {"Image": "a.png"}, "Image"),
        (TEXT | {"image_list": ["a.png"]}, "image_list"),
        (TEXT | {"image_list": "['gone.png']"}, "image_list"),
        (TEXT | {"photo": "gone.HEIC"}, "photo"),
        (TEXT | {"picture": "gone.avif"}, "picture"),
        (TEXT | {"videoFile": "gone.mp4"}, "videoFile"),
        (TEXT | {"image_file": "plain"}, "image_file"),
        (TEXT | {"meta": {"source": {"path": "a.png"}}}, "meta"),
        (TEXT | {"meta": {"image": "gone.png"}}, "meta"),
        (TEXT | {"images_meta": {"source": "https://example.org/a.png"}}, "images_meta"),
        (TEXT | {"content": base64.b64encode(PNG).decode()}, "content"),
        (TEXT | {"content": "data:image/png;base64," + base64.b64encode(PNG).decode()}, "content"),
        (TEXT | {"content": {"bytes": base64.b64encode(PNG).decode()}}, "content"),
        (TEXT | {"meta": {"pages": [{"figures": [{"crop": {"file": {"name": "a.png"}}}]}]}}, "meta"),
        (TEXT | {"layout": [{"kind": "text"}] * 100 + [{"kind": "figure", "file": "a.png"}]}, "layout"),
        (TEXT | {"content": base64.urlsafe_b64encode(JPEG).decode()}, "content"),
        (TEXT | {"content": str(base64.b64encode(PNG))}, "content"),
        (TEXT | {"cover": "data:;base64," + base64.b64encode(PNG).decode()}, "cover"),
        (TEXT | {"图片": "images/gone.png"}, "图片"),
        (TEXT | {"视频路径": "gone.mp4"}, "视频路径"),
        (CHAT | {"image_path": "a.png"}, "image_path"),
        ({"messages": [{"role": "assistant", "content": "Noise."}], "img": "a.png"}, "img"),
        ({"segments": [{"type": "text", "text": "a", "trainable": True}], "image": "a.png"}, "image"),
        ({"text_list": ["a"], "image_info": [], "images": ["a.png"]}, "images"),
        ({"instruction": "a", "output": "b", "image_path": "a.png"}, "image_path"),
        ({"query": "a", "response": "b", "img": "gone.jpg"}, "img"),
        ({"texts": [{"user": "a", "assistant": "b"}], "page_image": "a.png"}, "page_image"),
    ],
)  # fmt: skip
def test_a_row_that_would_lose_its_medium_is_an_error_that_names_the_field(rows, row, field):
    with pytest.raises(DocumentError, match=r"does not read this field") as caught:
        list(read_documents(rows(row)))
    assert caught.value.field == field
    assert f"ignore_fields: [{field}]" in caught.value.reason
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "name", ["image, 2", "image: path", "image #1", "图片 1", "1image", "[image]", 'my "img"']
)
def test_the_way_out_can_be_pasted_whatever_the_field_is_called(rows, name):
    path = rows(TEXT | {name: "a.png"})
    with pytest.raises(DocumentError, match="otherwise set ignore_fields: ") as caught:
        list(read_documents(path))
    wanted = re.search(r"ignore_fields: \[.*\] for the source", caught.value.reason)[0]
    found = yaml.safe_load(wanted.removesuffix(" for the source"))
    assert found == {"ignore_fields": [name]}
    assert next(read_documents(path, ignore_fields=found["ignore_fields"])).not_read == ()


TURNS = [
    ({"conversations": [{"from": "gpt", "value": "a", "image": "a.png"}]}, "conversations[].image"),
    ({"messages": [{"role": "assistant", "content": "a", "images": ["a.png"]}]}, "messages[].images"),
    ({"messages": [{"role": "assistant", "content": "a", "img": {"url": "b.webp"}}]}, "messages[].img"),
    ({"texts": [{"user": "a", "assistant": "b", "image": "a.png"}]}, "texts[].image"),
]


@pytest.mark.parametrize(("row", "name"), TURNS)
def test_a_medium_in_a_key_of_a_turn_that_is_not_read_is_an_error_and_can_be_ignored(rows, row, name):
    with pytest.raises(DocumentError, match=r"does not read this field") as caught:
        list(read_documents(rows(row)))
    assert caught.value.field == name
    assert f'ignore_fields: ["{name}"]' in caught.value.reason
    (document,) = read_documents(rows(row), ignore_fields=[name])
    assert document.not_read == ()


@pytest.mark.parametrize(("row", "name"), TURNS)
def test_it_is_named_where_the_row_has_a_medium_that_is_read(rows, row, name):
    ((field, (turn,)),) = row.items()
    marked = turn | ({"content": "<image>a"} if field == "messages" else {})
    (document,) = read_documents(rows({field: [marked], "images": ["a.png"]}))
    assert len(document.images) == 1
    assert document.not_read == (name,)


def test_other_keys_of_a_turn_stop_nothing_and_are_named(rows):
    turn = {"role": "assistant", "content": "a", "image_id": 7, "name": "img", "video_title": "a.mp4"}
    others = {"role": "user", "content": [{"type": "text", "text": "b", "annotations": [1]}], "mask": None}
    (document,) = read_documents(rows({"messages": [others, turn]}))
    assert document.not_read == (
        "messages[].content[].annotations",
        *(f"messages[].{key}" for key in ("image_id", "name", "video_title")),
    )


def test_text_in_a_part_that_is_a_picture_is_named(rows):
    part = {"type": "image", "image": "a.png", "text": "A valve."}
    (document,) = read_documents(rows({"messages": [{"role": "user", "content": [part]}]}))
    assert document.not_read == ("messages[].content[].text",)


SWITCHES = [
    *({"mask": True}, {"mask": 1}, {"masked": True}, {"loss_mask": 0}, {"trainable": False}),
    *({"train_on_turn": False}, {"label": False}, {"isTrain": False}, {"Loss": False}, {"LOSS": "false"}),
    *({"no_loss": True}, {"ignore_loss": True}, {"cal_loss": 0}, {"not_masked": False}),
]


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("field", ["conversations", "messages", "texts"])
def test_a_key_of_a_turn_that_seems_to_switch_it_off_is_an_error_and_can_be_ignored(rows, field, switch):
    turn = {
        "conversations": {"from": "gpt", "value": "Noise."},
        "messages": {"role": "assistant", "content": "Noise."},
        "texts": {"user": "What?", "assistant": "Noise."},
    }[field]
    name = f"{field}[].{next(iter(switch))}"
    path = rows({field: [turn | switch]})
    with pytest.raises(DocumentError, match='Write "loss": false into the turn') as caught:
        list(read_documents(path))
    assert caught.value.field == name
    (document,) = read_documents(path, ignore_fields=[name])
    assert document.not_read == ()


@pytest.mark.parametrize("switch", [{"loss": False}, {"weight": 0}, {"train": False}])
def test_a_part_that_seems_to_be_switched_off_is_an_error(rows, switch):
    part = {"type": "text", "text": "Noise."} | switch
    with pytest.raises(DocumentError, match="seems to say that this is not trained"):
        list(read_documents(rows({"messages": [{"role": "assistant", "content": [part]}]})))


@pytest.mark.parametrize(
    "switch",
    [
        *({"mask": "User"}, {"trainable": True}, {"label": "fine"}, {"training_id": 7}, {"label": 0}),
        *({"label_id": 0}, {"train_id": 0}, {"train_step": 0}, {"masked": False}, {"not_masked": True}),
    ],
)
def test_keys_that_switch_nothing_off_are_named(rows, switch):
    (document,) = read_documents(rows({"messages": [{"role": "assistant", "content": "a"} | switch]}))
    assert document.not_read == (f"messages[].{next(iter(switch))}",)


def test_a_medium_in_a_part_of_text_is_an_error(rows):
    part = {"type": "text", "text": "a", "image_url": {"url": "a.png"}}
    with pytest.raises(DocumentError, match=r"messages\[\]\.content\[\]\.image_url: it holds the name"):
        list(read_documents(rows({"messages": [{"role": "user", "content": [part]}]})))


def test_keys_beside_references_can_be_ignored(rows):
    row = {"text": "<image>a", "images": [{"path": "a.png", "detail": "low"}]}
    assert next(read_documents(rows(row))).not_read == ("images[].detail",)
    assert next(read_documents(rows(row), ignore_fields=["images[].detail"])).not_read == ()


def test_fields_that_are_ignored_on_purpose_are_neither_errors_nor_named(rows):
    path = rows(TEXT | {"image_path": "a.png", "source": "web"})
    (document,) = read_documents(path, ignore_fields=["image_path"])
    assert document.not_read == ("source",)


@pytest.mark.parametrize("way", ["memory", "parquet", "saved"])
def test_bytes_in_a_column_that_is_not_read_are_an_error_from_every_table(tmp_path, way):
    found = [TEXT | {"content": None}] * 3 + [TEXT | {"content": {"bytes": PNG, "path": None}}]
    source = found
    if way == "parquet":
        source = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist(found[::-1]), source)
    if way == "saved":
        source = tmp_path / "saved"
        datasets.Dataset.from_list(found[::-1]).save_to_disk(source)
    read = opened(source)
    bad = 3 if way == "memory" else 0
    with pytest.raises(DocumentError, match="content: it holds the bytes of a PNG"):
        read.document(bad)
    assert read.document(2).not_read == ()


def test_a_picture_in_memory_under_another_name_is_an_error():
    with pytest.raises(DocumentError, match="page: it holds an image"):
        opened([TEXT | {"page": PILImage.new("RGB", (30, 30))}]).document(0)


@pytest.mark.parametrize("name", ["file://{folder}/sub/b.png", "sub\\b.png"])
def test_a_name_is_that_of_a_file_as_other_systems_write_it_too(rows, tmp_path, name):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.png").write_bytes(PNG)
    with pytest.raises(DocumentError, match="uri: it holds the name of a file that is there"):
        list(read_documents(rows(TEXT | {"uri": name.format(folder=tmp_path)})))


def test_a_path_in_memory_is_a_path(tmp_path):
    with pytest.raises(DocumentError, match="image_path: it holds the name"):
        opened([TEXT | {"image_path": tmp_path / "a.png"}]).document(0)
    row = {"text": "<image>", "images": [tmp_path / "a.png"], "videos": []}
    assert opened([row]).document(0).images[0].path == str(tmp_path / "a.png")


@pytest.mark.parametrize(
    "row",
    [
        {"text": "<image>A valve."},
        {"text": "<IMG1>A valve."},
        {"conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A."}]},
        {"messages": [{"role": "user", "content": "<image>What?"}]},
    ],
)
def test_a_marker_without_a_file_names_the_field_that_has_it(rows, row):
    with pytest.raises(DocumentError, match="The row has one in 'image_path', which format") as caught:
        list(read_documents(rows(row | {"image_path": "a.png"})))
    assert "format: text" not in str(caught.value)
    with pytest.raises(DocumentError) as caught:
        list(read_documents(rows(row | {"source": "web"})))
    assert "The row has one" not in str(caught.value)


def test_of_very_many_fields_the_first_are_named_and_the_files():
    counts = {f"field{number}": 2 for number in range(500)}
    counts |= {OTHER_BRACKETS: 1, tars.UNNAMED: 2, "media files beside the rows": 1}
    said = list_unread(counts)
    assert said.startswith("not read: field0 (2 rows), field1 (2 rows)")
    assert said.endswith(
        "field19 (2 rows), tags in other brackets than < and >, "
        "which are text (1 row), files of a tar that their row does "
        "not name (2 rows), media files beside the rows (1 file), 480 more fields"
    )


def test_many_values_are_looked_through_in_little_time():
    row = TEXT | {"links": [[{"url": "https://example.org/a"}] * 1000] * 1000, "ids": [7] * 1_000_000}
    source = opened([row], format="vlcpt")
    start = time.perf_counter()
    assert source.document(0).not_read == ("links", "ids")
    assert time.perf_counter() - start < 1


HONEST = [
    TEXT | {"image_id": 7, "img_width": 640, "image_height": 480, "video_title": "My trip.mp4"},
    TEXT | {"image_id": "000000391895", "image_caption": "A valve, see a.png", "image_count": 0},
    TEXT | {"url": "https://example.org/a.png", "source": "cc", "timestamp": "2024-01-01", "score": 0.3},
    {"text": "import os\n", "path": "src/a.py", "repo_name": "o/r", "license": ["mit"], "size": "12"},
    {"text": "def a(): pass", "max_stars_repo_path": "docs/logo.png", "content_sha": "a" * 64},
    {"text": "<html><img src='https://example.org/a.png'><picture><img></img></picture></html>"},
    {"text": "![a](https://example.org/a.png) [gone](gone.png) <img>gone.png</img>"},
    TEXT | {"image": None, "photos": [], "images": None, "picture": ""},
    TEXT | {"hash": "A" * 100, "key": "/9j/short"},
    TEXT | {"img_ext": ".jpg", "image_suffix": ".png", "video_codec": "mp4", "图片标题": "阀门.jpg"},
    TEXT | {"image": False, "video": 0, "image_embedding": [0.5] * 3000},
    TEXT | {"metadata": {"og:image": "https://example.org/a.jpg", "links": [{"img": "//example.org/b.png"}]}},
    # as a code corpus, a crawl and saved pages have them
    {
        "text": "img = open('a.png')\n# <img>gone.png</img>",
        "hexsha": "0f" * 20,
        "ext": "py",
        "max_stars_repo_path": "tools/images/thumb.py",
        "max_stars_count": 3.0,
        "alphanum_fraction": 0.7,
    },
    TEXT
    | {
        "url": "https://example.org/gallery/photo-1.jpg",
        "image_id": "a.b",
        "img_width": 640,
        "dump": "CC-MAIN-2024-10",
        "file_path": "s3://commoncrawl/crawl-data/x.warc.gz",
        "language_score": 0.9,
    },
    {
        "text": "<!doctype html><img src=logo.svg><img src='gone.jpg'><video src=\"gone.mp4\"></video>",
        "html_path": "pages/1.html",
        "has_images": True,
        "images_count": 2,
    },
]


@pytest.mark.parametrize("row", HONEST)
def test_an_honest_row_goes_on_and_its_other_fields_are_named(rows, row):
    (document,) = read_documents(rows(row), format="vlcpt")
    filled = {name for name, value in row.items() if value not in (None, [], "")}
    assert set(document.not_read) == filled - {"text"}


@pytest.mark.parametrize("image", [False, 0])
def test_a_number_under_the_name_of_media_is_no_caption(rows, image):
    (document,) = read_documents(rows(TEXT | {"image": image}))
    assert document.not_read == ("image",)


def test_an_array_for_an_image_is_said_to_be_none():
    source = opened([TEXT | {"image": numpy.zeros((3, 3, 3))}])
    with pytest.raises(DocumentError, match="expected a list of media references, found ndarray"):
        source.document(0)


def test_a_count_under_the_name_of_media_is_an_error_that_says_what_helps(rows):
    with pytest.raises(DocumentError, match="If it counts them, call the field otherwise"):
        list(read_documents(rows(TEXT | {"images": 3})))


def test_a_field_that_is_ignored_chooses_no_format(rows):
    """Web pages have the address of a picture that stands for them (trafilatura's ``image``)."""
    page = TEXT | {"image": "https://example.org/a.jpg", "url": "https://example.org/"}
    (document,) = read_documents(rows(page), ignore_fields=["image"])
    assert document.images == ()
    assert document.not_read == ("url",)


def test_a_row_with_a_medium_may_have_another_field_with_its_name(rows):
    row = {"text": "<image>a", "images": ["a.png"], "image_path": "a.png"}
    (document,) = read_documents(rows(row))
    assert document.not_read == ("image_path",)


def test_img_around_the_name_of_a_file_that_is_there_is_an_error(rows):
    with pytest.raises(DocumentError, match=r"'<img>a\.png</img>' names a file .*<image>.*format: text"):
        list(read_documents(rows({"text": "Picture 1: <img>a.png</img> A valve."})))
    turn = {"from": "human", "value": "Picture 1: <img>a.png</img>"}
    with pytest.raises(DocumentError, match="'images' or 'videos' and put <image> or <video> into a turn"):
        list(read_documents(rows({"conversations": [turn]})))


IN_TEXTS = [
    ({"text": "a <img>a.png</img>"}, "text", True),
    ({"text": "<trainable_text>a</trainable_text> <img>a.png</img>"}, "text", False),
    ({"conversations": [{"from": "gpt", "value": "<img>a.png</img>"}]}, "conversations", False),
    ({"messages": [{"role": "assistant", "content": "<img>a.png</img>"}]}, "messages", False),
    ({"instruction": "a", "output": "<img>a.png</img>"}, "instruction", False),
    ({"segments": [{"type": "text", "text": "<img>a.png</img>", "trainable": True}]}, "segments", False),
]


@pytest.mark.parametrize(("row", "field", "may_be_plain"), IN_TEXTS)
def test_the_way_out_of_img_is_one_that_the_rows_can_take(rows, row, field, may_be_plain):
    path = rows(row)
    with pytest.raises(DocumentError, match=r'otherwise set ignore_fields: \["<img>"\] for the') as caught:
        list(read_documents(path))
    assert caught.value.field == field
    assert ("format: text" in caught.value.reason) == may_be_plain
    (document,) = read_documents(path, ignore_fields=["<img>"])
    assert document.not_read == ()
    assert any(one.trainable for one in document.segments)


def test_format_text_takes_rows_with_anything_in_them_and_says_nothing(rows):
    row = {"text": "<image> <img>a.png</img> ![a](a.png)", "image_path": "a.png", "source": "web"}
    (document,) = read_documents(rows(row), format="text")
    assert document.not_read == ()
    assert document.segments[0].text == row["text"]


def planned(path, **options):
    dataset = CPTDataset(
        {"path": path, "name": "train", **options}, load_processor(base_path()), max_length=64
    )
    return dataset.ledger.sources["train"].as_json().get("not_read", {})


def test_the_ledger_counts_the_rows_of_each_field_that_is_not_read(rows):
    path = rows(*[TEXT | {"source": "web"}] * 700, *[TEXT | {"url": "http://example.org"}] * 3)
    assert planned(path) == {"source": 700, "url": 3, "media files beside the rows": 1}
    assert planned(path, ignore_fields=["source"]) == {"url": 3, "media files beside the rows": 1}
    assert planned(path, format="text") == {}


@pytest.mark.parametrize(
    "link",
    [
        "![](<my file.png>)",
        "![](my%20file.png)",
        "![](b_(1).png)[b](a.txt)",
        '![](a.png "A valve")',
        "![valve][v]\n\n[v]: a.png",
        "![[a.png|200]]",
        "<IMG SRC='a.png'>",
        '<img src="a.png?v=1#top">',
        '<source srcset="gone.webp 1x, a.png 2x">',
        '<video poster="a.png"></video>',
        '<img src="my file.png">',
    ],
)
def test_a_link_to_a_file_that_is_there_is_named_however_it_is_written(rows, tmp_path, link):
    for name in ("my file.png", "b_(1).png", "a.txt"):
        (tmp_path / name).write_bytes(PNG)
    (document,) = read_documents(rows({"text": f"See {link} there."}), format="vlcpt")
    assert document.not_read == (LINKS,)


@pytest.mark.parametrize(
    "text", ["[[File:a.png|thumb]]", "[a](a.txt)", "![](gone.png)", "](" * 50_000 + ".png"]
)
def test_what_is_no_link_to_a_medium_that_is_there_is_not_named(rows, tmp_path, text):
    (tmp_path / "a.txt").write_text("a")
    (document,) = read_documents(rows({"text": text}), format="vlcpt")
    assert document.not_read == ()


def test_media_files_in_folders_below_are_counted(rows, tmp_path):
    path = rows(TEXT)
    for name in ("images/a.png", "images/train/000/0.jpg", "videos/0.m4v"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(PNG)
    assert planned(path) == {"media files beside the rows": 4}


@pytest.mark.parametrize(
    ("other", "beside"),
    [
        ({"text": "<image>a", "images": ["a.png"]}, {}),
        (CHAT | {"image": "a.png"}, {}),
        (TEXT, {"media files beside the rows": 1}),
        ({"images": []}, {"media files beside the rows": 1}),
    ],
)
def test_nothing_is_said_of_media_files_that_are_those_of_another_file(rows, tmp_path, other, beside):
    (tmp_path / "other.jsonl").write_text(f"{json.dumps(TEXT)}\n{json.dumps(other)}\n{{cut")
    assert planned(rows(TEXT)) == beside


@pytest.mark.parametrize("storage", ["jsonl", "parquet", "saved", "memory"])
def test_rows_in_which_a_field_is_empty_are_not_counted_whatever_the_storage(tmp_path, storage):
    found = [
        TEXT
        | {"source": "web" if n % 4 == 0 else None, "note": "x" * (n % 2), "tags": ["a"] * (n % 3), "n": n}
        for n in range(30)
    ]
    path = tmp_path / f"train.{storage}"
    if storage == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
    elif storage == "parquet":
        pq.write_table(pa.Table.from_pylist(found), path)
    elif storage == "saved":
        datasets.Dataset.from_list(found).save_to_disk(path)
    assert planned(found if storage == "memory" else str(path)) == {
        "n": 30,
        "tags": 20,
        "note": 15,
        "source": 8,
    }


def test_links_to_files_that_are_there_are_counted(rows):
    found = [{"text": "![a](a.png)"}, {"text": '<p><img src="a.png" alt="a">'}, {"text": "[b](b.png)"}]
    assert planned(rows(*found))["files that its Markdown or HTML links to"] == 2


def test_nothing_is_said_of_media_files_beside_rows_that_have_media(rows):
    assert planned(rows({"text": "<image>a", "images": ["a.png"]}, TEXT)) == {}


def test_columns_that_hold_no_media_are_named_without_being_read(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([TEXT | {"source": "web", "tokens": [1, 2]}] * 5), path)
    source = opened(path)
    assert source.document(3).not_read == ("source", "tokens")
    assert source.rows.row(3) == TEXT


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("cover", None),
        ("cover", ""),
        ("cover", "None"),
        ("cover", "N/A"),
        ("file", "a.txt"),
        ("src", "b.html"),
    ],
)
def test_a_medium_in_a_late_row_of_a_column_is_an_error(rows, tmp_path, name, before):
    rows()
    path = tmp_path / "a.parquet"
    found = [TEXT | {name: before}] * 30 + [TEXT | {name: "a.png"}]
    pq.write_table(pa.Table.from_pylist(found, pa.schema([("text", pa.string()), (name, pa.string())])), path)
    source = opened(path)
    with pytest.raises(DocumentError, match=f"{name}: it holds the name of a file that is there"):
        source.document(30)


@pytest.mark.parametrize("name", ["label", "kto_tag"])
@pytest.mark.parametrize("way", ["jsonl", "parquet"])
def test_a_conversation_that_is_marked_as_bad_is_an_error_unless_the_field_is_ignored(
    tmp_path, rows, way, name
):
    row = CHAT | {name: False}
    path = rows(row)
    if way == "parquet":
        path = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist([row]), path)
    with pytest.raises(DocumentError, match=rf"{name}: false marks a bad answer .*ignore_fields: \[{name}\]"):
        list(read_documents(path, targets="all"))
    (document,) = read_documents(path, ignore_fields=[name])
    assert document.not_read == ()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_with_skip_a_conversation_that_is_marked_as_bad_is_a_counted_row(tmp_path, suffix):
    chats = [CHAT | {"label": number > 1} for number in range(5)]
    path = tmp_path / f"train{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in chats))
    else:
        pq.write_table(pa.Table.from_pylist(chats), path)
    dataset = CPTDataset(
        {"path": str(path), "targets": "all"},
        load_processor(base_path()),
        **{"max_length": 64, "on_bad_data": "skip", "max_bad_fraction": 1.0},
    )
    account = dataset.ledger.sources["train"]
    assert account.documents["used"] == 3
    assert dict(account.dropped_documents) == {"row": 2}
    assert [one.line for one in dataset.ledger.dropped] == [1, 2]
    assert account.not_read == {"label": 3}


def test_a_pair_of_answers_is_an_error_and_any_other_label_is_named(rows):
    with pytest.raises(DocumentError, match="rejected: the row is a pair"):
        list(read_documents(rows(CHAT | {"rejected": {"from": "gpt", "value": "No."}})))
    (document,) = read_documents(rows(CHAT | {"label": "physics"}))
    assert document.not_read == ("label",)


@pytest.mark.parametrize(
    ("row", "helps"),
    [
        ({"text": 7}, False),
        ({"text": "<trainable_text></trainable_text>a"}, True),
        ({"conversations": [{"from": "human", "value": "a"}]}, False),
        ({"messages": [{"role": "assistant", "content": "a", "loss": False}]}, False),
        ({"segments": [{"type": "text", "text": "a", "trainable": False}]}, False),
    ],
)
def test_marking_targets_is_advised_only_where_that_helps(row, helps):
    with pytest.raises(BadDataError, match="none of 1 documents can be trained on") as caught:
        CPTDataset(
            [row], load_processor(base_path()), max_length=64, on_bad_data="skip", max_bad_fraction=1.0
        )
    assert ("Mark targets with <trainable_text>" in str(caught.value)) == helps
    advice = {
        "text": "Mark targets with" if helps else "expected a string, found int",
        "conversations": "check roles and loss switches, or set targets: all.",
        "messages": "check roles and loss switches, or set targets: all.",
        "segments": 'Set "trainable": true in the text segments',
    }
    assert advice[next(iter(row))] in str(caught.value)


def test_where_every_row_is_refused_nothing_is_said_of_files_beside_them(rows):
    """Each row's own message says what was lost, and what to do."""
    path = rows({"text": "one", "image_path": "a.png"})

    with pytest.raises(BadDataError, match=r"image_path: it holds the name 'a\.png'") as error:
        CPTDataset(
            [str(path)],
            load_processor(base_path()),
            max_length=64,
            on_bad_data="skip",
            max_bad_fraction=1.0,
        )

    account = error.value.ledger.sources["train"]
    assert account.dropped_documents.total() == 1
    assert account.not_read == {}


@pytest.mark.parametrize("image", [False, 0, None])
def test_a_field_that_says_that_there_is_no_image_is_not_advised_as_one(rows, image):
    with pytest.raises(DocumentError, match="<image>") as caught:
        list(read_documents(rows({"text": "<image>A valve.", "image": image})))
    assert "The row has one" not in str(caught.value)
    assert "set format: text" in str(caught.value)
