"""Tests of vlcpt/training/features.py: training with ``vision_cache`` is training without."""

import pytest
import torch

from tests.invariants.test_device_looks import Looks
from tests.support import FOUR, TEN, Gradients, make_trainer
from vlcpt import CPTConfig, CPTDataset, CPTTrainer, ModelConfig, load_model
from vlcpt.errors import ConfigError
from vlcpt.model.tuning import apply_tuning, base_model
from vlcpt.training.order import PackOrder
from vlcpt.training.step import sent

pytestmark = pytest.mark.usefixtures("one_thread")

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
@pytest.mark.parametrize("way", ["packed", "unpacked", "lora", "qlora"])
def test_losses_and_gradients_are_those_without_it_to_the_bit(
    tiny_model_dir, tiny_processor, tmp_path, rows, size, way
):
    """Twice over the data: while the store is filled, and from it."""
    found = []
    for number, cache in enumerate((None, str(tmp_path / "cache"))):
        torch.manual_seed(0)  # adapters are drawn
        tuning = way if "lora" in way else "full"
        model = load_model(ModelConfig(str(tiny_model_dir), tuning=tuning))
        settings = {"per_device_train_batch_size": size, "vision_cache": cache, "num_train_epochs": 2}
        packing = way != "unpacked"
        folder = tmp_path / str(number)
        found.append(train(model, rows, tiny_processor, folder, packing=packing, **settings))

    (losses, gradients, calls), (kept_losses, kept_gradients, kept_calls) = found
    assert len(losses) >= 2
    assert kept_losses == losses
    assert all(same(one, other) for one, other in zip(gradients, kept_gradients, strict=True))
    assert 0 < kept_calls <= calls // 2


def test_a_resumed_run_with_a_cache_ends_as_one_without_an_interruption(
    make_tiny_model, tiny_processor, tmp_path
):
    weights = []
    for number, stop in enumerate((None, 3)):
        folder = tmp_path / str(number)
        settings = {"vision_cache": str(folder / "cache"), "save_strategy": "steps", "save_steps": 3}
        for steps in filter(None, (stop, 6)):
            model = apply_tuning(make_tiny_model(), ModelConfig("base", tuning="full"))
            dataset = CPTDataset(TEN, tiny_processor, max_length=96)
            settings |= {"max_steps": steps, "lr_scheduler_type": "constant"}
            trainer = make_trainer(model, dataset, tiny_processor, folder, **settings)
            trainer.train(resume_from_checkpoint=steps == 6 and stop is not None)
        weights.append(dict(model.named_parameters()))

    assert same(*weights)


def test_an_evaluation_in_training_takes_features_too(make_tiny_model, tiny_processor, tmp_path):
    found = []
    for cache in (None, str(tmp_path / "cache")):
        model = apply_tuning(make_tiny_model(), ModelConfig("base", tuning="full"))
        dataset, held_out = (CPTDataset(rows, tiny_processor, max_length=128) for rows in (FOUR, TEN))
        trainer = make_trainer(
            *(model, dataset, tiny_processor, tmp_path),
            eval_dataset=held_out,
            vision_cache=cache,
            eval_blank_images=False,  # blank ones go through the tower
        )
        trainer.evaluate()
        calls = []
        model.model.visual.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found.append((trainer.evaluate()["eval_loss"], len(calls)))

    assert found[0][0] == found[1][0]
    assert found[0][1] > 0 == found[1][1]


def test_features_of_one_patch_embedding_are_not_used_beside_the_other(
    make_tiny_model, tiny_processor, tmp_path
):
    """Their products are rounded differently, so losses would not be those without a cache to the bit."""
    losses = []
    for number, cache in enumerate((None, "cache", "cache")):
        model = apply_tuning(make_tiny_model(), ModelConfig("base"))
        way = {"vision_cache": cache and str(tmp_path / cache), "max_steps": 2, "packing": False}
        way["patch_embedding"] = "conv" if number == 1 else "linear"
        losses.append(train(model, IMAGES, tiny_processor, tmp_path / str(number), **way)[0])

    assert losses[2] == losses[0]


MORE_WAYS = {
    "bf16": {"bf16": True},
    "workers": {"dataloader_num_workers": 2},
    "checkpointing": {"activation_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("settings", MORE_WAYS.values(), ids=MORE_WAYS)
def test_losses_are_those_without_it_however_it_trains(make_tiny_model, tiny_processor, tmp_path, settings):
    found = []
    for number, cache in enumerate((None, str(tmp_path / "cache"))):
        torch.manual_seed(0)
        model = apply_tuning(make_tiny_model(), ModelConfig("base"))
        way = {"vision_cache": cache, "num_train_epochs": 2, **settings}
        found.append(train(model, TEN, tiny_processor, tmp_path / str(number), **way))

    assert found[0][0] == found[1][0]
    assert found[1][2] < found[0][2]


def test_features_that_are_kept_make_no_batch_wait_for_the_device(
    make_tiny_model, tiny_processor, tmp_path, monkeypatch
):
    model = apply_tuning(make_tiny_model(), ModelConfig("base"))
    dataset, cache = CPTDataset(TEN, tiny_processor, max_length=70), str(tmp_path / "cache")
    trainer = make_trainer(model, dataset, tiny_processor, tmp_path, num_train_epochs=1, vision_cache=cache)
    trainer.train()
    collator = trainer.data_collator
    batches = [sent(collator([item]), torch.device("cpu"), collator.scales) for item in dataset]
    assert sum("media" in batch for batch in batches) > 2
    looks = Looks(monkeypatch)

    with looks:
        for batch in batches:
            trainer.compute_loss(model, batch, num_items_in_batch=torch.ones(())).backward()

    assert not looks.ours


@pytest.mark.parametrize("tower", ["vision", "merger"])
def test_a_tower_that_trains_is_refused_in_python_too(make_tiny_model, tiny_processor, tmp_path, tower):
    model = apply_tuning(make_tiny_model(), ModelConfig("base", **{f"train_{tower}": True}))
    dataset = CPTDataset(FOUR, tiny_processor, max_length=128)

    with pytest.raises(ConfigError, match=r"trains or has an adapter.*remove vision_cache"):
        make_trainer(model, dataset, tiny_processor, tmp_path, vision_cache=str(tmp_path))


def test_ranks_are_not_balanced_by_a_tower_that_is_not_called(make_tiny_model, tmp_path):
    model, costs = make_tiny_model(), []
    for cache in (None, str(tmp_path)):
        args = CPTConfig(str(tmp_path), use_cpu=True, balance_ranks=True, vision_cache=cache)
        costs.append(PackOrder(model, args).state)

    assert costs[0]["media"] > 0
    assert costs[1] == costs[0] | {"media": 0.0, "frame_pair": 0.0}


def test_another_collator_is_refused(make_tiny_model, tiny_processor, tmp_path):
    args = CPTConfig(str(tmp_path), use_cpu=True, vision_cache=str(tmp_path))
    dataset = CPTDataset(FOUR, tiny_processor, max_length=128)
    model = make_tiny_model().requires_grad_(False)

    with pytest.raises(ConfigError, match="vision_cache needs a CPTDataCollator"):
        CPTTrainer(model, args, train_dataset=dataset, data_collator=list)


def test_a_data_set_that_is_used_again_without_a_cache_has_pixels_again(
    make_tiny_model, tiny_processor, tmp_path
):
    dataset = CPTDataset(FOUR, tiny_processor, max_length=128)
    model = apply_tuning(make_tiny_model(), ModelConfig("base"))
    make_trainer(model, dataset, tiny_processor, tmp_path, vision_cache=str(tmp_path / "cache")).train()
    assert any(sample.media for number in range(len(dataset)) for sample in dataset[number])

    make_trainer(model, dataset, tiny_processor, tmp_path)

    assert not any(sample.media for number in range(len(dataset)) for sample in dataset[number])


@pytest.mark.parametrize("cached", [True, False])
def test_under_zero_3_a_set_of_media_that_was_not_given_at_the_start_is_refused(
    make_tiny_model, tiny_processor, tmp_path, monkeypatch, cached
):
    """No rank would know that a batch without an image needs a filler."""
    given = CPTDataset(IMAGES if cached else VIDEOS, tiny_processor, max_length=96)
    settings = {"vision_cache": tmp_path / "cache"} if cached else {}
    monkeypatch.setattr("vlcpt.training.step.asked_stage", lambda args: 3)
    trainer = make_trainer(
        make_tiny_model().requires_grad_(False), given, tiny_processor, tmp_path, **settings
    )
    new, text = (CPTDataset(rows, tiny_processor, max_length=96) for rows in (IMAGES, [{"text": "one two"}]))

    with pytest.raises(ConfigError, match=r"has images, .* Give it as eval_dataset"):
        trainer.evaluate(new)
    assert trainer.evaluate(given)["eval_targets"] > 0
    assert trainer.evaluate(text)["eval_targets"] > 0
