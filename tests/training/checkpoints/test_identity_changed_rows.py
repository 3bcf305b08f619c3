"""Tests of vlcpt/training/checkpoints/identity.py: a resume names the first row that is another."""

import io
import json
import tarfile

import pytest
from datasets import Dataset

from tests.support import digits, make_trainer, png, row
from vlcpt import CPTDataset, ModelConfig, load_model
from vlcpt.training.checkpoints import identity
from vlcpt.training.checkpoints.files import CheckpointError


def texts(*numbers):
    return [{"text": f"one <trainable_text>{digits(5, number)}</trainable_text>"} for number in numbers]


ROWS = texts(*range(8))
# What is done to the rows, the 0-based row that the message names, and what it says happened there.
CHANGES = {
    "changed": (
        [*ROWS[:4], *texts(99), *ROWS[5:]],
        4,
        "its tokens, targets or the sizes of its media are others",
    ),
    "put in": ([*ROWS[:3], *texts(99), *ROWS[3:]], 3, "a row was put in there"),
    "gone": ([*ROWS[:5], *ROWS[6:]], 5, "the row that was there is gone"),
    "swapped": (
        [*ROWS[:2], ROWS[3], ROWS[2], *ROWS[4:]],
        2,
        "the same rows are in another order from there on",
    ),
    "one gone, one added": ([*ROWS[:6], ROWS[7], *texts(99)], 6, "the row that was there is gone"),
    "two changes": ([*ROWS[:1], *texts(98), *ROWS[2:7], *texts(99)], 1, "its tokens, targets"),
    "more at the end": ([*ROWS, *texts(98, 99)], 8, "2 rows were added from there on"),
}


def jsonl(folder, rows):
    (folder / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(folder / "a.jsonl")


def parquet(folder, rows):
    Dataset.from_list(rows).to_parquet(folder / "a.parquet")
    return str(folder / "a.parquet")


def tar(folder, rows):
    with tarfile.open(folder / "a.tar", "w") as archive:
        for number, one in enumerate(rows):
            content = json.dumps(one).encode()
            member = tarfile.TarInfo(f"{number:03}.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(folder / "a.tar")


def memory(folder, rows):
    return rows


@pytest.fixture(scope="module")
def adapted(tiny_model_dir):
    return load_model(ModelConfig(str(tiny_model_dir), lora_r=2))


@pytest.fixture
def train(adapted, tiny_processor, tmp_path):
    def go(sources, resume=False, **options):
        dataset = CPTDataset(sources, tiny_processor, **({"max_length": 64, "packing": False} | options))
        settings = {"max_steps": 4 if resume else 1, "save_strategy": "steps", "save_steps": 1}
        make_trainer(adapted, dataset, tiny_processor, tmp_path / "out", **settings).train(
            resume_from_checkpoint=resume
        )
        return dataset

    return go


@pytest.mark.parametrize("what", CHANGES)
def test_the_first_row_that_differs_is_named_with_what_happened(train, tmp_path, what):
    rows, place, happened = CHANGES[what]
    train(jsonl(tmp_path, ROWS))

    with pytest.raises(CheckpointError) as refusal:
        train(jsonl(tmp_path, rows), resume=True)

    assert f"a.jsonl:{place + 1}: {happened}" in str(refusal.value)


def test_rows_missing_at_the_end_are_counted(train, tmp_path):
    train(jsonl(tmp_path, ROWS))

    with pytest.raises(
        CheckpointError, match=r"at the end, after .*a\.jsonl:6: 2 rows are missing from there on"
    ):
        train(jsonl(tmp_path, ROWS[:6]), resume=True)


@pytest.mark.parametrize("write", [parquet, tar, memory])
def test_the_row_is_named_as_its_storage_names_it(train, tmp_path, write):
    rows, place, happened = CHANGES["changed"]
    train(write(tmp_path, ROWS))

    with pytest.raises(CheckpointError) as refusal:
        train(write(tmp_path, rows), resume=True)

    assert f":{place + 1}: {happened}" in str(refusal.value)


def test_a_row_of_the_second_source_is_named_by_its_file(train, tmp_path):
    (tmp_path / "second").mkdir()
    first, second = jsonl(tmp_path, texts(*range(20, 24))), tmp_path / "second/b.jsonl"
    second.write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    train([first, str(second)])
    second.write_text("".join(json.dumps(one) + "\n" for one in CHANGES["changed"][0]))

    with pytest.raises(CheckpointError, match=r"at .*b\.jsonl:5: its tokens"):
        train([first, str(second)], resume=True)


def test_a_picture_of_another_size_is_a_row_that_differs(train):
    rows = [row(f"<image>{digits(3, n)}", images=[png(n)]) for n in range(3)]
    train(rows)
    rows[1] = row(f"<image>{digits(3, 1)}", images=[png(1, 84, 84)])

    with pytest.raises(CheckpointError, match=":2: its tokens, targets or the sizes of its media are others"):
        train(rows, resume=True)


def test_where_no_row_differs_it_says_so(train, tmp_path):
    train(jsonl(tmp_path, ROWS))

    with pytest.raises(
        CheckpointError, match="all rows and their order are the same, so it is max_length, pack"
    ):
        train(jsonl(tmp_path, ROWS), resume=True, seed=3)


def test_another_source_is_named(train, tmp_path):
    train([{"path": jsonl(tmp_path, ROWS), "name": "old"}])

    with pytest.raises(CheckpointError, match="its sources were old, and are new now"):
        train([{"path": jsonl(tmp_path, texts(50, 51)), "name": "new"}], resume=True)


def test_of_very_many_rows_a_block_is_named(train, tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "MAX_NUMBERS", 3)
    train(jsonl(tmp_path, ROWS))

    with pytest.raises(CheckpointError, match=r"within 3 rows from .*a\.jsonl:4 on"):
        train(jsonl(tmp_path, CHANGES["changed"][0]), resume=True)


def test_a_damaged_list_of_rows_leaves_the_refusal_as_it_was(adapted, tiny_processor, tmp_path):
    dataset = CPTDataset(ROWS, tiny_processor, max_length=64)
    (tmp_path / identity.ROWS).write_bytes(b"no array")

    found = identity.changed_rows(dataset, tmp_path, dataset.source_rows)

    assert found is None
