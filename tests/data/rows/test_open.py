"""Every storage gives the same rows, by number, in any order, at any number of workers."""

import gzip
import json
import os
import pickle
import shutil
import tarfile
from io import BytesIO
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.constants import HF_HUB_CACHE
from torch.utils.data import DataLoader

from tests.support import opened, png
from vlcpt import CPTDataset, DocumentError, Image, Text, encode_document, read_documents
from vlcpt.data.rows import tables
from vlcpt.data.rows.tables import MemoryRows

COUNT = 23
# Messages with an image in every third row: the others have the null that Arrow puts there.
ROWS = [
    {
        "id": str(number),
        "messages": [
            {"role": "user", "content": ("<image>" if number % 3 == 0 else "") + f"What is {number}?"},
            {"role": "assistant", "content": f"It is {number}."},
        ],
        "images": [{"bytes": png(number), "path": None}] if number % 3 == 0 else None,
        "unread": "x" * 10,
    }
    for number in range(COUNT)
]
# JSON has no bytes.
PLAIN = [{**row, "images": [f"{row['id']}.png"] if row["images"] else None} for row in ROWS]
TABLE = pa.Table.from_pylist(ROWS)


def zstd(data):
    file = pa.BufferOutputStream()
    with pa.CompressedOutputStream(file, "zstd") as stream:
        stream.write(data)
    return file.getvalue().to_pybytes()


def lines():
    return b"".join(json.dumps(row).encode() + b"\n" for row in PLAIN)


def write_arrow(path, new):
    with new(str(path), TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=4)


def write_tar(path, mode="w"):
    with tarfile.open(path, mode) as archive:
        for number, row in enumerate(ROWS):
            fields = {"messages": row["messages"], "id": row["id"]}
            files = [("json", json.dumps(fields).encode())]
            files += [("png", image["bytes"]) for image in row["images"] or ()]
            for suffix, data in files:
                member = tarfile.TarInfo(f"./shard/{number:04}.{suffix}")
                member.size = len(data)
                archive.addfile(member, BytesIO(data))


def quietly(save, path):
    datasets.disable_progress_bars()
    save(str(path))


STORAGES = {
    "rows.jsonl": lambda path: path.write_bytes(lines()),
    "rows.ndjson": lambda path: path.write_bytes(b"\xef\xbb\xbf" + lines().replace(b"\n", b"\r\n\n")),
    "rows.jsonl.gz": lambda path: path.write_bytes(
        gzip.compress(lines()[:700]) + gzip.compress(lines()[700:])
    ),
    "rows.jsonl.zst": lambda path: path.write_bytes(zstd(lines()[:700]) + zstd(lines()[700:])),
    "rows.json": lambda path: path.write_text(json.dumps(PLAIN, indent=1)),
    "rows.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(PLAIN).encode())),
    "lines.json": lambda path: path.write_bytes(lines()),
    "rows.parquet": lambda path: pq.write_table(TABLE, path, row_group_size=5),
    "rows.arrow": lambda path: write_arrow(path, pa.ipc.new_file),
    "stream.arrow": lambda path: write_arrow(path, pa.ipc.new_stream),
    "saved": lambda path: quietly(datasets.Dataset.from_list(ROWS).save_to_disk, path),
    "rows.tar": write_tar,
    "rows.tar.gz": lambda path: write_tar(path, "w:gz"),
    "rows.tgz": lambda path: write_tar(path, "w:gz"),
}


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(params=STORAGES)
def stored(request, tmp_path):
    path = tmp_path / request.param
    STORAGES[request.param](path)
    for number in range(0, COUNT, 3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    return path


def test_every_row_comes_through_with_its_turns_and_image_in_any_order(stored):
    source = opened(stored)

    assert len(source) == COUNT
    for number in [*range(COUNT), COUNT - 1, 0, 11, 3]:
        document = source.document(number)
        assert [piece.text for piece in document.segments if isinstance(piece, Text)] == [
            f"What is {number}?\n",
            f"It is {number}.",
        ]
        assert (len(document.images), document.id) == (int(number % 3 == 0), str(number))
    # Image bytes come from the file; of JSON, the path.
    assert source.document(3).images[0] in (Image("3.png"), Image(data=png(3)), *_named(stored, 3))


def _named(path, number):
    return (Image(f"./shard/{number:04}.png", png(number)),) if ".t" in path.name else ()


def test_counts_and_samples_are_the_same_at_any_number_of_workers(stored, tiny_processor):
    dataset = CPTDataset(stored, tiny_processor, max_length=64, packing=False)
    expected = [dataset[number][0].input_ids.tolist() for number in range(len(dataset))]

    assert dataset.ledger.total.documents["read"] == dataset.ledger.total.documents["used"] == COUNT
    for workers in (1, 4):
        loader = DataLoader(dataset, batch_size=None, num_workers=workers)
        assert [item[0].input_ids.tolist() for item in loader] == expected


def test_a_copy_in_another_process_reads_the_same(stored):
    source = opened(stored)
    before = source.document(7)
    copy = pickle.loads(pickle.dumps(source.rows))

    assert copy.row(7) == source.rows.row(7)
    assert copy.source(7) == before.source


def test_messages_name_the_file_as_the_user_wrote_it(stored):
    assert opened(stored).document(2).source.path == str(stored)
    assert opened(stored).name == stored.name.split(".")[0]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "saved"])
def test_only_columns_that_the_schema_reads_are_read(name, tmp_path):
    STORAGES[name](tmp_path / name)
    assert set(opened(tmp_path / name).rows.row(0)) == {"id", "messages", "images"}


def test_parquet_files_keep_few_row_groups_and_few_files_open(tmp_path, monkeypatch):
    """However many there are: 300 files of several groups, read in any order."""
    STORAGES["rows.parquet"](tmp_path / "0.parquet")
    for number in range(1, 300):
        shutil.copy(tmp_path / "0.parquet", tmp_path / f"{number}.parquet")
    rows, each = opened(tmp_path).rows, len(opened(tmp_path / "0.parquet"))
    group = pq.ParquetFile(tmp_path / "0.parquet").read_row_group(0).get_total_buffer_size()
    monkeypatch.setattr(tables, "_groups", tables._Kept(3 * group))
    for number in (0, 22, 3, 12):
        for file in range(300):
            assert rows.row(file * each + number)["id"] == str(number)
        assert len(tables._groups._kept) < 9
    open_files = [os.readlink(one) for one in Path("/proc/self/fd").glob("*") if os.path.exists(one)]
    assert 1 <= len([one for one in open_files if one.startswith(str(tmp_path))]) <= 256


def test_datasets_own_image_column_is_not_decoded(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    made = datasets.Dataset.from_dict({"image": [png(1)], "caption": ["A cat."]}, features=features)
    made.to_parquet(str(tmp_path / "a.parquet"))

    assert opened(tmp_path / "a.parquet").document(0).segments == (
        Image(data=png(1)),
        Text("A cat.", trainable=True),
    )


# Folders


def test_a_folder_of_shards_is_read_in_order_of_their_names(tmp_path):
    for shard, part in enumerate((PLAIN[:9], PLAIN[9:9], PLAIN[9:])):
        (tmp_path / f"train-{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (tmp_path / "README.md").write_text("# A card")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "old.parquet").touch()
    source = opened(tmp_path)

    assert [source.document(number).id for number in range(len(source))] == [row["id"] for row in PLAIN]
    assert source.document(9).source.path == str(tmp_path / "train-2.jsonl")
    assert source.document(9).source.line == 1


def test_columns_are_chosen_in_every_shard(tmp_path):
    for shard in range(2):
        pq.write_table(TABLE, tmp_path / f"{shard}.parquet")
    assert set(opened(tmp_path).rows.row(2 * COUNT - 1)) == {"id", "messages", "images"}


def test_a_folder_of_several_kinds_is_an_error_unless_text_is_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    (tmp_path / "b.txt").write_text("b")

    with pytest.raises(DocumentError, match=r"holds files of several kinds: \.jsonl, \.txt\. Give one"):
        opened(tmp_path)
    assert opened(tmp_path, format="text").document(0).segments == (Text("b", trainable=True),)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("pattern", ["", "*.{kind}"])
def test_format_text_takes_rows_from_folders_and_patterns_that_have_no_text_files(tmp_path, kind, pattern):
    said = 'x <image> <trainable_text> "y"'
    table = pa.table({"text": [said]})
    path = tmp_path / f"0.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "csv":
        path.write_text('text\n"' + said.replace('"', '""') + '"\n')
    else:
        path.write_text(json.dumps({"text": said}))
    (tmp_path / "README.md").write_text("# The card of the data set")
    source = opened(tmp_path / pattern.format(kind=kind), format="text")

    found = [source.document(number).segments for number in range(len(source))]
    assert found == [(Text(said, trainable=True),)]


def test_a_table_beside_a_folder_of_the_pictures_that_its_rows_name_is_the_data(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.png").write_bytes(png(0))
    rows = [{"text": "<image>A valve.", "images": ["train/0.png"]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    source = opened(tmp_path)

    assert (len(source), source.left_out()) == (2, {})
    assert [source.document(number).images[0].path for number in range(2)] == ["train/0.png"] * 2


def test_of_img2datasets_files_the_tars_are_the_data(tmp_path):
    write_tar(tmp_path / "00000.tar")
    pq.write_table(TABLE, tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    source = opened(tmp_path)

    assert (len(source), len(opened(tmp_path / "00000.tar"))) == (COUNT, COUNT)
    assert source.left_out() == {".parquet": 1, ".json": 1}
    assert source.document(0).images[0].data == png(0)
    with pytest.raises(DocumentError, match="does not apply to a folder that img2dataset wrote"):
        opened(tmp_path, split="train")


def test_a_table_without_its_tar_is_no_description_of_one(tmp_path):
    write_tar(tmp_path / "00000.tar")
    pq.write_table(TABLE, tmp_path / "00001.parquet")
    with pytest.raises(DocumentError, match=r"several kinds: \.parquet, \.tar"):
        opened(tmp_path)


def test_a_saved_dict_needs_its_split(tmp_path):
    quietly(datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk, tmp_path / "saved")

    assert len(opened(tmp_path / "saved", split="train")) == COUNT
    with pytest.raises(DocumentError, match="saved: it has splits; set split to one of train"):
        opened(tmp_path / "saved")
    with pytest.raises(DocumentError, match="it has no split 'dev'; set split to one of train"):
        opened(tmp_path / "saved", split="dev")


def test_a_split_of_a_folder_is_found_by_datasets(tmp_path):
    pq.write_table(TABLE, tmp_path / "train-00000-of-00001.parquet")
    pq.write_table(TABLE[:3], tmp_path / "test-00000-of-00001.parquet")
    datasets.disable_progress_bars()

    assert len(opened(tmp_path, split="test")) == 3


# The Hub


def test_a_name_on_the_hub_is_loaded_with_its_split(monkeypatch):
    asked = []

    def load_dataset(path, split):
        asked.append((path, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = opened("org/docs-v1.5", split="train")

    assert (asked, len(source), source.name) == ([("org/docs-v1.5", "train")], COUNT, "docs-v1.5")
    assert source.media_root is not None  # a stranger's rows are not trusted with paths
    assert str(source.document(4).source) == "org/docs-v1.5:5"


def test_a_message_about_a_hub_row_names_the_data_set_and_not_the_cache(monkeypatch, tiny_processor):
    cache = HF_HUB_CACHE
    inside = f"{cache}/datasets--org--pages/snapshots/0f1c/images/a.png"
    rows = [{"text": "<image>a", "images": [path]} for path in (inside, "../../etc/b.png")]
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: datasets.Dataset.from_list(rows))
    told = []
    for number in range(2):
        source = opened("org/pages", split="train")
        with pytest.raises(DocumentError) as caught:
            encode_document(source.document(number), tiny_processor)
        told.append(str(caught.value))

    assert told[0].startswith("org/pages:1: images: 'org/pages/images/a.png' does not exist in ")
    assert told[1].startswith("org/pages:2: images: '../../etc/b.png' ")
    assert all("(the cache of Hugging Face)" in one and cache not in one for one in told)


def test_without_the_hub_one_message_says_so():
    with pytest.raises(DocumentError) as caught:
        opened("org/name", split="train")
    assert str(caught.value).startswith("org/name: split 'train' cannot be loaded (")
    assert "that the Hub can be reached or the data set is in the cache" in caught.value.reason


# Errors


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1", "cannot be read as Parquet: "),
        ("a.arrow", b"nothing", "cannot be read as Arrow: "),
        ("a.tar", b"x" * 600, "cannot be read as tar: "),
        ("a.jsonl.gz", gzip.compress(lines(), mtime=0)[:-20], "cannot be unpacked as gzip: "),
        ("a.jsonl.zst", zstd(lines())[:-20], "cannot be unpacked as zstd: "),
        ("a.jsonl.gz", b"{}", "cannot be unpacked as gzip: "),
        ("a.json", b'{\n"data": []\n}', "expected a list of rows, found dict."),
        ("a.json", b"[1,", "not JSON: "),
        ("a.csv", b"a,b", "there is no row in it."),
        ("a.xml", b"<a/>", "cannot read files ending in '.xml'. Known: .jsonl, .json, .csv, .tsv, .parquet"),
        ("a.parquet.gz", gzip.compress(b"", mtime=0), "cannot read files ending in '.gz'."),
        ("a.jsonl", b"", "there is no row in it."),
        ("a.json", b"[]", "there is no row in it."),
    ],
)
def test_a_file_that_cannot_be_read_is_one_message_that_names_it(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DocumentError) as caught:
        opened(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert message in caught.value.reason


def test_a_tar_that_was_cut_is_an_error(tmp_path):
    write_tar(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:9000])
    with pytest.raises(DocumentError, match="cannot be read as tar: unexpected end of data"):
        opened(tmp_path / "a.tar")


def test_a_damaged_page_is_an_error_of_its_row(tmp_path):
    pq.write_table(TABLE, tmp_path / "a.parquet", row_group_size=5, use_dictionary=False)
    source = opened(tmp_path / "a.parquet", format="messages")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    start = pq.read_metadata(tmp_path / "a.parquet").row_group(1).column(0).data_page_offset
    data[start : start + 30] = b"\xff" * 30
    (tmp_path / "a.parquet").write_bytes(data)

    assert source.document(4).id == "4"
    with pytest.raises(DocumentError, match=r"a\.parquet:7: row group 1 cannot be read: "):
        source.document(6)


def test_a_compressed_file_that_is_cut_leaves_nothing_behind(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines())[:-20])
    with pytest.raises(DocumentError):
        opened(tmp_path / "a.jsonl.gz")
    cache = datasets.config.HF_DATASETS_CACHE / "vlcpt"
    assert cache.is_dir() and not list(cache.iterdir())


def test_a_changed_file_is_unpacked_again(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert len(opened(path)) == len(opened(path)) == 1
    assert len(list((datasets.config.HF_DATASETS_CACHE / "vlcpt").iterdir())) == 1
    path.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "b"}\n'))
    assert len(opened(path)) == 2


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("https://a.org/a.jsonl", {}, "an address is not opened. Download the data"),
        ("missing.jsonl", {}, "no such file or folder. Known: .jsonl"),
        ("org/missing", {}, "If it is a data set on the Hub, say which split"),
        ([{"text": "a"}], {"split": "train"}, "rows: split 'train' does not apply to rows in memory."),
        ([{"text": "a"}], {"targets": "all"}, "rows: targets 'all' does not apply to format vlcpt"),
        ([{"text": "a"}], {"format": "json"}, "rows: unknown format 'json'. Known: auto, vlcpt"),
    ],
)
def test_what_cannot_be_opened_is_said(path, options, message):
    with pytest.raises(DocumentError) as caught:
        opened(path, **options)
    assert message in str(caught.value)


def test_a_file_has_no_split(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    with pytest.raises(
        DocumentError, match=r"a\.jsonl: split 'train' does not apply to a file\. Remove it\."
    ):
        opened(tmp_path / "a.jsonl", split="train")


def test_errors_of_a_row_name_file_row_and_field(tmp_path):
    bad = [*PLAIN[:2], {"messages": [{"role": "user", "content": 5}]}]
    (tmp_path / "a.json").write_text(json.dumps(bad))
    with pytest.raises(
        DocumentError, match=r"a\.json:3: messages\[0\]\.content: expected a string or a list of"
    ):
        list(read_documents(tmp_path / "a.json"))


def test_rows_in_memory_and_targets_reach_the_reader(tiny_processor):
    source = {"path": PLAIN[1:3], "targets": "all", "name": "chat"}
    dataset = CPTDataset(source, tiny_processor, max_length=64)
    half = CPTDataset({**source, "targets": None}, tiny_processor, max_length=64)

    assert dataset.ledger.sources["chat"].tokens["targets"] > half.ledger.sources["chat"].tokens["targets"]
    with pytest.raises(
        DocumentError, match=r"a source is a mapping with 'path' and perhaps .*; found 'paths'"
    ):
        CPTDataset({"paths": "a"}, tiny_processor, max_length=64)
    assert isinstance(opened(PLAIN).rows, MemoryRows)
