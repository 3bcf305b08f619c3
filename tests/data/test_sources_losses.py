"""Odd and damaged files: no row of them is lost without a word, and none is waited for."""

import os
import tarfile
from io import BytesIO
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support import opened
from vlcpt import CPTDataset, DocumentError

ROW = b'{"text": "one"}\n'


def message(path: Path, number: int | None = None) -> str:
    """What opening a source, or reading one of its rows, says."""
    with pytest.raises(DocumentError) as caught:
        opened(path) if number is None else opened(path).document(number)
    return str(caught.value)


def tar(path: Path, *members: tuple[str, bytes]) -> bytes:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, BytesIO(data))
    return path.read_bytes()


# A key or a column that stands twice: one of the values would be gone


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "a", "text": "b"}',
        b'{"text" : "a", "text": "b"}',
        b'{"text":"a","images":[{"path":"a","path":"b"}]}',
        b'{"text": "x\\": y", "a": {"text": 1, "text": 2}}',
    ],
)
def test_a_key_that_stands_twice_is_an_error_of_its_row(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(ROW + line + b"\n" + ROW)
    told = message(tmp_path / "a.jsonl", 1)
    assert told.startswith(f"{tmp_path / 'a.jsonl'}:2: the key '")
    assert told.endswith("stands twice in one object. Rename or remove one.")

    (tmp_path / "a.json").write_bytes(b"[" + ROW + b"," + line + b"," + ROW + b"]")
    told = message(tmp_path / "a.json", 1)
    assert told.startswith(f"{tmp_path / 'a.json'}:2: the key '")
    assert opened(tmp_path / "a.json").document(2).segments[0].text == "one"


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "say \\"text\\": \\"text\\":"}',
        b'{"text" : "a", "b": {"text": 1}, "c": [{"text": 1}, {"text": 2}]}',
    ],
)
def test_keys_of_different_objects_and_quotes_in_texts_are_none(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(line)
    assert opened(tmp_path / "a.jsonl").document(0).segments


def test_a_column_that_stands_twice_is_an_error(tmp_path):
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert "two columns are named 'text'" in message(tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    assert "two columns are named 'text'" in message(tmp_path / "a.arrow")


def test_two_texts_of_one_key_in_a_tar_are_an_error_of_its_row(tmp_path):
    tar(
        tmp_path / "a.tar",
        ("1.txt", b"A"),
        ("1.txt", b"B"),
        ("1.png", b"x"),
        ("2.txt", b"C"),
        ("2.png", b"y"),
    )
    assert "a.tar:1: two members are named '1.txt'" in message(tmp_path / "a.tar", 0)
    tar(tmp_path / "a.tar", ("1.txt", b"A"), ("1.en.txt", b"B"), ("1.png", b"x"))
    assert "a.tar:1: it has two texts, the second is '1.en.txt'" in message(tmp_path / "a.tar", 0)


# Files that were cut, but read like whole ones


def test_a_tar_cut_between_two_members_is_an_error(tmp_path):
    members = [(f"{number}.{kind}", b"x" * 100) for number in range(3) for kind in ("png", "txt")]
    whole = tar(tmp_path / "a.tar", *members)
    assert len(opened(tmp_path / "a.tar")) == 3
    for size in (2 * 1024, 4 * 1024, 4 * 1024 + 300):  # after a member's padding, or inside a header
        (tmp_path / "a.tar").write_bytes(whole[:size])
        assert "is neither a member nor the end mark. It is damaged or cut short" in message(
            tmp_path / "a.tar"
        )


def test_a_tar_with_a_damaged_header_is_an_error(tmp_path):
    whole = bytearray(
        tar(tmp_path / "a.tar", ("1.txt", b"A"), ("1.png", b"x"), ("2.txt", b"C"), ("2.png", b"y"))
    )
    whole[2 * 1024 + 5] ^= 1
    (tmp_path / "a.tar").write_bytes(whole)
    assert "at byte 2,048 is neither a member nor the end mark" in message(tmp_path / "a.tar")


def test_archives_put_together_by_cat_are_an_error(tmp_path):
    one = tar(tmp_path / "a.tar", ("1.txt", b"A"), ("1.png", b"x"))
    (tmp_path / "a.tar").write_bytes(one + one)
    assert "more follows its end mark, as where archives were put together by cat" in message(
        tmp_path / "a.tar"
    )


def test_an_arrow_stream_cut_between_two_batches_is_an_error(tmp_path):
    batch = pa.record_batch({"text": ["a"]})
    ends = []
    file = pa.OSFile(str(tmp_path / "a.arrow"), "wb")
    with file, pa.ipc.new_stream(file, batch.schema) as writer:
        for _ in range(3):
            writer.write_batch(batch)
            ends.append(file.tell())
    assert len(opened(tmp_path / "a.arrow")) == 3
    whole = (tmp_path / "a.arrow").read_bytes()
    for end in ends:
        (tmp_path / "a.arrow").write_bytes(whole[:end])
        assert "the stream has no end mark: it is cut short" in message(tmp_path / "a.arrow")


def test_a_saved_data_set_cut_between_two_batches_is_an_error(tmp_path):
    datasets.Dataset.from_list([{"text": str(number)} for number in range(2500)]).save_to_disk(
        tmp_path / "saved"
    )
    (file,) = (tmp_path / "saved").glob("*.arrow")
    assert len(opened(tmp_path / "saved")) == 2500
    with pa.memory_map(str(file)) as mapped:
        reader = pa.ipc.open_stream(mapped)
        reader.read_next_batch()
        end = mapped.tell()
    file.write_bytes(file.read_bytes()[:end])
    assert len(datasets.load_from_disk(tmp_path / "saved")) == 1000  # or the next line proves nothing
    assert f"{file.name}: the stream has no end mark: it is cut short" in message(tmp_path / "saved")


# What is no file


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.txt", "a.parquet", "a.arrow", "a.tar", "a.jsonl.gz"]
)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert message(tmp_path / name).endswith("it is a pipe, socket or device. Put the data there as a file.")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / name)
    if name != "a.json":
        assert "it is a pipe, socket or device" in message(tmp_path / "folder")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_broken_link_among_shards_is_an_error(tmp_path, name):
    (tmp_path / name).symlink_to(tmp_path / "gone")
    (tmp_path / "b.jsonl").write_bytes(ROW)
    if name == "a.txt":
        (tmp_path / "b.jsonl").rename(tmp_path / "b.txt")
    assert "it is a link to a file that is not there" in message(tmp_path)


def test_hidden_files_and_folders_with_a_files_name_are_no_texts(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / "folder.txt").mkdir()
    for name in (".git/a.txt", ".hidden.txt", "b.txt", "folder.txt/c.md"):
        (tmp_path / name).write_text(name)
    source = opened(tmp_path)
    assert [source.document(number).segments[0].text for number in range(len(source))] == [
        "b.txt",
        "folder.txt/c.md",
    ]


def test_a_folder_of_json_files_says_that_none_is_read(tmp_path):
    (tmp_path / "a.json").write_bytes(b"[" + ROW + b"]")
    assert "of .json files in a folder none is read. Give the path of one file." in message(tmp_path)


def test_a_file_that_goes_away_is_an_error_of_its_row(tmp_path, tiny_processor):
    (tmp_path / "a.jsonl").write_bytes(ROW * 3)
    dataset = CPTDataset(tmp_path / "a.jsonl", tiny_processor, max_length=64, on_bad_data="skip")
    (tmp_path / "a.jsonl").unlink()
    failed = dataset[0]
    assert len(failed) == 3
    assert "the file cannot be read: No such file or directory" in failed[0].message


# Shapes that are odd and whole


def test_a_parquet_file_without_row_groups_has_no_row(tmp_path):
    schema = pa.schema([("text", pa.string())])
    pq.ParquetWriter(tmp_path / "a.parquet", schema).close()
    assert message(tmp_path / "a.parquet").endswith("there is no row in it.")


def test_dictionary_columns_are_read_also_where_the_dictionary_changes(tmp_path):
    tables = [
        pa.table({"text": pa.array(texts).dictionary_encode()}) for texts in (["a", "b", "a"], ["c", "b"])
    ]
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file,
        pa.ipc.new_stream(file, tables[0].schema) as writer,
    ):
        for table in tables:
            writer.write_table(table)
    source = opened(tmp_path / "a.arrow")
    assert [source.document(number).segments[0].text for number in range(5)] == ["a", "b", "a", "c", "b"]


def test_members_of_one_name_in_two_folders_are_two_rows(tmp_path):
    tar(tmp_path / "a.tar", *((f"{f}/1.{kind}", f.encode()) for f in ("x", "y") for kind in ("txt", "png")))
    source = opened(tmp_path / "a.tar")
    assert [source.document(number).id for number in range(len(source))] == ["x/1", "y/1"]
