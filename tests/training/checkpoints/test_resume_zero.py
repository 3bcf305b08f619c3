"""Checkpoints under ZeRO-2: what is read, what is not, and what is never saved. See zero_checkpoints.py."""

import json

import pytest

from tests.processes import run_on_ranks

pytestmark = [pytest.mark.slow, pytest.mark.alone]


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("zero")
    done = run_on_ranks(
        "tests.training.zero_checkpoints", str(folder), str(tiny_model_dir), processes=1, timeout=300
    )
    assert done.returncode == 0, done.stdout
    return {**json.loads((folder / "found.json").read_text()), "log": done.stdout}


def test_a_checkpoint_lists_the_states_of_deepspeed(found):
    assert found["whole"] == "done"
    assert "latest" in found["files"]
    assert any(
        name.startswith("global_step3/") and name.endswith("optim_states.pt") for name in found["files"]
    )
    assert "training_args.bin" not in found["files"]


def test_a_run_that_goes_on_from_its_own_ends_as_without_the_interruption(found):
    assert found["resumed"] == "done"
    assert found["equal"]


def test_a_checkpoint_from_elsewhere_needs_to_be_trusted(found):
    assert found["foreign"].startswith("CheckpointError: resume_from_checkpoint ")
    assert "this run did not write it" in found["foreign"]
    assert "--trust_checkpoint true" in found["foreign"]
    assert found["foreign, trusted"] == "done"


def test_a_program_in_a_checkpoint_does_not_run_and_the_one_before_is_used(found):
    assert "skipped checkpoint-3: this run did not write it" in found["log"]
    assert "this run did not write it" in found["planted, by path"]
    assert found["planted"] == "done"
    assert not found["ran"]
    assert found["ran, trusted"]  # or it was no program


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(found):
    assert found["loss"].startswith("NotFiniteError: step 2: the loss is inf on rank 0, of rows:")
    assert found["loss, saved"] == ["checkpoint-1"]
    assert found["loss, finite weights"]


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_save(found):
    assert found["gradient"].startswith("NotFiniteError: step 2: the gradient is not finite, of rows:")
    assert found["gradient, saved"] == ["checkpoint-1"]
