"""A prepared source that a stranger wrote, with fitting digests: one message, and no file of this machine."""

import json
from functools import partial

import pyarrow as pa
import pytest
import xxhash

from tests.support import digits, png
from vlcpt import CPTDataset, DocumentError
from vlcpt.data.encoding import DocumentEncoder
from vlcpt.data.failed import FailedSample
from vlcpt.data.fingerprints import fingerprint
from vlcpt.data.prepare import prepare_source
from vlcpt.data.readers.files import open_source
from vlcpt.data.shard_writer import ShardFile, arrow_bytes
from vlcpt.data.shards import INDEX_SCHEMA, PLACES_SCHEMA

OPTIONS = {"train_eos": "auto", "min_pixels": None, "max_pixels": None, "fps": None, "max_frames": None}
LARGE = {"height": 10**6, "width": 10**6, "total_frames": 4, "video_fps": 1.0, "indices": [0] * 100}


@pytest.fixture
def found(tmp_path, tiny_processor):
    """The parts of a prepared source of two rows, to be changed, and a function that writes and reads it."""
    (tmp_path / "a.png").write_bytes(png(1))
    rows = [{"text": f"<image>a {digits(8)}", "images": ["a.png"]}, {"text": digits(9, 1)}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "prepared"
    prepare_source(
        open_source(tmp_path / "train.jsonl"),
        partial(DocumentEncoder, tiny_processor, **OPTIONS),
        folder,
        fingerprint=fingerprint(tiny_processor, "train", OPTIONS),
    )
    return Forged(folder, tiny_processor)


class Forged:
    def __init__(self, folder, processor):
        self._folder, self._processor = folder, processor
        self.rows, self.index, self.places = (
            pa.ipc.open_file(pa.py_buffer((folder / name).read_bytes())).read_all().to_pylist()
            for name in ("00000.arrow", "index.arrow", "places.arrow")
        )
        self.about = json.loads((folder / "prepared.json").read_text())

    @property
    def medium(self):
        return self.rows[0]["media"][0]

    def read(self):
        """What reading it gives: its samples and failures."""
        shard = self._folder / "00000.arrow"
        with shard.open("wb") as file:
            written = ShardFile(file, 0, 0, 0)
            written._rows, written.index = self.rows, [list(line.values()) for line in self.index]
            written.close(shard)
        place = {name: written.places[0][name] for name in ("size", "digest")}
        self.places = [
            {**place, **{k: v for k, v in one.items() if k not in place or v < 0}} for one in self.places
        ]
        for name, lines, schema in (
            ("index.arrow", self.index, INDEX_SCHEMA), ("places.arrow", self.places, PLACES_SCHEMA),
        ):  # fmt: skip
            content = arrow_bytes([pa.RecordBatch.from_pylist(lines, schema)], schema)
            (self._folder / name).write_bytes(content)
            if isinstance(self.about.get("digests"), dict) and name in self.about["digests"]:
                self.about["digests"][name] = xxhash.xxh3_64_hexdigest(content)
        if isinstance(self.about.get("files"), dict):
            self.about["files"] = {name: (self._folder / name).stat().st_size for name in self.about["files"]}
        (self._folder / "prepared.json").write_text(json.dumps(self.about))
        dataset = CPTDataset([self._folder], self._processor, max_length=100, **OPTIONS)
        return [one for item in range(len(dataset)) for one in dataset[item]]

    def failure(self):
        (failed,) = [one for one in self.read() if isinstance(one, FailedSample)]
        return failed.message


def test_as_it_was_prepared_it_is_read(found):
    assert len(found.read()) == 2
    assert not [one for one in found.read() if isinstance(one, FailedSample)]


@pytest.mark.parametrize("is_video", [False, True])
def test_no_file_is_opened_by_its_path(found, tmp_path, is_video):
    """The file is there, and as large as the medium was."""
    found.medium.update(data=None, path=str(tmp_path / "a.png"), is_video=is_video)

    assert "row 1 is not as it was prepared (ValueError: a medium has no bytes)" in found.failure()


@pytest.mark.parametrize(
    "medium",
    [
        {"start": -1}, {"start": 999}, {"grid_thw": [1, 4]}, {"grid_thw": None}, {"grid_thw": [1, -4, -4]},
        {"grid_thw": [1, 10**9, 10**9]}, {"merge": 0}, {"patch": None}, {"interval": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_a_medium_that_cannot_stand_there_is_told(found, medium):
    found.medium.update(medium)

    assert "row 1 is not as it was prepared (" in found.failure()


@pytest.mark.parametrize(
    "medium", [{"min_pixels": 10**14}, {"is_video": True, "clip": LARGE}], ids=["image", "video"]
)
def test_a_medium_that_would_take_all_memory_is_refused(found, medium):
    found.medium.update(medium)

    assert "max_" in found.failure()


@pytest.mark.parametrize(
    "row",
    [
        {"run_lengths": [2**31 - 1]}, {"run_lengths": [-1]}, {"run_weights": [float("nan")]},
        {"run_weights": [1e30]}, {"input_ids": [-5] * 10}, {"input_ids": None}, {"media": None},
    ],
    ids=str,
)  # fmt: skip
def test_tokens_that_do_not_fit_together_are_told(found, row):
    if "run_weights" in row:
        row = {**row, "run_lengths": [len(found.rows[1]["input_ids"])]}
    if row.get("input_ids"):
        row = {"input_ids": [-5] * len(found.rows[1]["input_ids"])}
    found.rows[1].update(row)

    assert "row 2 is not as it was prepared (" in found.failure()


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.index.pop(),
        lambda found: found.places.clear(),
        lambda found: found.places[0].update(first=1),
        lambda found: found.places[0].update(shard=7),
        lambda found: found.places[0].update(offset=-5),
        lambda found: found.places[0].update(size=-5),
    ],
)
def test_places_and_integers_that_do_not_fit_the_rows_are_told(found, change):
    change(found)

    with pytest.raises(DocumentError, match=r"(places|index|0000\d)\.arrow is not as it was prepared"):
        found.read()


@pytest.mark.parametrize("value", [None, "x", -1, []])
@pytest.mark.parametrize("key", ["rows", "shard_rows", "files", "digests", "fingerprint", "layout"])
def test_what_it_says_of_itself_is_checked(found, key, value):
    found.about[key] = value

    with pytest.raises(DocumentError, match=r"not as it was prepared|has layout|with other options"):
        found.read()


def test_a_set_whose_list_is_damaged_is_told(tmp_path):
    for sources in (None, 3, [3], [{"folder": "a"}]):
        (tmp_path / "prepared.json").write_text(
            json.dumps({"kind": "vlcpt prepared set", "sources": sources})
        )
        with pytest.raises(DocumentError, match=r"prepared\.json is damaged"):
            open_source(tmp_path)
