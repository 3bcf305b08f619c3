"""A prepared source that a stranger wrote, with fitting digests: one message, and no file of this machine."""

import json
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from tests.support import digits, png
from vlcpt import CPTDataset, DocumentError
from vlcpt.data.encode.encoder import DocumentEncoder
from vlcpt.data.encode.options import EncodingOptions
from vlcpt.data.encode.streams import TokenStream
from vlcpt.data.failed import FailedSample
from vlcpt.data.prepared.fingerprints import fingerprint
from vlcpt.data.prepared.shards import INDEX_SCHEMA, PLACES_SCHEMA
from vlcpt.data.prepared.write import ShardFile, arrow_bytes, prepare_source
from vlcpt.data.sources import open_source

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
        partial(DocumentEncoder, tiny_processor, EncodingOptions(**OPTIONS)),
        folder,
        fingerprint=fingerprint(tiny_processor, "train", EncodingOptions(**OPTIONS)),
    )
    return Forged(folder, tiny_processor)


class Forged:
    def __init__(self, folder, processor):
        self.folder, self._processor = folder, processor
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
        shard = self.folder / "00000.arrow"
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
            (self.folder / name).write_bytes(content)
            if isinstance(self.about.get("digests"), dict) and name in self.about["digests"]:
                self.about["digests"][name] = xxhash.xxh3_64_hexdigest(content)
        if isinstance(self.about.get("files"), dict):
            self.about["files"] = {name: (self.folder / name).stat().st_size for name in self.about["files"]}
        (self.folder / "prepared.json").write_text(json.dumps(self.about))
        dataset = CPTDataset([self.folder], self._processor, max_length=100, **OPTIONS)
        return [one for item in range(len(dataset)) for one in dataset[item]]

    def agree(self, number=0):
        """Bring the integers of a row that was changed in line with it, as a careful forger would."""
        row, line = self.rows[number], self.index[number]
        weights = np.repeat(np.array(row["run_weights"], np.float32), row["run_lengths"])
        ids = np.array(row["input_ids"])
        media = [(one["grid_thw"], one["interval"]) for one in row["media"]]
        grids = tuple(SimpleNamespace(grid_thw=grid, interval=interval) for grid, interval in media)
        line["checksum"] = TokenStream(ids, ids, weights, grids, 0, 0).checksum
        targets = np.flatnonzero(weights)
        line.update(targets=len(targets), length=int(targets[-1]) + 1)
        if row["media"]:
            videos = sum(one["is_video"] for one in row["media"])
            line.update(images=len(row["media"]) - videos, videos=videos)

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
def test_a_medium_that_would_take_all_memory_is_refused(found, tiny_processor, medium):
    found.medium.update(medium)
    if "clip" in medium:
        image, video = tiny_processor.image_token_id, tiny_processor.video_token_id
        found.rows[0]["input_ids"] = [video if one == image else one for one in found.rows[0]["input_ids"]]
        found.agree()

    assert "max_" in found.failure()


def swap(found, place, token):
    found.rows[0]["input_ids"][place] = token


def weigh(found, place):
    """One token and the last are targets."""
    runs = {place: 1, len(found.rows[0]["input_ids"]) - 1: 1}
    weights = [runs.get(number, 0) for number in range(len(found.rows[0]["input_ids"]))]
    found.rows[0].update(run_lengths=[1] * len(weights), run_weights=weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found, p: swap(found, -2, len(p.tokenizer)), r"token \d+ is not among the tokenizer's"),
        (lambda found, p: swap(found, -2, 2**31 - 1), r"token 2147483647 is not among"),
        (lambda found, p: swap(found, -2, p.image_token_id), "a token of a medium stands outside of it"),
        (lambda found, p: swap(found, -2, p.video_token_id), "a token of a medium stands outside of it"),
        (lambda found, p: swap(found, 1, p.video_token_id), r"tokens of a\.png are not those of its grid"),
        (lambda found, p: swap(found, 0, 5), r"tokens of a\.png are not those of its grid"),
        (lambda found, p: found.medium.update(merge=1), r"a medium does not stand|not those of its grid"),
        (lambda found, p: weigh(found, 1), r"a\.png is a target"),
        (lambda found, p: weigh(found, 0), "its first token is a target"),
    ],
)  # fmt: skip
def test_tokens_that_would_fail_only_in_the_model_are_told(found, tiny_processor, change, message):
    change(found, tiny_processor)
    found.agree()

    failure = found.failure()
    assert re.search(message, failure) and str(found.folder) in failure


@pytest.mark.parametrize(
    "line",
    [{"empty_spans": 2}, {"targets": 3}, {"pads": 1}, {"videos": 1}, {"cut_edges": 4}, {"checksum": 1}],
    ids=str,
)
def test_integers_that_are_not_those_of_the_row_are_told(found, line):
    found.index[0].update(line)

    failure = found.failure()
    assert f"{found.folder}: row 1 is not as it was prepared (index.arrow says otherwise of it)" in failure


@pytest.mark.parametrize("line", [{"length": 999}, {"targets": 99}, {"pads": -1}, {"media": 50}], ids=str)
def test_integers_that_no_row_has_are_told_at_opening(found, line):
    found.index[1].update(line)

    with pytest.raises(
        DocumentError, match=r"index\.arrow is not as it was prepared \(the numbers of row 2 do"
    ):
        found.read()


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
        lambda found: found.places[0].update(offset=10**12),
        lambda found: found.about.update(files={}),
    ],
)
def test_places_and_integers_that_do_not_fit_the_rows_are_told(found, change):
    change(found)

    with pytest.raises(DocumentError, match=r"(places|index|0000\d)\.arrow is not as it was prepared"):
        found.read()


@pytest.mark.parametrize("value", [None, "x", -1, []])
@pytest.mark.parametrize(
    "key", ["rows", "shard_rows", "files", "digests", "fingerprint", "layout", "reading"]
)
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


@pytest.mark.parametrize(
    "inner", ["../prepared", "a/../../prepared", "/etc", "", ".", None, 7, "..\\\\prepared", "a\0"], ids=repr
)
def test_a_set_leads_to_no_folder_outside_of_it(found, tmp_path, inner):
    (tmp_path / "set").mkdir()
    source = {"folder": inner, "role": "train_data", "name": "a", "share": None}
    (tmp_path / "set/prepared.json").write_text(
        json.dumps({"kind": "vlcpt prepared set", "sources": [source]})
    )

    with pytest.raises(DocumentError, match=r"set: prepared\.json is damaged"):
        open_source(tmp_path / "set")
