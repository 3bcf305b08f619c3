"""Rows in memory and of ``datasets``, with media left as files."""

import datasets
import PIL.Image
import pytest

from tests.support import png
from vlcpt import CPTDataset, DocumentError
from vlcpt.data.rows.tables import DatasetRows, MemoryRows


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
    rows = DatasetRows(dataset, "mine")
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
        DatasetRows(splits, "mine")
    with pytest.raises(DocumentError, match="found IterableDataset"):
        DatasetRows(with_images.to_iterable_dataset(), "mine")


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
