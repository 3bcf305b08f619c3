"""Tests of vlcpt/training/checkpoints/disk.py."""

import json
import shutil
from collections import namedtuple

import pytest

from tests.processes import run_on_ranks
from tests.support import FOUR, make_trainer
from tests.training import foreseen_sizes
from tests.training.checkpoints.test_files_resuming import make_checkpoint
from vlcpt import CPTDataset, ModelConfig, load_model
from vlcpt.training.checkpoints.disk import delete_checkpoint, finish_deletions, require_space, rotate
from vlcpt.training.checkpoints.files import MANIFEST, CheckpointError, list_checkpoints, verify

Usage = namedtuple("Usage", "total used free")


def names(output):
    return [int(one.name.rpartition("-")[2]) for one in list_checkpoints(output)]


def rotated(output, limit, newest, best=None):
    best_folder = output / f"checkpoint-{best}" if best else None
    rotate(output, limit, newest=output / f"checkpoint-{newest}", best=best_folder)
    return names(output)


@pytest.fixture
def output(tmp_path):
    for step in (2, 4, 6, 8):
        make_checkpoint(tmp_path, step)
    return tmp_path


@pytest.mark.parametrize("limit", [None, 0])
def test_without_a_limit_all_stay(output, limit):
    assert rotated(output, limit, 8) == [2, 4, 6, 8]


@pytest.mark.parametrize(("limit", "left"), [(1, [8]), (2, [6, 8]), (3, [4, 6, 8]), (9, [2, 4, 6, 8])])
def test_the_oldest_go(output, limit, left):
    assert rotated(output, limit, 8) == left


@pytest.mark.parametrize(("limit", "left"), [(1, [2, 8]), (2, [2, 8]), (3, [2, 6, 8])])
def test_the_best_stays(output, limit, left):
    assert rotated(output, limit, 8, best=2) == left


def test_broken_ones_do_not_count_and_go(output):
    (output / "checkpoint-6/trainer_state.json").unlink()
    (output / "checkpoint-2" / MANIFEST).unlink()

    assert rotated(output, 2, 8) == [4, 8]


def test_those_of_a_later_step_are_of_a_run_that_was_given_up(output):
    """Going on from 2 again, the new 4 stays and the old 6 and 8 go first."""
    assert rotated(output, 2, 4) == [2, 4]


@pytest.mark.parametrize("removed", range(3))
def test_a_kill_during_a_deletion_leaves_no_half_checkpoint(output, monkeypatch, removed):
    """After any number of its files: what is left has no checkpoint's name, and goes with the next save."""

    class Killed(BaseException):
        pass

    def killed(folder):
        for path in sorted(folder.iterdir())[:removed]:
            path.unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            delete_checkpoint(output / "checkpoint-2")

    assert names(output) == [4, 6, 8]
    assert (output / ".checkpoint-2.deleted").exists()
    finish_deletions(output)
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]


def test_of_a_link_the_link_alone_is_deleted(output, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (output / "checkpoint-2").rename(elsewhere)
    (output / "checkpoint-2").symlink_to(elsewhere)

    assert rotated(output, 3, 8) == [4, 6, 8]
    assert verify(elsewhere)


def test_room_is_asked_for_with_path_and_sizes(output, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 10, 1_000_000))

    with pytest.raises(
        CheckpointError,
        match=r"checkpoint-10 takes about 5\.0 MB, but the disk has 1\.0 MB free\. checkpoint-8 is whole",
    ):
        require_space(output / "checkpoint-10", 5_000_000, output)
    require_space(output / "checkpoint-10", 1_000_000, output)


TUNED = {
    "full": {"tuning": "full"},
    "full, all towers": {"tuning": "full", "train_vision": True, "train_merger": True},
    "full, bfloat16": {"tuning": "full", "dtype": "bfloat16"},
    "lora": {"tuning": "lora"},
    "lora, embeddings": {"tuning": "lora", "train_embeddings": True},
    "lora, merger in full": {"tuning": "lora", "train_merger": True, "lora_towers": ("language",)},
    "qlora": {"tuning": "qlora"},
}
RUNS = [
    *((name, {}) for name in TUNED),
    *(("full", {"optim": name}) for name in ("adafactor", "sgd", "adamw_bnb_8bit")),
    ("full", {"save_only_model": True}),
    ("lora", {"logging_steps": 1, "max_steps": 40}),
]


@pytest.mark.parametrize(("tuning", "settings"), RUNS, ids=[f"{one}{two or ''}" for one, two in RUNS])
def test_what_a_checkpoint_takes_is_foreseen_within_a_fifth(
    tiny_model_dir, tiny_processor, tmp_path, monkeypatch, tuning, settings
):
    foreseen = []
    monkeypatch.setattr(
        "vlcpt.training.checkpoints.callback.require_space",
        lambda folder, needed, output: foreseen.append(needed),
    )
    steps = settings.get("max_steps", 1)
    trainer = make_trainer(
        load_model(ModelConfig(str(tiny_model_dir), **TUNED[tuning])),
        CPTDataset(FOUR, tiny_processor, max_length=256, packing=False),
        tiny_processor,
        tmp_path,
        **({"max_steps": 1, "save_strategy": "steps", "save_steps": steps} | settings),
    )
    trainer.train()

    written = written_bytes(tmp_path / f"checkpoint-{steps}")
    assert len(foreseen) == 1
    assert 0.83 <= foreseen[0] / written <= 1.2


def written_bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def sizes(folder):
    done = run_on_ranks("tests.training.foreseen_sizes", str(folder), timeout=580)
    assert done.returncode == 0, done.stdout
    return json.loads((folder / "sizes.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", foreseen_sizes.RUNS)
def test_what_a_checkpoint_of_two_processes_takes_is_foreseen_within_a_fifth(sizes, name):
    foreseen, written = sizes[name]

    assert 0.83 <= foreseen / written <= 1.2
