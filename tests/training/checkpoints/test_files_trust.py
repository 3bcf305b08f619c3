"""Tests of vlcpt/training/checkpoints/files.py."""

import json
import shutil

import pytest

from vlcpt.training.checkpoints.files import RECORD, CheckpointError, require_own, write_record


@pytest.fixture
def output(tmp_path):
    output = tmp_path / "out"
    (output / "checkpoint-2").mkdir(parents=True)
    (output / "checkpoint-2/states.pt").write_bytes(b"written by the run")
    write_record(output, output / "checkpoint-2")
    return output


def test_what_the_run_wrote_is_its_own(output):
    require_own(output, output / "checkpoint-2")


def test_a_checkpoint_that_was_written_anew_is_not(output):
    (output / "checkpoint-2/states.pt").write_bytes(b"written by another")

    with pytest.raises(CheckpointError, match=r"this run did not write it.*--trust_checkpoint true"):
        require_own(output, output / "checkpoint-2")


def test_one_with_a_file_more_is_not(output):
    (output / "checkpoint-2/more.pt").write_bytes(b"")

    with pytest.raises(CheckpointError, match="did not write it"):
        require_own(output, output / "checkpoint-2")


def test_one_that_was_put_there_is_not(output):
    shutil.copytree(output / "checkpoint-2", output / "checkpoint-4")

    with pytest.raises(CheckpointError, match="did not write it"):
        require_own(output, output / "checkpoint-4")


@pytest.mark.parametrize("linked", [False, True])
def test_one_from_elsewhere_is_not_whatever_its_name(output, tmp_path, linked):
    shutil.copytree(output / "checkpoint-2", tmp_path / "other/checkpoint-2")
    folder = tmp_path / "other/checkpoint-2"
    if linked:
        shutil.rmtree(output / "checkpoint-2")
        (output / "checkpoint-2").symlink_to(folder)
        folder = output / "checkpoint-2"

    with pytest.raises(CheckpointError, match="did not write it"):
        require_own(output, folder)


def test_the_record_forgets_what_was_deleted(output):
    shutil.rmtree(output / "checkpoint-2")
    (output / "checkpoint-4").mkdir()
    write_record(output, output / "checkpoint-4")

    assert list(json.loads((output / RECORD).read_text())) == ["checkpoint-4"]
    require_own(output, output / "checkpoint-4")


@pytest.mark.parametrize("content", ["", "[]", '{"checkpoint-2": 5}'])
def test_a_damaged_record_vouches_for_nothing(output, content):
    (output / RECORD).write_text(content)

    with pytest.raises(CheckpointError):
        require_own(output, output / "checkpoint-2")
