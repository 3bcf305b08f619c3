"""A prepared source that a stranger wrote, with fitting digests: one message, and no file of this machine."""

import json
import re
from functools import partial
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support import digits, opened, png
from vlcpt import CPTDataset, DocumentError
from vlcpt.data.encode.encoder import NUMBERS, DocumentEncoder, TokenStream
from vlcpt.data.encode.vision import EncodingOptions
from vlcpt.data.plan.failures import FailedSample
from vlcpt.data.prepared.fingerprint import fingerprint
from vlcpt.data.prepared.read import RUNS, SCHEMA
from vlcpt.data.prepared.write import prepare_source

OPTIONS = {"train_eos": "auto", "min_pixels": None, "max_pixels": None, "fps": None, "max_frames": None}


@pytest.fixture
def found(tmp_path, tiny_processor):
    """The parts of a prepared source of two rows, to be changed, and a function that writes and reads it."""
    (tmp_path / "a.png").write_bytes(png(1))
    rows = [{"text": f"<image>a {digits(8)}", "images": ["a.png"]}, {"text": digits(9, 1)}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "prepared"
    prepare_source(
        opened(tmp_path / "train.jsonl"),
        partial(DocumentEncoder, tiny_processor, EncodingOptions(**OPTIONS)),
        folder,
        fingerprint=fingerprint(tiny_processor, "train", EncodingOptions(**OPTIONS)),
    )
    return Forged(folder, tiny_processor)


def unpacked(row):
    """The parts of a row, to be changed: its media as dicts, its tokens and numbers as lists and integers."""
    about, data = json.loads(row["about"]), BytesIO(row["data"])
    ids = np.frombuffer(data.read(4 * about.pop("tokens")), "<i4").tolist()
    runs = np.frombuffer(data.read(RUNS.itemsize * about.pop("runs")), RUNS)
    files = [{**one, "kind": kind, "data": data.read(size)} for size, kind, one in about.pop("media", [])]
    numbers = zip(NUMBERS.names, np.frombuffer(row["numbers"], NUMBERS)[0].item(), strict=True)
    own = {"input_ids": ids, "run_lengths": runs["length"].tolist(), "run_weights": runs["weight"].tolist()}
    return {"about": about, "files": files, **own, **dict(numbers)}


def packed(row):
    """The row that has these parts."""
    ids, runs = np.array(row["input_ids"], "<i4"), np.zeros(len(row["run_lengths"]), RUNS)
    runs["length"], runs["weight"] = row["run_lengths"], row["run_weights"]
    files = [one["data"] or b"" for one in row["files"]]
    media = [
        [len(one["data"] or b""), one["kind"], {k: v for k, v in one.items() if k not in ("kind", "data")}]
        for one in row["files"]
    ]
    about = {**row["about"], "media": media, "tokens": len(ids), "runs": len(runs), **row.get("more", {})}
    numbers = np.array(tuple(row[name] for name in NUMBERS.names), NUMBERS)
    data = b"".join([ids.tobytes(), runs.tobytes(), *files])
    return {"about": json.dumps(about), "data": data, "numbers": numbers.tobytes()}


class Forged:
    def __init__(self, folder, processor):
        self.folder, self._processor = folder, processor
        self.rows = [unpacked(row) for row in pq.read_table(folder / "00000.parquet").to_pylist()]
        self.about = json.loads((folder / "prepared.json").read_text())
        self.schema = SCHEMA

    @property
    def medium(self):
        return self.rows[0]["files"][0]

    def read(self):
        """What reading it gives: its samples and failures."""
        shard = self.folder / "00000.parquet"
        table = pa.Table.from_pylist([packed(row) for row in self.rows], self.schema)
        pq.write_table(table, shard, write_page_checksum=True)
        if isinstance(self.about.get("files"), dict) and self.about["files"]:
            self.about["files"] = {"00000.parquet": shard.stat().st_size}
        (self.folder / "prepared.json").write_text(json.dumps(self.about))
        dataset = CPTDataset([self.folder], self._processor, max_length=100, **OPTIONS)
        return [one for item in range(len(dataset)) for one in dataset[item]]

    def agree(self):
        """Bring the numbers of the first row in line with its tokens, as a careful forger would."""
        row = self.rows[0]
        weights = np.repeat(np.array(row["run_weights"], np.float32), row["run_lengths"])
        ids, targets = np.array(row["input_ids"]), np.flatnonzero(weights)
        grids = (SimpleNamespace(grid_thw=(1, 4, 4), interval=1.0),)
        row["checksum"] = TokenStream(ids, ids, weights, grids, 0, 0).checksum
        row.update(tokens=len(ids), targets=len(targets), length=int(targets[-1]) + 1)

    def failure(self):
        (failed,) = [one for one in self.read() if isinstance(one, FailedSample)]
        return failed.message


def test_as_it_was_prepared_it_is_read(found):
    assert len(found.read()) == 2
    assert not [one for one in found.read() if isinstance(one, FailedSample)]


@pytest.mark.parametrize("kind", ["Image", "Video"])
def test_no_file_is_opened_by_its_path(found, tmp_path, kind):
    """The file is there, and as large as the medium was."""
    found.medium.update(data=None, path=str(tmp_path / "a.png"), kind=kind)

    assert re.search(r"a\.png (is empty|has 0 bytes|.*not)", found.failure())


@pytest.mark.parametrize(
    "medium",
    [{"kind": "Video"}, {"max_pixels": 28 * 28}, {"data": png(2, 84, 84)}],
    ids=["kind", "pixels", "bytes"],
)
def test_a_medium_of_another_grid_than_its_tokens_is_reported(found, medium):
    found.medium.update(medium)

    failure = found.failure()
    assert (
        "the tokens of its media are not those of their grids" in failure or "a.png is not an MP4" in failure
    )


def test_a_medium_that_would_take_all_memory_is_refused(found):
    found.medium.update(min_pixels=10**14)

    assert "max_image_pixels" in found.failure()


def test_more_media_than_tokens_of_them_are_reported(found):
    found.rows[0]["files"] *= 2

    assert "its tokens have 1 media, and its row 2" in found.failure()


GRIDS = "the tokens of its media are not those of their grids"


def swap(found, place, token):
    found.rows[0]["input_ids"][place] = token


def cut(found, tokens):
    """Fewer tokens than its medium has; none is a target."""
    ids = found.rows[0]["input_ids"][:tokens]
    found.rows[0].update(input_ids=ids, run_lengths=[tokens - 1, 1], run_weights=[0.0, 1.0])
    found.rows[0].update(pads=0, media=0)


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
        (lambda found, p: swap(found, -2, p.image_token_id), GRIDS),
        (lambda found, p: swap(found, -2, p.video_token_id), GRIDS),
        (lambda found, p: swap(found, 1, p.video_token_id), GRIDS),
        (lambda found, p: swap(found, 1, 5), GRIDS),
        (lambda found, p: swap(found, 0, 5), "its tokens have 0 media, and its row 1"),
        (lambda found, p: cut(found, 3), GRIDS),
        (lambda found, p: weigh(found, 1), "its first token, or a medium, is a target"),
        (lambda found, p: weigh(found, 0), "its first token, or a medium, is a target"),
    ],
)  # fmt: skip
def test_tokens_that_would_fail_only_in_the_model_are_reported(found, tiny_processor, change, message):
    change(found, tiny_processor)
    found.agree()

    failure = found.failure()
    assert re.search(message, failure) and str(found.folder) in failure


@pytest.mark.parametrize(
    "line",
    [{"targets": 3}, {"pads": 1}, {"videos": 1}, {"checksum": 1}],
    ids=str,
)
def test_numbers_that_are_not_those_of_the_row_are_reported(found, line):
    found.rows[0].update(line)

    failure = found.failure()
    assert str(found.folder) in failure
    assert "what it says for planning is not what its tokens give" in failure


@pytest.mark.parametrize("line", [{"length": 999}, {"targets": 99}, {"pads": -1}, {"media": 50}], ids=str)
def test_numbers_that_no_row_has_are_reported_at_opening(found, line):
    found.rows[1].update(line)

    with pytest.raises(
        DocumentError, match=r"row 2 is not as it was prepared \(its numbers do not fit together"
    ):
        found.read()


@pytest.mark.parametrize(
    "row",
    [
        {"run_lengths": [2**31 - 1]}, {"run_lengths": [-1]}, {"run_weights": [float("nan")]},
        {"run_weights": [1e30]}, {"input_ids": [-5]}, {"input_ids": []},
        {"run_lengths": [], "run_weights": []},
        {"more": {"tokens": -1}}, {"more": {"tokens": 10**9}}, {"more": {"runs": 10**12}},
        {"more": {"runs": 0}},
        {"more": {"media": [[9, "Image", {}]]}}, {"more": {"media": [[-4, "Image", {}]]}},
        {"more": {"media": [[0, "File", {}]]}}, {"more": {"media": [None]}}, {"more": {"media": 3}},
        {"more": {"source": None}}, {"more": {"source": {"path": 7, "line": 1}}},
        {"more": {"source": {"path": "a", "line": "x"}}}, {"more": {"error": 3}},
        {"more": {"error": {"kind": 3}}},
    ],
    ids=str,
)  # fmt: skip
def test_parts_that_do_not_fit_together_are_reported(found, row):
    tokens = len(found.rows[1]["input_ids"])
    if row.get("run_lengths") or row.get("run_weights"):
        found.rows[1].update(run_lengths=[tokens], run_weights=[1.0])
    if row.get("input_ids"):
        row = {"input_ids": [-5] * tokens}
    found.rows[1].update(row)

    assert "row 2 is not as it was prepared (" in found.failure()


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.rows.pop(),
        lambda found: found.about.update(rows=3),
        lambda found: found.about.update(files={}),
        lambda found: setattr(found, "schema", SCHEMA.set(0, pa.field("about", pa.string()))),
        lambda found: setattr(
            found, "schema", SCHEMA.set(2, pa.field("numbers", pa.binary(), nullable=False))
        ),
        lambda found: setattr(found, "schema", SCHEMA.remove(SCHEMA.get_field_index("numbers"))),
        lambda found: setattr(found, "schema", SCHEMA.append(pa.field("more", pa.int64()))),
    ],
)
def test_files_of_other_rows_or_columns_are_reported(found, change):
    change(found)

    with pytest.raises(DocumentError, match=r"(prepared\.json|00000\.parquet) is not as it was prepared"):
        found.read()


@pytest.mark.parametrize("value", [None, "x", -1, []])
@pytest.mark.parametrize("key", ["rows", "shard_rows", "files", "fingerprint", "layout", "reading"])
def test_what_it_says_of_itself_is_checked(found, key, value):
    found.about[key] = value

    with pytest.raises(DocumentError, match=r"not as it was prepared|has layout|with other options"):
        found.read()


def test_a_set_whose_list_is_damaged_is_reported(tmp_path):
    for sources in (None, 3, [3], [{"folder": "a"}]):
        (tmp_path / "prepared.json").write_text(
            json.dumps({"kind": "vlcpt prepared set", "sources": sources})
        )
        with pytest.raises(DocumentError, match=r"prepared\.json is damaged"):
            opened(tmp_path)


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
        opened(tmp_path / "set")
