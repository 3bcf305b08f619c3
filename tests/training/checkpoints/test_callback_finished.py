"""Tests of vlcpt/training/checkpoints/callback.py: a run that has all its steps."""

import pytest
import torch

from tests.support import FOUR, make_trainer
from vlcpt import CPTDataset, ModelConfig, load_model
from vlcpt.training.checkpoints.files import list_checkpoints

TO_STEP_2_OF_4 = {
    "max_steps": ("lora", {"max_steps": 2}),
    "tuned in full": ("full", {"max_steps": 2}),
    "a part of an epoch": ("lora", {"num_train_epochs": 0.5}),
    "saved when the epoch ends": ("lora", {"max_steps": 2, "save_strategy": "epoch"}),
}


@pytest.fixture
def make(tiny_model_dir, tiny_processor, tmp_path):
    """A function that makes a trainer over four documents, one a step, and keeps what it prints."""

    def make(tuning, **settings):
        torch.manual_seed(0)
        model = load_model(ModelConfig(str(tiny_model_dir), tuning=tuning))
        dataset = CPTDataset(FOUR, tiny_processor, max_length=256, packing=False)
        defaults = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
        defaults |= {"lr_scheduler_type": "constant", "eval_strategy": "epoch"}
        trainer = make_trainer(
            model, dataset, tiny_processor, tmp_path / "out", eval_dataset=dataset, **(defaults | settings)
        )
        trainer.progress.console.record = True
        return trainer

    return make


def weights(trainer):
    return {name: one.detach().clone() for name, one in trainer.model.named_parameters()}


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("tuning", "settings"), TO_STEP_2_OF_4.values(), ids=TO_STEP_2_OF_4)
def test_a_finished_run_that_goes_on_trains_no_step_and_writes_no_checkpoint(
    make, tmp_path, tuning, settings
):
    first = make(tuning, **settings)
    first.train()
    newest = tmp_path / "out/checkpoint-2"
    assert first.state.global_step == 2
    assert list_checkpoints(tmp_path / "out")[-1] == newest
    before = files(newest)

    again = make(tuning, **settings)
    untrained = weights(again)
    again.train(resume_from_checkpoint="auto")

    assert again.state.global_step == 2
    found, expected = weights(again), weights(first)
    assert any(not torch.equal(one, untrained[name]) for name, one in found.items())  # or nothing is shown
    assert all(torch.equal(one, expected[name]) for name, one in found.items())
    assert list_checkpoints(tmp_path / "out")[-1] == newest
    assert files(newest) == before
    assert "step 2 of 2 is done: no step is left to train" in again.progress.console.export_text()


def test_a_run_whose_last_step_was_set_before_its_checkpoint_trains_none(make):
    make("lora", max_steps=3).train()

    again = make("lora", max_steps=2)
    again.train(resume_from_checkpoint=True)

    assert again.state.global_step == 3
    assert "step 3 of 2 is done" in again.progress.console.export_text()


def test_a_step_that_is_left_is_trained(make):
    make("lora", max_steps=2).train()

    again = make("lora", max_steps=3)
    again.train(resume_from_checkpoint=True)

    assert again.state.global_step == 3
    assert "no step is left" not in again.progress.console.export_text()
