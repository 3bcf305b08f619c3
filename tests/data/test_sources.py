"""A file and its schema become documents, each with its place; what cannot be opened says why."""

import json
import logging

import datasets
import pytest

from tests.support import opened, png
from vlcpt import CPTDataset, DataConfig, Document, DocumentError, Image, Source, Text, read_documents
from vlcpt.data.sources import open_sources


def test_documents_have_their_file_line_id_and_media_root(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a", "id": "x"}\n\n{"text": "<image>b", "images": ["b.png"], "id": 7}\n')
    first, second = read_documents(path)
    assert (first.source, first.id, first.name) == (Source(str(path), 1), "x", "x")
    assert (second.source, second.id) == (Source(str(path), 3), "7")
    assert second.segments == (Image("b.png"), Text("b", trainable=True))
    assert second.media_root == str(tmp_path)
    (only,) = list(read_documents(path, media_root="/data"))[1:]
    assert only.media_root == "/data"


def test_a_document_without_id_is_called_by_its_file_and_line(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('\n{"text": "a"}')
    (document,) = read_documents(path)
    assert document.id is None
    assert document.name == f"{path}:2"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a<trainable_text>"}', "text, character 1: <trainable_text> is not closed"),
        ('{"text": 7}', "text: expected a string, found int."),
        ('{"tekst": "a"}', "text: the field is missing; did you mean 'text' by 'tekst'? Fields found: "),
        ('{"text": "<image>", "images": "a.png"}', "images: expected a list of media references, found str."),
        ('{"text": "<image>", "images": [null]}', "images[0]: a media reference must be a path"),
        ('{"text": "<video>", "videos": [{"path": "a", "fsp": 1}]}', "videos[0]: a media reference has no"),
        ('{"text": "a", "id": ["x"]}', "id: expected a string, found list."),
        ('{"text": "a", "id": true}', "id: expected a string, found bool."),
        ('{"text": "\\ud83d"}', "not JSON"),
        ('{"text": "a"', "not JSON"),
        ("[]", "expected an object in {}, found list."),
    ],
)  # fmt: skip
def test_an_error_names_file_line_and_field(tmp_path, line, message):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    found = read_documents(path)
    assert next(found).name == f"{path}:1"
    with pytest.raises(DocumentError) as caught:
        next(found)
    assert str(caught.value).startswith(f"{path}:3: {message}")


@pytest.mark.parametrize("row", ['{"id": 7, "text": 7}', '{"id": 7, "text": "<image>"}', '{"id": 7}'])
def test_an_error_names_the_rows_id(tmp_path, row):
    path = tmp_path / "train.jsonl"
    path.write_text(row)
    with pytest.raises(DocumentError) as caught:
        next(read_documents(path, format="vlcpt"))
    assert str(caught.value).startswith(f"{path}:1: id 7: text")
    assert (caught.value.source, caught.value.source.id) == (Source(str(path), 1), "7")


def test_an_id_of_many_lines_stays_on_one_in_a_message():
    error = DocumentError("bad", source=Source("a.jsonl", 3, "one\ntwo " + "x" * 1000))
    assert str(error) == f"a.jsonl:3: id one two {'x' * 92}: bad"


def test_a_json_list_is_numbered_by_its_rows(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=2))
    assert [document.name for document in read_documents(path)] == [f"{path}:1", f"{path}:2"]


def test_a_folder_of_text_files_is_a_document_each(tmp_path):
    (tmp_path / "a.txt").write_text("<image> is plain here\n")
    (tmp_path / "b.md").write_text("# b")
    first, second = read_documents(tmp_path)
    assert first.segments == (Text("<image> is plain here\n", trainable=True),)
    assert second.source == Source(str(tmp_path / "b.md"), 1)


def test_the_format_is_told_by_the_fields_of_the_first_rows(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text(
        'not json\n{"other": 1}\n{"segments": [{"type": "text", "text": "a", "trainable": false}]}\n'
    )
    with caplog.at_level(logging.INFO):
        (source,) = open_sources(path, "train")
    assert source.document(2).segments == (Text("a"),)
    assert "format segments was found, because the first rows have segments, e.g. of a. Set" in caplog.text
    with pytest.raises(DocumentError, match=r"a\.jsonl:1: not JSON"):
        source.document(0)
    with pytest.raises(
        DocumentError, match=r"a\.jsonl:2: segments: the field is missing\. Fields found: 'other'"
    ):
        source.document(1)


def test_rows_that_fit_no_format_are_an_error_that_names_their_fields(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"instruction": "a", "answer": "b"}\n')
    with pytest.raises(DocumentError) as caught:
        opened(path)
    assert str(caught.value).startswith(
        f"{path}:2: no format fits the fields 'instruction', 'answer'. Known formats: vlcpt: text"
    )


def test_a_format_that_is_given_is_used():
    source = opened([{"text": "<trainable_text>a"}], format="text")
    assert source.document(0).segments == (Text("<trainable_text>a", trainable=True),)
    with pytest.raises(
        DocumentError, match=r"unknown format 'alpacca'\. Known: auto, vlcpt, segments, sharegpt"
    ):
        opened([{"text": "a"}], format="alpacca")


@pytest.mark.parametrize("untagged", ["train", "mask"])
def test_untagged_reaches_the_markup(untagged):
    document = opened([{"text": "a"}], untagged=untagged).document(0)
    assert document.segments == (Text("a", trainable=untagged == "train"),)
    assert not document.tagged


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "missing.jsonl",
            None,
            "no such file or folder. Known: .jsonl, .json, .csv",
        ),
        ("a.xlsx", "x", "cannot read files ending in '.xlsx'. Known: .jsonl, .json, .csv"),
        ("a", "x", "cannot read files ending in 'nothing'."),
        ("a.json", '{\n"text": "a"}', "expected a list of rows, found dict."),
        ("a.json", "[", "not JSON: "),
        ("a.jsonl", "", "there is no row in it."),
        ("a.json", "[]", "there is no row in it."),
    ],
)
def test_a_file_that_cannot_be_opened_says_why(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DocumentError) as caught:
        opened(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: {message}")
    assert caught.value.kind == "source" or "JSON" in message


def test_an_address_is_not_opened():
    with pytest.raises(DocumentError, match=r"^https://example\.org/train\.jsonl: an address is not opened"):
        opened("https://example.org/train.jsonl")


def test_documents_in_memory_keep_what_they_know_and_get_what_they_do_not():
    mine = Document((Text("a"),), id="x", source=Source("b.jsonl", 4), media_root="/mine")
    bare = Document((Text("a"),))
    source = opened([mine, bare], name="list", media_root="/given")
    assert (source.document(0).source, source.document(0).media_root) == (Source("b.jsonl", 4), "/mine")
    assert (source.document(1).source, source.document(1).media_root) == (Source("list", 2), "/given")
    assert source.document(0).id == "x"
    assert source.document(0).source.id == "x"


def test_rows_in_memory_may_hold_bytes():
    source = opened([{"text": "<image>", "images": [{"bytes": png(0)}]}])
    assert source.document(0).images == (Image(data=png(0)),)
    assert source.media_root is None


def test_an_empty_data_set_among_others_is_an_error():
    full, empty = (datasets.Dataset.from_list(rows) for rows in ([{"text": "a"}], []))
    assert open_sources(empty, "train") == []  # as an empty list is

    with pytest.raises(DocumentError, match=r"there is no row in it\."):
        open_sources([full, empty], "train")


def test_a_media_root_may_be_a_path_wherever_a_source_is_given_in_python(tmp_path, tiny_processor):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "<image>a", "images": ["a.png"]}) + "\n")
    (tmp_path / "media").mkdir()
    (tmp_path / "media/a.png").write_bytes(png(1))
    given = {"path": str(rows), "media_root": tmp_path / "media"}
    for sources in (given, DataConfig(given).train_data):
        dataset = CPTDataset(sources, tiny_processor, max_length=64, cache_dir=tmp_path / "plan")
        assert dataset.ledger.total.documents["used"] == 1
    assert next(read_documents(rows, media_root=tmp_path / "media")).media_root == str(tmp_path / "media")
