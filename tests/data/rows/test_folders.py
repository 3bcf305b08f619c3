"""Hugging Face's ImageFolder and VideoFolder, against what ``datasets`` itself makes of them."""

import json
import logging
import pickle
from io import BytesIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from tests.support import avi, opened, png
from vlcpt import CPTDataset, DocumentError, Image, Text, Video, load_processor
from vlcpt.data.media.open import MediaError, read_image
from vlcpt.demo import base_path


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def csv(path, rows):
    lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)


WRITERS = {"metadata.jsonl": jsonl, "metadata.csv": csv, "metadata.parquet": parquet}


@pytest.fixture(params=WRITERS)
def folder(request, tmp_path):
    """A folder with three pictures, of which one has no row, and a column that no format reads."""
    for number, name in enumerate(("a.png", "in/b.png", "c.png")):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_bytes(png(number))
    rows = [
        {"file_name": "in/b.png", "text": "A, fence.", "by": "x"},
        {"file_name": "a.png", "text": "A dish.", "by": "y"},
    ]
    WRITERS[request.param](tmp_path / "f" / request.param, rows)
    return tmp_path / "f"


def pixels_and_texts(source):
    found = []
    for number in range(len(source)):
        document = source.document(number)
        (image,), (text,) = document.images, [one for one in document.segments if isinstance(one, Text)]
        found.append((np.asarray(read_image(image, media_root=document.media_root)).tobytes(), text.text))
    return sorted(found)


def theirs(folder, split):
    datasets.disable_progress_bars()
    loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), split=split)
    return sorted((np.asarray(row["image"].convert("RGB")).tobytes(), row["text"]) for row in loaded)


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("split", [None, "train"])
def test_rows_and_pixels_are_those_of_datasets(folder, split):
    ours = pixels_and_texts(opened(folder, split=split))
    assert len(ours) == 2
    assert ours == theirs(folder, "train")


def test_the_metadata_file_itself_may_be_given(folder):
    (metadata,) = folder.glob("metadata.*")
    assert pixels_and_texts(opened(metadata)) == theirs(folder, "train")


def test_each_document_is_a_caption_and_other_columns_and_files_are_named(folder):
    (folder / "notes.txt").write_text("Not one of the rows.")
    dataset = CPTDataset({"path": folder, "name": "f"}, load_processor(base_path()), max_length=64)
    account = dataset.ledger.sources["f"].as_json()
    assert (account["documents"]["used"], account["tokens"]["media"]) == (2, 2 * 4)
    assert account["not_read"] == {"by": 2, "media files that no row names": 1, ".txt": 1}


def test_samples_are_the_same_at_any_number_of_workers(folder, tiny_processor):
    dataset = CPTDataset(folder, tiny_processor, max_length=64, packing=False)
    expected = [dataset[number][0].input_ids.tolist() for number in range(len(dataset))]
    for workers in (2, 8):
        loader = DataLoader(dataset, batch_size=None, num_workers=workers)
        assert [item[0].input_ids.tolist() for item in loader] == expected


@pytest.fixture
def splits(tmp_path):
    for split, count in (("train", 2), ("test", 1)):
        (tmp_path / split).mkdir()
        for number in range(count):
            (tmp_path / split / f"{number}.png").write_bytes(png(number + 5 * (split == "test")))
        rows = [{"file_name": f"{n}.png", "text": f"{split} {n}"} for n in range(count)]
        jsonl(tmp_path / split / "metadata.jsonl", rows)
    return tmp_path


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_is_what_datasets_takes_for_it(splits, split):
    source = opened(splits, split=split)
    assert pixels_and_texts(source) == theirs(splits, split)
    assert source.left_out() == {}
    assert source.document(0).source.path == str(splits / split / "metadata.jsonl")


def test_one_file_at_the_top_may_describe_all_splits(splits):
    rows = [{"file_name": f"{name}.png", "text": name} for name in ("train/0", "test/0", "train/1")]
    for split in ("train", "test"):
        (splits / split / "metadata.jsonl").unlink()
    jsonl(splits / "metadata.jsonl", rows)
    source = opened(splits, split="train")
    assert [source.document(n).images[0].path for n in range(len(source))] == ["train/0.png", "train/1.png"]
    assert source.document(1).source.line == 3
    assert len(opened(splits, split="test")) == 1
    assert len(opened(splits)) == 3


def test_without_a_split_all_are_read_and_that_is_said(splits, caplog):
    with caplog.at_level(logging.WARNING):
        source = opened(splits)
    assert [source.document(n).images[0].path for n in range(3)] == [
        "test/0.png",
        "train/0.png",
        "train/1.png",
    ]
    assert "test and train are all read. Set split to read one of them." in caplog.text


def test_a_split_that_is_not_there_names_those_that_are(splits):
    with pytest.raises(DocumentError, match=r"it has no split 'dev'; it has train, test\. Correct split\."):
        opened(splits, split="dev")


@pytest.mark.parametrize(
    ("row", "media"),
    [
        ({"file_name": "a.mp4", "caption": "It runs."}, (Video("a.mp4"),)),
        ({"image_file_name": "a.png", "text": "A."}, (Image("a.png"),)),
        ({"file_names": ["a.png", "b.png"], "text": "Two."}, (Image("a.png"), Image("b.png"))),
        ({"images_file_names": ["a.png"], "file_name": "b.png", "text": "One."}, (Image("b.png"),)),
        ({"file_name": "b.png", "text": "<image>A <trainable_text>dish</trainable_text>"}, (Image("b.png"),)),
        ({"file_name": "b.png", "image": "a.png", "text": "Its own."}, (Image("a.png"),)),
    ],
)
def test_columns_that_name_files_are_the_rows_media(tmp_path, row, media):
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "b.png").write_bytes(png(1))
    (tmp_path / "a.mp4").write_bytes(avi(0))
    jsonl(tmp_path / "metadata.jsonl", [row])
    document = opened(tmp_path).document(0)
    assert (*document.images, *document.videos) == media


def test_conversations_have_their_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A dish."}]
    jsonl(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "conversations": turns}])
    assert opened(tmp_path).document(0).images == (Image("a.png"),)


@pytest.mark.parametrize("others", [[], [{"file_name": "a.png", "text": "A."}]])
def test_a_picture_that_is_missing_is_a_missing_medium(tmp_path, others):
    (tmp_path / "a.png").write_bytes(png(0))
    jsonl(tmp_path / "metadata.jsonl", [*others, {"file_name": "gone.png", "text": "B."}])
    document = opened(tmp_path).document(len(others))
    with pytest.raises(MediaError, match=r"'gone\.png' does not exist"):
        read_image(document.images[0], media_root=tmp_path)


def test_an_address_is_named_as_one(tmp_path):
    row = {"file_name": "https://example.org/a.png", "text": "A valve."}
    jsonl(tmp_path / "metadata.jsonl", [row])
    document = opened(tmp_path).document(0)
    with pytest.raises(MediaError, match=r"'https://example.org/a.png' is a URL, and nothing is fetched"):
        read_image(document.images[0], media_root=tmp_path)


def test_pictures_in_folders_without_metadata_are_counted(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png(1))
    jsonl(tmp_path / "cat" / "metadata.jsonl", [{"file_name": "0.png", "text": "A cat."}])
    assert opened(tmp_path).left_out() == {"media files that no row names": 1}


def test_a_list_of_source_files_is_no_image_folder(tmp_path):
    rows = [{"file_name": "a.py", "text": "import os"}, {"file_name": "logo.png", "text": "PNG"}]
    jsonl(tmp_path / "metadata.jsonl", rows)
    assert [opened(tmp_path).document(n).not_read for n in range(2)] == [("file_name",)] * 2


def test_the_field_can_be_ignored_on_purpose(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    jsonl(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": "A."}])
    document = opened(tmp_path, ignore_fields=["file_name"]).document(0)
    assert (document.segments, document.not_read) == ((Text("A.", trainable=True),), ())


def test_names_start_at_the_media_root_that_is_given_where_they_are_there(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png(0))
    jsonl(tmp_path / "data" / "metadata.jsonl", [{"file_name": "a.png", "text": "A."}])
    for path in (tmp_path / "data", tmp_path / "data" / "metadata.jsonl"):
        given = opened(path, media_root=tmp_path / "pictures").document(0)
        assert read_image(given.images[0], media_root=given.media_root).size == (56, 56)


def test_two_metadata_files_of_one_folder_are_an_error(tmp_path):
    for name, write in WRITERS.items():
        write(tmp_path / name, [{"file_name": "a.png", "text": "A."}])
    with pytest.raises(DocumentError, match=r"holds metadata\.\w+ and metadata\.\w+, which may be the same"):
        opened(tmp_path)


def test_a_changed_metadata_file_is_another_state(splits):
    before = opened(splits).rows
    state = before.state()
    assert pickle.loads(pickle.dumps(before)).state() == state == opened(splits).rows.state()
    jsonl(splits / "test" / "metadata.jsonl", [{"file_name": "0.png", "text": "Another one."}])
    assert opened(splits).rows.state() != state


def test_pictures_are_compared_by_their_pixels():
    """Or the comparison with datasets would show nothing."""
    one, other = (np.asarray(PILImage.open(BytesIO(png(seed)))).tobytes() for seed in (0, 1))
    assert one != other
