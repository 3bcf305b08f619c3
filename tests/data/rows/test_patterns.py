"""Patterns stand for the files that are there, each once, sorted; what is missing is named."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support import opened, png
from vlcpt import CPTDataset, DocumentError, read_documents
from vlcpt.data.rows.open import default_name
from vlcpt.data.rows.patterns import files_of


@pytest.fixture
def files(tmp_path):
    """Writes JSONL files of one row each, whose text is their name."""

    def write(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"text": name}) + "\n")
        return tmp_path

    return write


def texts(pattern, **options):
    return [document.segments[0].text for document in read_documents(pattern, **options)]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("s/*.jsonl", ["s/00.jsonl", "s/01.jsonl", "s/10.jsonl"]),
        ("s/{00..01}.jsonl", ["s/00.jsonl", "s/01.jsonl"]),
        ("s/{01..00}.jsonl", ["s/00.jsonl", "s/01.jsonl"]),
        ("s/{10,00}.jsonl", ["s/00.jsonl", "s/10.jsonl"]),
        ("s/0?.jsonl", ["s/00.jsonl", "s/01.jsonl"]),
        ("s/[01]0.jsonl", ["s/00.jsonl", "s/10.jsonl"]),
        ("{s,t/u}/0{0..0}.jsonl", ["s/00.jsonl", "t/u/00.jsonl"]),
        ("**/00.jsonl", ["s/00.jsonl", "t/u/00.jsonl"]),
        ("{s/*,s/00}.jsonl", ["s/00.jsonl", "s/01.jsonl", "s/10.jsonl"]),
        ("s/{0{0,1},10}.jsonl", ["s/00.jsonl", "s/01.jsonl", "s/10.jsonl"]),
    ],
)
def test_a_pattern_is_its_files_in_order_and_each_once(files, pattern, found):
    folder = files("s/10.jsonl", "s/00.jsonl", "s/01.jsonl", "t/u/00.jsonl", "s/.hidden.jsonl")
    assert texts(f"{folder}/{pattern}") == found


def test_a_relative_pattern_starts_at_the_current_folder(files, monkeypatch):
    monkeypatch.chdir(files("a-0.jsonl", "a-1.jsonl"))
    assert texts("a-{0..1}.jsonl") == texts("a-*.jsonl") == ["a-0.jsonl", "a-1.jsonl"]


def test_numbers_have_the_width_that_they_are_written_with(files):
    folder = files(*(f"{number:05}.jsonl" for number in range(8, 12)), "8.jsonl")
    assert len(texts(f"{folder}/{{00008..00011}}.jsonl")) == 4
    with pytest.raises(DocumentError, match=r"/9\.jsonl: no such file or folder, 3 of the 4"):
        texts(f"{folder}/{{8..11}}.jsonl")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("t/*.jsonl", r"t/\*\.jsonl: nothing fits this pattern"),
        ("{00..02}.jsonl", r"02\.jsonl: no such file or folder, 1 of the 3 that the braces name"),
        ("{00,x*}.jsonl", r"x\*\.jsonl: nothing fits this pattern"),
        ("{0..9999999}.jsonl", r"stand for more than 1,000,000 names"),
        ("{0..999}{0..9999}.jsonl", r"stand for more than 1,000,000 names"),
    ],
)
def test_what_a_pattern_does_not_find_is_named(files, pattern, message):
    with pytest.raises(DocumentError, match=message):
        texts(f"{files('00.jsonl', '01.jsonl')}/{pattern}")


@pytest.mark.parametrize("name", ["a[1].jsonl", "a{1,2}.jsonl", "d[1]/a{0..1}/b.jsonl", "a*.jsonl"])
def test_a_file_that_has_such_a_name_wins(files, name):
    folder = files(name, "a1.jsonl", "d1/a0/b.jsonl", "d1/a1/b.jsonl", "ab.jsonl")
    assert texts(f"{folder}/{name}") == [name]


def test_a_folder_with_brackets_in_its_name_is_no_pattern_before_one(files):
    folder = files("d[1]/0.jsonl", "d[1]/1.jsonl", "d1/2.jsonl")
    assert texts(f"{folder}/d[1]/*.jsonl") == ["d[1]/0.jsonl", "d[1]/1.jsonl"]


def test_media_start_at_the_folder_of_each_file(tmp_path, tiny_processor):
    for number, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(png(number))
        row = {"text": "<image>A dish.", "images": ["x.png"]}
        (tmp_path / name / "train.jsonl").write_text(json.dumps(row))
    pattern = f"{tmp_path}/*/train.jsonl"
    documents = list(read_documents(pattern))
    assert [document.media_root for document in documents] == [f"{tmp_path}/a", f"{tmp_path}/b"]
    assert len(CPTDataset(pattern, tiny_processor, max_length=64, packing=False)) == 2
    assert {one.media_root for one in read_documents(pattern, media_root=tmp_path)} == {str(tmp_path)}


def test_a_row_that_loses_its_picture_is_looked_for_in_its_own_folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text('{"text": "A.", "cover": "x.png"}')
    (tmp_path / "b" / "x.png").write_bytes(png(0))
    source = opened(f"{tmp_path}/*/train.jsonl")
    assert source.document(0).not_read == ("cover",)
    with pytest.raises(DocumentError, match="it holds the name of a file that is there"):
        source.document(1)


def test_folders_that_fit_are_read_as_folders(tmp_path):
    for shard in ("00000", "00001"):
        (tmp_path / shard).mkdir()
        (tmp_path / shard / "0.jpg").write_bytes(png(0))
        (tmp_path / shard / "0.txt").write_text(shard)
        pq.write_table(pa.Table.from_pylist([{"caption": "x", "url": "y"}]), tmp_path / f"{shard}.parquet")
        (tmp_path / f"{shard}_stats.json").write_text("{}")
    source = opened(f"{tmp_path}/*")
    assert [source.document(n).images[0].path for n in range(2)] == ["0.jpg", "0.jpg"]
    assert source.document(1).media_root == f"{tmp_path}/00001"
    assert source.left_out() == {".parquet": 2, ".json": 2}
    (tmp_path / "other.jsonl").write_text('{"text": "a"}')
    with pytest.raises(DocumentError, match=r"2 folders, such as 00000, and 1 files, such as other\.jsonl"):
        opened(f"{tmp_path}/*")


def test_pairs_that_fit_are_pairs(tmp_path):
    (tmp_path / "0.jpg").write_bytes(png(0))
    (tmp_path / "0.txt").write_text("A dish.")
    assert opened(f"{tmp_path}/*").document(0).images[0].path == "0.jpg"
    assert opened(f"{tmp_path}/*.txt").left_out() == {"media files beside the rows": 1}


def test_files_of_several_kinds_or_of_none_are_an_error(files):
    folder = files("a.jsonl", "b.txt", "c.pdf")
    with pytest.raises(DocumentError, match=r"several kinds: \.jsonl, \.txt"):
        texts(f"{folder}/*")
    with pytest.raises(DocumentError, match=r"none of 1 files is of a kind that is read\. Known: \.jsonl"):
        texts(f"{folder}/*.pdf")


def test_json_files_that_are_named_by_a_pattern_are_read(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.json").write_text(json.dumps([{"text": str(number)}]))
    assert texts(f"{tmp_path}/*.json") == ["0", "1"]


def test_a_split_of_a_pattern_is_an_error(files):
    with pytest.raises(DocumentError, match="split 'train' does not apply to a pattern"):
        opened(f"{files('a.jsonl')}/*.jsonl", split="train")


def test_the_same_files_are_the_same_state_and_another_file_is_another(files):
    folder = files("a.jsonl", "b.jsonl")
    pattern = f"{folder}/*.jsonl"
    before = opened(pattern).rows.state()
    assert opened(pattern).rows.state() == before
    files("c.jsonl")
    assert opened(pattern).rows.state() != before
    assert opened(f"{folder}/{{a,b}}.jsonl").rows.state() == before


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("shards/*.tar", "shards"),
        ("shards/**/*.jsonl.gz", "shards"),
        ("data/train-{00000..00099}.parquet", "train"),
        ("data/a[1].jsonl", "a[1]"),
        ("*.jsonl", "*"),
    ],
)
def test_a_source_is_called_by_what_its_pattern_has_of_a_name(pattern, name):
    assert default_name(pattern) == name


def test_files_of_gives_paths_as_they_were_written(files, monkeypatch):
    monkeypatch.chdir(files("s/0.jsonl"))
    assert [os.fspath(path) for path in files_of("./s/*.jsonl")] == ["s/0.jsonl"]
