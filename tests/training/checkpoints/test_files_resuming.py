"""Tests of vlcpt/training/checkpoints/files.py."""

import shutil
from unittest.mock import patch

import pytest
import torch

from tests.processes import run_on_ranks
from vlcpt.training.checkpoints import files
from vlcpt.training.checkpoints.files import (
    MANIFEST,
    UNFINISHED,
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    write_manifest,
)


def make_checkpoint(output, step):
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    write_manifest(folder, {})
    return folder


@pytest.fixture
def output(tmp_path):
    for step in (9, 10, 100):
        make_checkpoint(tmp_path, step)
    return tmp_path


def find(*args, **kwargs):
    skipped = []
    with patch.object(files.logger, "warning", lambda text, one: skipped.append(text % one)):
        return find_checkpoint(*args, **kwargs), skipped


@pytest.mark.parametrize("resume", [None, False])
def test_without_resuming_no_checkpoint_is_looked_for(output, resume):
    assert find(resume, output) == (None, [])


@pytest.mark.parametrize("resume", [True, "auto"])
def test_the_newest_checkpoint_is_found_by_number(output, resume):
    assert find(resume, output) == (output / "checkpoint-100", [])


@pytest.mark.parametrize("resume", [True, "auto"])
def test_one_that_does_not_verify_is_skipped_and_the_reason_logged(output, resume):
    (output / "checkpoint-100/trainer_state.json").write_text("[]")
    (output / "checkpoint-10/trainer_state.json").unlink()

    found, skipped = find(resume, output)

    assert found == output / "checkpoint-9"
    assert skipped == [
        "skipped checkpoint-100: the content of trainer_state.json is not what was saved",
        "skipped checkpoint-10: trainer_state.json is missing",
    ]


@pytest.mark.parametrize("resume", [True, "auto"])
def test_none_that_verifies_is_an_error_and_never_a_fresh_start(output, resume):
    for step in (9, 10, 100):
        (output / f"checkpoint-{step}" / MANIFEST).unlink()

    with pytest.raises(
        CheckpointError, match=r"none of the checkpoints .*checkpoint-100: it has no vlcpt_m.*-9"
    ):
        find(resume, output)


def test_what_else_makes_one_unusable_is_asked_for(output):
    def check(folder, manifest):
        if folder.name == "checkpoint-100":
            raise CheckpointError("not ours")

    assert find(True, output, check=check) == (
        output / "checkpoint-10",
        ["skipped checkpoint-100: not ours"],
    )


def test_auto_starts_fresh_where_there_is_none(tmp_path):
    assert find("auto", tmp_path) == (None, [])
    assert find("auto", tmp_path / "missing") == (None, [])


def test_a_save_that_was_interrupted_is_no_checkpoint(tmp_path):
    """Killed in its first save, a requeued job must come up again."""
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / UNFINISHED).touch()
    (folder / "model.safetensors").write_bytes(b"half")

    found, skipped = find("auto", tmp_path)

    assert found is None
    assert skipped == ["skipped checkpoint-2: its saving was interrupted"]
    with pytest.raises(CheckpointError, match=r"holds no checkpoint that was saved to its end\. .*'auto'"):
        find(True, tmp_path)


@pytest.mark.parametrize("folder", ["", "missing"])
def test_true_without_a_checkpoint_says_what_to_do(tmp_path, folder):
    with pytest.raises(CheckpointError, match=r"holds no checkpoint.*'auto' to start fresh"):
        find(True, tmp_path / folder)


def test_a_path_is_taken_as_it_is(output):
    assert find(str(output / "checkpoint-9"), "elsewhere") == (output / "checkpoint-9", [])


def test_a_path_that_does_not_verify_is_an_error(output):
    (output / "checkpoint-9/trainer_state.json").write_text("")

    with pytest.raises(
        CheckpointError, match=r"checkpoint-9: trainer_state.json has 0 bytes where 2 were saved"
    ):
        find(str(output / "checkpoint-9"), output)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        find(str(output / "checkpoint-11"), output)


def test_only_folders_of_a_step_are_checkpoints(output):
    (output / "checkpoint-copy").mkdir()
    (output / "checkpoint-11").write_text("")

    assert [one.name for one in list_checkpoints(output)] == [
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-100",
    ]


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_two_ranks_that_resume_in_the_same_process_read_each_document_of_the_pass_once(
    tiny_model_dir, tmp_path
):
    """Torch's seed is another on each rank by then, and must not choose the order."""
    shutil.copytree(tiny_model_dir, tmp_path / "base")

    done = run_on_ranks("tests.training.resuming_rank", str(tmp_path))

    assert done.returncode == 0, done.stdout
    ranks = [torch.load(tmp_path / f"read.{rank}.pt") for rank in (0, 1)]
    for whole, resumed in ranks:
        assert resumed == whole[4:]  # after four of eight steps
    assert sorted(number for whole, _ in ranks for number in whole) == list(range(16))
