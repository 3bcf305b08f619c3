"""Stored rows by number: byte offsets, line numbers, and media left as files."""

import datasets
import numpy as np
import orjson
import PIL.Image
import pytest

from tests.support import png
from vlcpt import CPTDataset, DocumentError
from vlcpt.data.rows import jsonl as rows_module
from vlcpt.data.rows.jsonl import JsonlRows, MemoryRows, TextRows

BOM = b"\xef\xbb\xbf"


def jsonl(tmp_path, content: bytes) -> JsonlRows:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    return JsonlRows(path)


def lines_of(rows) -> list[tuple[int, object]]:
    return [(rows.source(number).line, rows.row(number)) for number in range(len(rows))]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{"a": 1}\n{"a": 2}\n', [(1, {"a": 1}), (2, {"a": 2})]),
        (b'{"a": 1}\n{"a": 2}', [(1, {"a": 1}), (2, {"a": 2})]),  # no newline at the end
        (b'{"a": 1}\r\n{"a": 2}\r\n', [(1, {"a": 1}), (2, {"a": 2})]),
        (BOM + b'{"a": 1}\n{"a": 2}\n', [(1, {"a": 1}), (2, {"a": 2})]),
        (b'\n\n{"a": 1}\n\r\n \t \n{"a": 2}\n\n\n', [(3, {"a": 1}), (6, {"a": 2})]),  # blank lines count
        (BOM + b'\n{"a": 1}', [(2, {"a": 1})]),
        (BOM + b'\r\n{"a": 1}', [(2, {"a": 1})]),
        (b'{"a": 1}\n{}', [(1, {"a": 1}), (2, {})]),
        (b"{}", [(1, {})]),
        (b'{"a": "\\n"}\n{"a": "\xe4\xb8\xad"}\n', [(1, {"a": "\n"}), (2, {"a": "中"})]),
        ('{"a": "\u2028\x85"}\n'.encode(), [(1, {"a": "\u2028\x85"})]),  # lines end with \n alone
        (b"", []),
        (b"\n\r\n", []),
        (BOM, []),
    ],
)
def test_every_line_of_jsonl_is_found_with_its_number(tmp_path, content, found):
    assert lines_of(jsonl(tmp_path, content)) == found


def test_rows_are_read_in_any_order_and_over_the_edges_of_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "_CHUNK", 7)
    rows = jsonl(tmp_path, b"".join(orjson.dumps({"n": n, "pad": "x" * (n % 11)}) + b"\n" for n in range(50)))
    order = np.random.default_rng(0).permutation(50).tolist()
    assert [rows.row(number)["n"] for number in order] == order


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'a': 1}", "not JSON: "),
        (b'{"a": 1} {"a": 2}', "not JSON: "),
        (b'{"a": NaN}', "not JSON: "),
        (b"[1, 2]", r"expected an object in {}, found list\."),
        (b'"text"', r"expected an object in {}, found str\."),
        (b"null", r"expected an object in {}, found NoneType\."),
    ],
)
def test_a_line_that_is_no_object_is_an_error(tmp_path, line, message):
    rows = jsonl(tmp_path, b"{}\n" + line + b"\n{}\n")
    assert rows.row(2) == {}
    with pytest.raises(DocumentError, match=message) as caught:
        rows.row(1)
    assert caught.value.kind == "json"


def test_text_files_are_a_row_each_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.md").write_text("# one", encoding="utf-8")
    (tmp_path / "a.TXT").write_bytes(BOM + b"zwei\r\n")
    (tmp_path / "c.html").write_text("no")
    rows = TextRows(tmp_path)
    assert [str(rows.source(number)) for number in range(len(rows))] == [
        f"{tmp_path}/a.TXT:1",
        f"{tmp_path}/b/1.md:1",
    ]
    assert rows.row(0)["text"].rstrip() == "zwei"
    assert rows.row(1) == {"text": "# one"}


def test_a_text_file_that_is_not_utf_8_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(
        DocumentError, match=r"byte 3 is not UTF-8, it looks like ISO-8859-1: convert to UTF-8"
    ):
        TextRows(tmp_path / "a.txt").row(0)


def test_rows_in_memory_are_dicts_or_documents():
    rows = MemoryRows([{"text": "a"}, "a"], "mine")
    assert (len(rows), rows.row(0), str(rows.source(1))) == (2, {"text": "a"}, "mine:2")
    with pytest.raises(DocumentError, match=r"expected a dict or a Document, found str\."):
        rows.row(1)


@pytest.fixture
def with_images(tmp_path):
    """A data set whose features would decode images to pixels."""
    (tmp_path / "b.png").write_bytes(png(1))
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
            "cover": datasets.Image(),
            "parts": datasets.List({"image": datasets.Image(), "n": datasets.Value("int64")}),
        }
    )
    row = {
        "text": "<image><image>",
        "images": [{"bytes": png(0), "path": None}, {"bytes": None, "path": str(tmp_path / "b.png")}],
        "cover": {"bytes": png(2), "path": "c.png"},
        "parts": [{"image": {"bytes": png(3), "path": None}, "n": 1}],
    }
    return datasets.Dataset.from_list([row, row], features=features)


@pytest.mark.parametrize("kind", ["memory", "saved", "torch", "selected"])
def test_a_data_set_in_memory_hands_out_files_and_not_pixels(with_images, tmp_path, kind):
    dataset = with_images
    assert isinstance(dataset[0]["cover"], PIL.Image.Image)  # or the next lines prove nothing
    if kind == "saved":
        dataset.save_to_disk(tmp_path / "saved")
        dataset = datasets.load_from_disk(tmp_path / "saved")
    elif kind == "torch":
        dataset = dataset.with_format("torch")
    elif kind == "selected":
        dataset = dataset.select([1, 0])
    rows = MemoryRows(dataset, "mine")
    row = rows.row(1)
    assert len(rows) == 2
    assert row["text"] == "<image><image>"
    # Saving puts the files inside.
    second = (
        {"bytes": png(1), "path": "b.png"}
        if kind == "saved"
        else {"bytes": None, "path": f"{tmp_path}/b.png"}
    )
    assert row["images"] == [{"bytes": png(0), "path": None}, second]
    assert row["cover"] == {"bytes": png(2), "path": "c.png"}
    assert row["parts"] == [{"image": {"bytes": png(3), "path": None}, "n": 1}]
    assert dataset.features["cover"].decode  # the caller's own is as it was


def test_a_data_set_of_several_splits_is_refused(with_images):
    splits = datasets.DatasetDict({"train": with_images})
    with pytest.raises(DocumentError, match=r"found DatasetDict\. Choose a split, without streaming\."):
        MemoryRows(splits, "mine")
    with pytest.raises(DocumentError, match="found IterableDataset"):
        MemoryRows(with_images.to_iterable_dataset(), "mine")


@pytest.mark.parametrize("kind", ["DatasetDict", "IterableDataset", "IterableDatasetDict"])
def test_what_is_no_data_set_with_rows_by_number_says_so_to_a_run_in_python(tiny_processor, kind):
    data = datasets.Dataset.from_dict({"text": ["a"]})
    given = {
        "DatasetDict": datasets.DatasetDict(train=data),
        "IterableDataset": data.to_iterable_dataset(),
        "IterableDatasetDict": datasets.IterableDatasetDict(train=data.to_iterable_dataset()),
    }[kind]
    with pytest.raises(DocumentError, match=f"found {kind}. Choose a split, without streaming."):
        CPTDataset(given, tiny_processor, max_length=64)
