"""Tests of vlcpt/training/features.py: training with ``vision_cache`` is training without."""

import pytest
import torch

from tests.support import TEN, Gradients, make_trainer
from vlcpt import CPTDataset, ModelConfig
from vlcpt.model.tuning import apply_tuning, base_model

IMAGES = [one for one in TEN if "images" in one and "videos" not in one]
VIDEOS = [one for one in TEN if "videos" in one and "images" not in one]
DATA = {"images": IMAGES, "videos": VIDEOS, "mixed": TEN}


def train(model, rows, processor, folder, *, packing=True, **settings):
    """Train; the losses and gradients of each step, and how often the tower was called in each."""
    calls, gradients = [0], Gradients()
    base_model(model).model.visual.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    dataset = CPTDataset(rows, processor, max_length=96 if packing else 128, packing=packing)
    trainer = make_trainer(
        model, dataset, processor, folder, callbacks=[gradients], learning_rate=1e-3, **settings
    )
    trainer.train()
    losses = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    return losses, gradients.steps, calls[0]


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()


@pytest.mark.parametrize("rows", DATA.values(), ids=DATA)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("way", ["packed", "unpacked", "lora"])
def test_losses_and_gradients_are_those_without_it_to_the_bit(
    make_tiny_model, tiny_processor, tmp_path, rows, size, way
):
    """Twice over the data: while the store is filled, and from it."""
    found = []
    for number, cache in enumerate((None, str(tmp_path / "cache"))):
        model = make_tiny_model()
        if way == "lora":
            torch.manual_seed(0)
            model = apply_tuning(model, ModelConfig("base"))
        else:
            model = apply_tuning(model, ModelConfig("base", tuning="full"))
        settings = {"per_device_train_batch_size": size, "vision_cache": cache, "num_train_epochs": 2}
        packing = way != "unpacked"
        folder = tmp_path / str(number)
        found.append(train(model, rows, tiny_processor, folder, packing=packing, **settings))

    (losses, gradients, calls), (kept_losses, kept_gradients, kept_calls) = found
    assert len(losses) >= 2
    assert kept_losses == losses
    assert all(same(one, other) for one, other in zip(gradients, kept_gradients, strict=True))
    assert 0 < kept_calls <= calls // 2
