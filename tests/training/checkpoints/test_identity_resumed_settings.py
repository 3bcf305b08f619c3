"""Tests of vlcpt/training/checkpoints/identity.py: what a resume says is what the optimizer really has."""

from io import StringIO

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback

from tests.support import FOUR, make_trainer
from vlcpt import CPTDataset, ModelConfig, load_model
from vlcpt.training.checkpoints.files import CheckpointError

BEFORE = {
    "learning_rate": 1e-2,
    "merger_learning_rate": 3e-3,
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 2.0,
    "warmup_steps": 1,
    "max_steps": 2,
    "save_steps": 1,
    "save_strategy": "steps",
}


class Seen(TrainerCallback):
    """The optimizer and the schedule, as a step had them."""

    def on_step_end(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        self.groups = {group["name"]: dict(group) for group in optimizer.param_groups}
        self.schedule = lr_scheduler.lr_lambdas[0]
        self.state = state


@pytest.fixture
def run(tiny_model_dir, tiny_processor, tmp_path):
    """A function that trains, from the start or the newest checkpoint: what it said, and what a step had."""

    def go(resume=False, model=None, **changes):
        dataset = CPTDataset(FOUR, tiny_processor, max_length=256, packing=False)
        made = load_model(ModelConfig(str(tiny_model_dir), train_merger=True, lora_r=4, **(model or {})))
        seen = Seen()
        trainer = make_trainer(
            made, dataset, tiny_processor, tmp_path, callbacks=[seen], **(BEFORE | changes)
        )
        trainer.progress.console = Console(file=StringIO(), width=500)
        trainer.train(resume_from_checkpoint=resume)
        seen.trainer = trainer
        return trainer.progress.console.file.getvalue(), seen

    go(model={"lora_dropout": 0.25})
    return go


def test_where_nothing_has_changed_nothing_is_said(run):
    said, _ = run(resume=True, model={"lora_dropout": 0.25}, max_steps=2 + 1)

    assert said.count("in the configuration") == 1  # max_steps
    assert "max_steps: 2 in the checkpoint, 3 in the configuration: the configuration's is used" in said


# The key, its other value, the group it is read from and the name that it has there.
OF_CHECKPOINT = {
    "learning_rate": (5e-4, "language", "initial_lr"),
    "merger_learning_rate": (7e-4, "merger", "initial_lr"),
    "weight_decay": (0.3, "language", "weight_decay"),
    "adam_epsilon": (1e-3, "language", "eps"),
}


@pytest.mark.parametrize("key", OF_CHECKPOINT)
def test_what_the_optimizer_has_of_the_checkpoint_is_said_to_be_the_checkpoints(run, key):
    other, group, name = OF_CHECKPOINT[key]

    said, seen = run(resume=True, model={"lora_dropout": 0.25}, max_steps=4, **{key: other})

    assert seen.groups[group][name] == BEFORE[key]  # as the optimizer had it in its last step
    expected = (
        f"{key}: {BEFORE[key]:g} in the checkpoint, {other:g} in the configuration: the checkpoint's is used"
    )
    assert expected in said
    assert said.count("the checkpoint's is used") == 1
    assert "start a new run from the checkpoint's weights" in said


@pytest.mark.parametrize(("number", "other"), [(1, 0.5), (2, 0.7)])
def test_betas_are_the_checkpoints(run, number, other):
    key = f"adam_beta{number}"
    said, seen = run(resume=True, model={"lora_dropout": 0.25}, max_steps=4, **{key: other})

    assert seen.groups["language"]["betas"] == (0.8, 0.95)
    assert (
        f"{key}: {BEFORE[key]:g} in the checkpoint, {other:g} in the configuration: the checkpoint's" in said
    )


def test_a_rate_that_a_tower_takes_over_is_said_once(run):
    said, seen = run(
        resume=True, model={"lora_dropout": 0.25}, max_steps=4, learning_rate=1e-3, merger_learning_rate=None
    )

    assert "learning_rate: 0.01 in the checkpoint, 0.001 in the configuration: the checkpoint's" in said
    assert (
        "merger_learning_rate: 0.003 in the checkpoint, 0.001 in the configuration: the checkpoint's" in said
    )
    assert seen.groups["merger"]["initial_lr"] == 3e-3


def test_the_schedule_is_the_configurations_from_the_checkpoints_rates(run):
    said, seen = run(
        resume=True,
        model={"lora_dropout": 0.25},
        max_steps=40,
        num_train_epochs=9,
        save_steps=100,
        warmup_steps=20,
        lr_scheduler_type="cosine",
        learning_rate=1.0,
    )

    for line in (
        "max_steps: 2 in the checkpoint, 40 in",
        "num_train_epochs: 3 in the checkpoint, 9 in",
        "warmup_steps: 1 in the checkpoint, 20 in",
        "lr_scheduler_type: linear in the checkpoint, cosine in",
    ):
        assert f"{line} the configuration: the configuration's is used" in said
    assert "cosine" in seen.schedule.func.__name__
    assert seen.schedule.keywords["num_warmup_steps"] == 20
    assert seen.schedule.keywords["num_training_steps"] == 40
    assert seen.groups["language"]["initial_lr"] == 0.01  # not 1.0
    # What is logged is the first group's, the merger's: the fourth step is 3 of 20 up to its saved 0.003. The
    # third has the rate that was saved.
    fourth = next(one for one in seen.state.log_history if one.get("step") == 4)
    assert fourth["learning_rate"] == pytest.approx(0.003 * 3 / 20)


def test_dropout_and_clipping_are_the_configurations(run):
    said, seen = run(resume=True, model={"lora_dropout": 0.5}, max_steps=4, max_grad_norm=0.5)

    assert (
        "lora_dropout: 0.25 in the checkpoint, 0.5 in the configuration: the configuration's is used" in said
    )
    assert "max_grad_norm: 2 in the checkpoint, 0.5 in the configuration: the configuration's is used" in said
    dropouts = {
        one.p for name, one in seen.trainer.model.named_modules() if isinstance(one, torch.nn.Dropout)
    }
    assert 0.5 in dropouts and 0.25 not in dropouts


def test_how_often_it_saves_is_the_configurations(run, tmp_path, caplog):
    """Trainer itself keeps to the checkpoint's number, and only warns."""
    _, seen = run(
        resume=True, model={"lora_dropout": 0.25}, max_steps=8, save_steps=3, logging_steps=4, eval_steps=5
    )

    assert (seen.state.save_steps, seen.state.logging_steps, seen.state.eval_steps) == (3, 4, 5)
    assert sorted(one.name for one in tmp_path.glob("checkpoint-*")) == [
        *("checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-6", "checkpoint-8"),
    ]


REFUSED = {
    "the type of products: saved with float32, now bfloat16": {"bf16": True},
    "seed: saved with 42, now 1": {"seed": 1},
    "data_seed: saved with none, now 1": {"data_seed": 1},
    "packs in a step: saved with 1, now 2": {"gradient_accumulation_steps": 2},
    "optim: saved with adamw_torch_fused, now adafactor": {"optim": "adafactor"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_would_make_it_another_run_is_refused(run, message):
    with pytest.raises(CheckpointError, match=message):
        run(resume=True, model={"lora_dropout": 0.25}, max_steps=4, **REFUSED[message])


def test_a_resume_without_the_settings_in_its_checkpoint_still_says_what_the_optimizer_has(run, tmp_path):
    """Checkpoints from before have none of them in their manifest."""
    import json

    from vlcpt.training.checkpoints.files import MANIFEST, write_manifest

    folder = tmp_path / "checkpoint-2"
    facts = json.loads((folder / MANIFEST).read_text())["run"]
    del facts["settings"], facts["precision"]
    (folder / MANIFEST).unlink()
    write_manifest(folder, facts)

    said, _ = run(resume=True, model={"lora_dropout": 0.5}, max_steps=4, learning_rate=1.0)

    assert "learning_rate: 0.01 in the checkpoint, 1 in the configuration: the checkpoint's is used" in said
    assert "lora_dropout" not in said
