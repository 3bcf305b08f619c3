"""Tests of vlcpt/training/guards.py: numbers that go wrong stop a run."""

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from tests.support import make_trainer, row
from vlcpt import CPTDataset, ModelConfig, load_model
from vlcpt.training import trainer as trainer_module
from vlcpt.training.checkpoints.files import list_checkpoints
from vlcpt.training.guards import NotFiniteError
from vlcpt.training.loss import target_losses

ROWS = [
    {**row(f"one <trainable_text>two {number}</trainable_text>"), "id": f"page-{number}"}
    for number in range(6)
]


class Steps(TrainerCallback):
    """Counts steps of the optimizer, and keeps the weights that the last one left."""

    def __init__(self):
        self.count = 0
        self.weights = {}

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.count += 1
        self.weights = {name: one.detach().clone() for name, one in model.named_parameters()}


@pytest.fixture
def make(tiny_model, tiny_processor, tmp_path):
    def make(**settings):
        steps = Steps()
        dataset = CPTDataset(ROWS, tiny_processor, max_length=64, packing=False)
        defaults = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 1, "callbacks": [steps]}
        trainer = make_trainer(tiny_model, dataset, tiny_processor, tmp_path / "out", **(defaults | settings))
        return trainer, steps

    return make


def break_losses(monkeypatch, at, value):
    """Give micro-batch ``at`` a loss that is not finite; what was in it is told."""
    calls = []

    def losses(model, inputs, chunk):
        found = target_losses(model, inputs, chunk)
        calls.append(inputs["input_ids"])
        if len(calls) == at:
            return found._replace(nll=found.nll + value)
        return found

    monkeypatch.setattr(trainer_module, "target_losses", losses)
    return calls


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(
    make, monkeypatch, tmp_path, tiny_processor, value, accumulation
):
    """Added to the loss, an infinity leaves every gradient finite: the loss itself is looked at."""
    calls = break_losses(monkeypatch, 3, value)
    trainer, steps = make(gradient_accumulation_steps=accumulation)

    with pytest.raises(NotFiniteError) as raised:
        trainer.train()

    done = 2 // accumulation
    assert steps.count == done
    assert [one.name for one in list_checkpoints(tmp_path / "out")] == [
        f"checkpoint-{n + 1}" for n in range(done)
    ]
    document = tiny_processor.tokenizer.decode(calls[2][0])[len("one two ")]
    message = str(raised.value)
    assert message.startswith(
        f"step {done + 1}: the loss is {value} on rank 0, of page-{document}. Nothing of"
    )
    assert message.count("page-") == 1
    assert all(torch.equal(one, steps.weights[name]) for name, one in trainer.model.named_parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("max_grad_norm", [0, 1.0])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(make, value, max_grad_norm, tmp_path):
    trainer, steps = make(gradient_accumulation_steps=2, max_grad_norm=max_grad_norm)
    weight = trainer.model.lm_head.weight
    backwards = []

    def spoil(gradient):
        backwards.append(1)
        if len(backwards) == 3:
            gradient = gradient.clone()
            gradient[5, 5] = value
        return gradient

    weight.register_hook(spoil)
    with pytest.raises(
        NotFiniteError, match=r"step 2: the gradient is not finite, of page-\d, page-\d\. Nothing"
    ):
        trainer.train()

    assert steps.count == 1
    assert [one.name for one in list_checkpoints(tmp_path / "out")] == ["checkpoint-1"]
    assert all(one.isfinite().all() for one in trainer.model.parameters())


def test_a_gradient_too_large_for_its_norm_stops_the_run(make):
    """Clipping would make it zero, and the step would do nothing, silently."""
    trainer, steps = make()
    trainer.model.lm_head.weight.register_hook(lambda gradient: torch.full_like(gradient, 1e30))

    with pytest.raises(NotFiniteError, match="the gradient is not finite"):
        trainer.train()

    assert steps.count == 0


def test_a_weight_that_is_not_finite_is_never_saved(make, tmp_path):
    class Spoil(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                model.lm_head.weight.data[3, 3] = float("inf")

    trainer, _ = make(callbacks=[Spoil()])
    with pytest.raises(NotFiniteError, match=r"^lm_head.weight is not finite, so this model is not saved"):
        trainer.train()
    with pytest.raises(NotFiniteError, match=r"lm_head.weight is not finite"):
        trainer.save_model()

    assert [one.name for one in list_checkpoints(tmp_path / "out")] == ["checkpoint-1"]
    assert not (tmp_path / "out/model.safetensors").exists()


def test_watching_changes_no_bit(make, monkeypatch, make_tiny_model):
    watched, _ = make(save_strategy="no")
    watched.train()
    found = {name: one.detach().clone() for name, one in watched.model.named_parameters()}
    watched.model.load_state_dict(make_tiny_model().state_dict())
    plain, _ = make(save_strategy="no")
    monkeypatch.setattr(plain._finite, "watched", lambda loss: loss)
    plain.train()

    assert all(torch.equal(one, found[name]) for name, one in plain.model.named_parameters())
    assert not torch.equal(found["lm_head.weight"], make_tiny_model().lm_head.weight)


def test_evaluation_batches_reach_the_model_without_names(make, tiny_processor):
    held_out = CPTDataset(ROWS, tiny_processor, max_length=64)
    trainer, _ = make(eval_dataset=held_out)

    assert trainer.evaluate()["eval_targets"] > 0


def test_the_model_of_the_docstring_is_checked_by_its_trained_weights_alone():
    from vlcpt.training.guards import require_finite

    layer = nn.Linear(2, 2)
    layer.bias.data.fill_(float("nan"))
    layer.bias.requires_grad_(False)

    require_finite(layer)


def test_weights_that_were_not_finite_before_step_1_are_named_and_no_document_is(
    tiny_model_dir, tiny_processor, tmp_path
):
    model = load_model(ModelConfig(str(tiny_model_dir), lora_r=4))
    frozen = "base_model.model.model.visual.merger.mlp.0.weight"
    with torch.no_grad():
        model.get_parameter(frozen)[0, 0] = float("nan")
    dataset = CPTDataset(ROWS, tiny_processor, max_length=128)

    with pytest.raises(NotFiniteError, match=f"^{frozen} is not finite before step 1, so no document"):
        make_trainer(model, dataset, tiny_processor, tmp_path).train()
