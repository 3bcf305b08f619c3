"""Ranks of a run: the first prepares the folder, one plans for all, and they go on only with one plan."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore
from transformers import TrainingArguments

from tests.processes import run_on_ranks
from tests.support import digits
from vlcpt.demo import base_path
from vlcpt.errors import ConfigError
from vlcpt.training import ranks
from vlcpt.training.ranks import Alarm, CollectiveError, HostSums, add_up, first_rank_only, require_equal

ROOT = Path(__file__).parents[2]
ROWS = 120


def on_two_ranks(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return run_on_ranks("tests.planning_rank", str(folder), *arguments)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, count in (("train", ROWS), ("held", 12)):
        rows = [{"text": f"a <trainable_text>{digits(1 + n % 90, n)}</trainable_text>"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my.yaml").write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: train.jsonl\neval_data: held.jsonl\n"
        "eval_strategy: steps\noutput_dir: out\nmax_length: 64\nmax_steps: 2\nuse_cpu: true\n"
    )
    return tmp_path


def lines_read(folder: Path) -> list[list[int]]:
    """The lines that each rank read."""
    notes = [folder / f"read-{rank}" for rank in range(2)]
    found = [list(map(int, note.read_text().split())) if note.exists() else [] for note in notes]
    for note in notes:
        note.unlink(missing_ok=True)
    return found


@pytest.mark.slow
@pytest.mark.alone
def test_two_ranks_read_each_row_once_and_have_one_plan(folder):
    done = on_two_ranks(folder)
    assert done.returncode == 0, done.stdout
    plans = [json.loads((folder / f"plans-{rank}").read_text()) for rank in range(2)]
    assert plans[0] == plans[1]
    assert plans[0]["train"]["ledger"]["total"]["documents"]["used"] == ROWS
    assert set(plans[0]) == {"train", "held"}
    rows = lines_read(folder)
    assert sorted(rows[0] + rows[1]) == sorted([*range(1, ROWS + 1), *range(1, 13)])
    assert any(ROWS in one and 13 in one for one in rows)  # one of them read all of train_data

    again = on_two_ranks(folder, "--resume_from_checkpoint", "auto")
    assert again.returncode == 0, again.stdout
    assert lines_read(folder) == [[], []]
    assert [json.loads((folder / f"plans-{rank}").read_text()) for rank in range(2)] == plans


@pytest.mark.slow
@pytest.mark.alone
def test_a_row_that_cannot_be_used_stops_both_ranks_and_leaves_no_plan(folder):
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"text": 7}\n')
    done = on_two_ranks(folder)
    assert done.returncode != 0
    assert f"train.jsonl:{ROWS + 1}: text" in done.stdout
    assert not list(folder.glob("out/plan/**/*.scan"))
    assert not list(folder.glob("plans-*"))


@pytest.mark.slow
@pytest.mark.alone
def test_a_folder_that_is_not_free_stops_both_ranks_before_they_read(folder):
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("precious")
    done = on_two_ranks(folder)
    assert done.returncode != 0
    assert "is not empty. Give another folder" in done.stdout
    assert lines_read(folder) == [[], []]
    assert [path.name for path in (folder / "out").iterdir()] == ["mine.txt"]


@pytest.fixture
def training(tmp_path) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), use_cpu=True)


@pytest.mark.parametrize("kind", [ConfigError, OSError, RuntimeError])
def test_what_the_first_rank_raises_is_raised_on_all(training, monkeypatch, kind):
    sent = []
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    monkeypatch.setattr(ranks, "broadcast_object_list", sent.append)

    def refuse() -> None:
        raise kind("not free")

    with pytest.raises(kind, match="not free"):
        first_rank_only(training, refuse)
    assert [type(one) for one in sent[0]] == [kind]  # the others wait for it


def test_ranks_with_other_plans_stop(monkeypatch):
    monkeypatch.setattr(ranks, "gather_object", lambda found: [found[0], found[0], "another"])
    with pytest.raises(ValueError, match="the plan of x is another on rank 2 than on rank 0"):
        require_equal("one", "the plan of x")
    monkeypatch.setattr(ranks, "gather_object", lambda found: found * 3)
    require_equal("one", "the plan of x")


def test_what_a_rank_failed_with_is_raised_where_sums_would_be(monkeypatch):
    monkeypatch.setattr(ranks, "reduce", lambda tensor, how: tensor * 2)
    assert add_up(torch.tensor([[1.5], [2.0]])).tolist() == [[3.0], [4.0]]

    monkeypatch.setattr(ranks, "reduce", lambda tensor, how: tensor + torch.tensor([0.0, 1.0]))
    monkeypatch.setattr(ranks, "gather_object", lambda mine: [*mine, "a.png: it is cut"])
    with pytest.raises(CollectiveError, match=r"^rank 1: a\.png: it is cut$"):
        add_up(torch.tensor([1.0]))
    with pytest.raises(OSError, match="mine"):
        add_up(torch.tensor([1.0]), OSError("mine"))


def test_numbers_of_ranks_without_gloo_are_added_up_where_the_run_is(training, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    monkeypatch.setattr(ranks, "reduce", lambda tensor, how: tensor * 2)

    sums = HostSums(training)
    sums.connect()  # there is no process group here

    assert sums.add([1.5, True, 0]) == [3.0, 2.0, 0.0]


def test_an_alarm_is_heard_by_the_others_and_not_by_later_work(monkeypatch):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))

    def alarms(number):  # those of two ranks, each of which counts its own
        monkeypatch.setattr(Alarm, "_numbers", iter([number, number]))
        return Alarm(ranks=2), Alarm(ranks=2)

    first, second = alarms(0)
    assert not second.rings()
    first.ring()
    assert second.rings()
    assert not any(one.rings() for one in alarms(1))
