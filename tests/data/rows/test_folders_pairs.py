"""Media files beside their texts are a row each, and nothing that lies with them is lost in silence."""

import json
import logging
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from tests.processes import UNFORKED
from tests.support import avi, opened, png
from vlcpt import CPTDataset, DocumentError, Image, Text, Video, load_processor
from vlcpt.data.sources import open_sources
from vlcpt.demo import base_path


@pytest.fixture
def folder(tmp_path):
    """Writes files by their names, below one folder."""

    def write(**files):
        for name, content in files.items():
            path = tmp_path / "side" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / "side"

    return write


def caption(text):
    return Text(text, trainable=True)


def found(path, **options):
    source = opened(path, **options)
    return [source.document(number).segments for number in range(len(source))]


def i2d(folder):
    """What img2dataset writes with output_format: files."""
    files = {}
    for number in range(3):
        key = f"{number:09}"
        fields = {"url": f"https://example.org/{number}.jpg", "caption": f"Part {number}.", "key": key}
        fields |= {"status": "success", "error_message": None, "width": 56, "height": 56, "exif": "{}"}
        fields |= {"sha256": "ab" * 32}
        files |= {f"00000/{key}.jpg": png(number), f"00000/{key}.txt": f"Part {number}."}
        files[f"00000/{key}.json"] = json.dumps(fields, indent=4)
    files["00000_stats.json"] = "{}"
    path = folder(**files)
    table = pa.Table.from_pylist([{"url": "https://example.org/0.jpg", "caption": "Part 0.", "key": "0"}])
    pq.write_table(table, path / "00000.parquet")
    return path


def test_a_picture_and_a_text_of_its_name_are_one_document(folder):
    path = folder(**{"0.jpg": png(0), "0.txt": "A dish.", "1.PNG": png(1), "1.TXT": "A fence."})
    assert found(path) == [(Image("0.jpg"), caption("A dish.")), (Image("1.PNG"), caption("A fence."))]
    assert opened(path).document(1).name == f"{path}/1.TXT:1"


def test_a_video_and_a_text_of_its_name_are_one_document(folder):
    path = folder(**{"a.mp4": avi(0), "a.txt": "It runs."})
    assert found(path) == [(Video("a.mp4"), caption("It runs."))]


@pytest.mark.parametrize("inside", ["", "00000"])
def test_img2datasets_folders_and_their_parent_have_each_picture(folder, inside):
    source = opened(i2d(folder) / inside)
    documents = [source.document(number) for number in range(len(source))]
    before = "" if inside else "00000/"
    assert [document.images for document in documents] == [(Image(f"{before}{n:09}.jpg"),) for n in range(3)]
    assert [document.segments[1] for document in documents] == [caption(f"Part {n}.") for n in range(3)]
    assert {"url", "sha256"} <= set(documents[0].not_read)
    assert source.left_out() == ({} if inside else {".parquet": 1, ".json": 1})


def test_the_ledger_counts_the_pictures_and_names_what_is_not_read(folder):
    dataset = CPTDataset({"path": i2d(folder), "name": "i2d"}, load_processor(base_path()), max_length=64)
    account = dataset.ledger.sources["i2d"].as_json()
    assert account["documents"]["used"] == 3
    assert account["tokens"]["media"] == 3 * 4
    assert account["not_read"] | {".parquet": 1, ".json": 1, "url": 3} == account["not_read"]
    assert "media files beside the rows" not in account["not_read"]


def test_the_json_alone_may_hold_the_text(folder):
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A dish."}]
    path = folder(**{"0.jpg": png(0), "0.json": json.dumps({"conversations": turns, "id": "x"})})
    assert found(path) == [(Image("0.jpg"), Text("What?\n"), caption("A dish."))]


@pytest.mark.parametrize("named", ["b.jpg", "in/b.jpg"])
def test_the_json_may_name_files_of_its_own_key(folder, named):
    parts = [{"type": "image", "image": named}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A dish."}]
    path = folder(**{"in/b.jpg": png(0), "in/b.json": json.dumps({"messages": turns})})
    assert found(path) == [(Image("in/b.jpg"), Text("What?\n"), caption("A dish."))]


def test_all_media_of_one_name_are_read(folder):
    path = folder(**{"a.jpg": png(0), "a.png": png(1), "a.mp4": avi(0), "a.txt": "Both."})
    assert found(path) == [(Image("a.jpg"), Image("a.png"), Video("a.mp4"), caption("Both."))]


def test_names_with_points_keep_to_their_own_text(folder):
    files = {f"v1.{n}.jpg": png(n) for n in range(2)} | {f"v1.{n}.txt": str(n) for n in range(2)}
    assert found(folder(**files)) == [(Image(f"v1.{n}.jpg"), caption(str(n))) for n in range(2)]


def test_a_text_may_have_the_full_name_of_its_picture(folder):
    assert found(folder(**{"a.jpg": png(0), "a.jpg.txt": "A dish."})) == [
        (Image("a.jpg"), caption("A dish."))
    ]


def test_what_has_no_counterpart_is_counted_and_named(folder):
    files = {"0.jpg": png(0), "0.txt": "A dish.", "1.jpg": png(1), "2.txt": "Alone.", "a.heic": b"x"}
    path = folder(**files, **{"notes.pdf": b"%PDF", "README.md": "# A card"})
    source = opened(path)
    assert len(source) == 1
    assert source.left_out() == {
        "pictures and videos without a text": 2,
        "texts without a picture or video": 1,
        ".pdf": 1,
    }
    assert opened(path, ignore_fields=[".pdf"]).left_out().keys() == source.left_out().keys() - {".pdf"}


def test_more_texts_alone_than_beside_pictures_ask_which_are_meant(folder):
    path = folder(**{"0.jpg": png(0), "0.txt": "A dish.", "1.txt": "One.", "2.txt": "Two."})
    with pytest.raises(
        DocumentError, match=r"1 of its texts stand .* 2 do not\. Set format: caption .*: text"
    ):
        opened(path)
    assert found(path, format="caption") == [(Image("0.jpg"), caption("A dish."))]
    assert len(found(path, format="text")) == 3
    assert opened(path, format="text").left_out() == {}


def test_texts_without_pictures_of_their_names_stay_texts_and_the_pictures_are_counted(folder):
    path = folder(**{"texts/0.txt": "A dish.", "images/0.jpg": png(0)})
    source = opened(path)
    assert source.document(0).segments == (caption("A dish."),)
    assert source.left_out() == {"media files beside the rows": 1}
    assert opened(path / "texts").left_out() == {}
    assert opened(folder(**{"a.txt": "b", "a.jpg": png(1)}) / "a.txt").left_out() != {}


def test_a_heic_with_a_text_is_not_lost(folder):
    path = folder(**{"0.heic": b"\0\0\0\x18ftypheic", "0.txt": "A dish."})
    assert opened(path).document(0).images == (Image("0.heic"),)


@pytest.mark.parametrize("format", ["auto", "vlcpt"])
def test_a_text_with_markup_is_markup(folder, format):
    path = folder(**{"0.jpg": png(0), "0.txt": "<image>A <trainable_text>dish</trainable_text>"})
    assert found(path, format=format) == [(Image("0.jpg"), Text("A "), caption("dish"))]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.txt": b"\xff"}, "0.txt:1: byte 0 is not UTF-8"),
        ({"0.txt": "a", "0.TXT": "b"}, "has two texts, '0.TXT' and '0.txt'. Keep one of them."),
        ({"0.json": "[1]"}, "0.json:1: expected an object in {}, found list."),
    ],
)
def test_what_is_wrong_with_a_pair_is_said(folder, files, message):
    with pytest.raises(DocumentError) as caught:
        found(folder(**{"0.jpg": png(0)}, **files), format="caption")
    assert message in str(caught.value)


def test_a_split_of_such_a_folder_is_an_error(folder):
    with pytest.raises(
        DocumentError, match="split 'train' does not apply to a folder of media and their texts"
    ):
        opened(folder(**{"0.jpg": png(0), "0.txt": "A dish."}), split="train")


def test_references_start_at_the_media_root_that_is_given(folder):
    path = folder(**{"0.jpg": png(0), "0.txt": "A dish."})
    source = opened(path, media_root=path.parent)
    assert source.document(0).images == (Image("side/0.jpg"),)
    assert source.document(0).media_root == str(path.parent)


def test_samples_are_the_same_at_any_number_of_workers(folder, tiny_processor):
    dataset = CPTDataset(i2d(folder), tiny_processor, max_length=64, packing=False)
    expected = [dataset[number][0].input_ids.tolist() for number in range(len(dataset))]
    assert len(expected) == 3
    for workers, way in ((2, "fork"), (8, "fork"), (2, UNFORKED)):
        loader = DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=way)
        assert [item[0].input_ids.tolist() for item in loader] == expected


def test_a_file_that_was_added_or_changed_is_another_state(folder):
    path = i2d(folder)
    before = opened(path).rows.state()
    assert pickle.loads(pickle.dumps(opened(path).rows)).state() == before
    (path / "00000" / "000000000.txt").write_text("Another one.")
    changed = opened(path).rows.state()
    (path / "00000" / "000000000.png").write_bytes(png(1))
    assert len({str(before), str(changed), str(opened(path).rows.state())}) == 3


def test_the_log_says_why_it_is_read_as_captions(folder, caplog):
    with caplog.at_level(logging.INFO):
        open_sources(folder(**{"0.jpg": png(0), "0.txt": "A dish."}), "train")
    assert "format caption was found, because the first rows have image and caption" in caplog.text
    assert "e.g. of side." in caplog.text


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "JFIF"])
def test_every_name_that_pictures_have_is_one_of_a_picture(folder, suffix):
    path = folder(**{f"0.{suffix}": png(1), "0.txt": "A valve."})
    assert found(path) == [(Image(f"0.{suffix}"), caption("A valve."))]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"cat/0.jpg": b"", "dog/0.jpg": b""},
            "there is no row in it; pictures and videos without a text: 2. Write",
        ),
        (
            {"0.jpg": b"", "0.caption": "A cat."},
            r"not read: .caption \(1\); pictures and videos without a text: 1.",
        ),
        ({"0.html": "A cat."}, r"there is no row in it; not read: .html \(1\). Known: .jsonl"),
    ],
)
def test_a_folder_without_a_text_says_what_it_has_and_what_helps(folder, files, message):
    with pytest.raises(DocumentError, match=message):
        opened(folder(**files))
