"""Tests of vlcpt/training/checkpoints/files.py: which checkpoints are deleted, and how."""

import shutil

import pytest

from tests.training.checkpoints.test_files_resuming import make_checkpoint
from vlcpt.training.checkpoints.files import (
    MANIFEST,
    delete_checkpoint,
    finish_deletions,
    list_checkpoints,
    rotate,
    verify,
)


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
