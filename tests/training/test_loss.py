"""Tests of vlcpt/training/loss.py."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.support import FOUR, encode_rows, run_alone
from vlcpt import CPTDataCollator
from vlcpt.training.loss import target_losses, total_weight


class Table(nn.Module):
    """A model whose logits at a place depend on the token there alone."""

    def __init__(self, size=8):
        super().__init__()
        self.logits = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
        self.kept = 0

    def forward(self, input_ids, logits_to_keep):
        self.kept += int(logits_to_keep.sum())
        return SimpleNamespace(logits=self.logits[input_ids[logits_to_keep]])


INPUTS = {
    "input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]]),
    "labels": torch.tensor([[-100, 2, -100, 4], [-100, -100, 7, -100]]),
    "loss_weights": torch.tensor([[0, 0.5, 0, 1], [0, 0, 3, 0]]),
}


def test_a_target_is_predicted_from_the_token_before_it():
    model = Table()

    losses = target_losses(model, INPUTS)

    log = model.logits.log_softmax(1)
    assert losses.nll == pytest.approx([-float(log[1, 2]), -float(log[3, 4]), -float(log[6, 7])])
    assert losses.ids.tolist() == [2, 4, 7]
    assert losses.rows.tolist() == [0, 0, 1]
    assert losses.weights.tolist() == [0.5, 1, 3]
    assert model.kept == 3


def test_without_loss_weights_each_target_weighs_1():
    inputs = {key: value for key, value in INPUTS.items() if key != "loss_weights"}

    assert target_losses(Table(), inputs).weights.tolist() == [1, 1, 1]
    assert float(total_weight(inputs)) == 3


def test_the_total_weight_leaves_out_a_label_that_nothing_precedes():
    labels = INPUTS["labels"].clone()
    labels[:, 0] = 1
    weights = INPUTS["loss_weights"].clone()
    weights[:, 0] = 100

    assert float(total_weight({"labels": labels, "loss_weights": weights})) == 4.5


def test_a_batch_without_targets_has_no_losses():
    inputs = INPUTS | {"labels": torch.full((2, 4), -100)}

    assert len(target_losses(Table(), inputs).nll) == 0
    assert float(total_weight(inputs)) == 0


def test_bfloat16_logits_are_scored_in_float32():
    model = Table()
    model.logits = model.logits.bfloat16()

    losses = target_losses(model, INPUTS)

    assert losses.nll.dtype == torch.float32
    assert losses.nll[0] == -model.logits.float().log_softmax(1)[1, 2]


def test_a_real_model_gives_the_losses_of_its_full_logits(tiny_model, tiny_processor):
    samples = encode_rows(FOUR, tiny_processor)
    with torch.no_grad():
        losses = target_losses(tiny_model, CPTDataCollator(tiny_processor)(samples))
        alone = [run_alone(tiny_model, sample) for sample in samples]

    assert torch.allclose(losses.nll, torch.cat([one.nll for one in alone]), atol=1e-4)
    assert torch.equal(losses.weights, torch.cat([one.weights for one in alone]))
    assert len(losses.nll) == 63
