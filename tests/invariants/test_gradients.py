"""Invariant 4: the gradient of a step depends on its documents only."""

import copy
import itertools
from functools import cache

import pytest
import torch

from tests.published import PROCESSOR_LAYOUTS, REAL
from tests.support import (
    FOUR,
    FOUR_TARGETS,
    TEN,
    Gradients,
    encode_rows,
    largest_deviation,
    make_trainer,
    run_alone,
    weighted_mean,
)
from vlcpt import CPTDataset, ModelConfig, load_model

EVERYTHING = {"dtype": "float32", "tuning": "full", "train_merger": True, "train_vision": True}

# rows, max_length, packing, packs, batch size, accumulation
STEPS = {
    "padded 4x1": (FOUR, 128, False, 4, 4, 1),
    "padded 1x4": (FOUR, 128, False, 4, 1, 4),
    "padded 2x2": (FOUR, 128, False, 4, 2, 2),
    "one pack": (FOUR, 256, True, 1, 1, 1),
    "two packs 2x1": (FOUR, 100, True, 2, 2, 1),
    "two packs 1x2": (FOUR, 100, True, 2, 1, 2),
    "packed 4x1": (TEN, 70, True, 4, 4, 1),
    "packed 1x4": (TEN, 70, True, 4, 1, 4),
    "packed 2x2": (TEN, 70, True, 4, 2, 2),
}


@pytest.fixture(scope="module")
def computed(tiny_model_dir, tiny_processor):
    """A function that gives a model, and loss and gradient of documents that it computed one by one."""

    @cache
    def compute(attention, count):
        model = load_model(ModelConfig(str(tiny_model_dir), attn_implementation=attention, **EVERYTHING))
        samples = encode_rows(TEN[:count], tiny_processor)
        loss = weighted_mean([run_alone(model, sample) for sample in samples])
        loss.backward()
        gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        return model, float(loss.detach()), gradient

    def get(attention, rows):
        model, loss, gradient = compute(attention, len(rows))  # FOUR are the first of TEN
        return copy.deepcopy(model), loss, gradient

    return get


@pytest.mark.parametrize("layout", PROCESSOR_LAYOUTS, indirect=True)
def test_the_four_documents_have_15_1_40_and_7_targets(tiny_processor):
    found = [int((sample.labels != -100).sum()) for sample in encode_rows(FOUR, tiny_processor)]

    assert found == FOUR_TARGETS


@pytest.mark.parametrize(
    ("layout", "step", "attention"),
    [
        *itertools.product(("saved",), STEPS, ("sdpa", "eager")),
        # How a base lies on disk and the division of a step meet in no line of code: every pair once.
        *zip(itertools.repeat("3B"), STEPS, itertools.cycle(("sdpa", "eager"))),
        *zip(itertools.repeat("7B"), STEPS, itertools.cycle(("eager", "sdpa"))),
        pytest.param(REAL, "packed 2x2", "sdpa", marks=pytest.mark.slow),
    ],
    indirect=["layout"],
)
def test_a_step_has_the_gradient_of_its_documents_computed_one_by_one(
    computed, tiny_processor, tmp_path, step, attention
):
    rows, max_length, packing, packs, batch_size, accumulation = STEPS[step]
    model, loss, expected = computed(attention, rows)
    dataset = CPTDataset(rows, tiny_processor, max_length=max_length, packing=packing)
    assert len(dataset) == packs
    assert not packing or len(rows) > packs
    gradients = Gradients()

    trainer = make_trainer(
        model,
        dataset,
        tiny_processor,
        tmp_path,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        max_grad_norm=0,
        learning_rate=0,
        callbacks=[gradients],
    )
    trainer.train()

    assert len(gradients.steps) == 1
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    assert largest_deviation(gradients.steps[0], expected) < 1e-5
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(loss, rel=1e-5)


def test_an_equal_weight_for_every_document_would_be_seen(tiny_model, tiny_processor):
    """Or the comparison above proves nothing: a mean of means has another gradient."""
    alone = [run_alone(tiny_model, sample) for sample in encode_rows(FOUR, tiny_processor)]
    named = dict(tiny_model.named_parameters())

    right = torch.autograd.grad(weighted_mean(alone), named.values(), retain_graph=True)
    mean_of_means = torch.stack([one.nll.mean() for one in alone]).mean()
    wrong = torch.autograd.grad(mean_of_means, named.values())

    difference = largest_deviation(dict(zip(named, wrong, strict=True)), dict(zip(named, right, strict=True)))
    assert difference > 0.1


@pytest.mark.parametrize("layout", ["saved", "3B", "7B"], indirect=True)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "activation checkpointing"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("train_merger", [False, True], ids=["language", "language and merger"])
def test_a_frozen_tower_runs_once_a_step_and_never_backward(
    tiny_model_dir, tiny_processor, tmp_path, checkpointing, tuning, train_merger
):
    model = load_model(ModelConfig(str(tiny_model_dir), tuning=tuning, train_merger=train_merger))
    base = model.get_base_model() if tuning == "lora" else model
    calls = dict.fromkeys(("vision", "vision output", "language", "vision backward", "language backward"), 0)

    def count(name):
        def hook(module, args, output):
            calls[name] += 1
            if output.requires_grad:
                output.register_hook(lambda gradient: calls.__setitem__(f"{name} backward", 1))

        return hook

    visual = base.model.visual
    visual.register_forward_hook(lambda *_: calls.__setitem__("vision output", calls["vision output"] + 1))
    # The first layer inside a block: when a block is run again, torch stops before the end.
    visual.blocks[-1].norm1.register_forward_hook(count("vision"))
    base.model.language_model.layers[-1].input_layernorm.register_forward_hook(count("language"))
    # Images alone: transformers runs the tower a second time for videos.
    rows = [one for one in TEN if "images" in one and "videos" not in one]
    dataset = CPTDataset(rows, tiny_processor, max_length=128)
    assert len(dataset) == 1

    make_trainer(
        model,
        dataset,
        tiny_processor,
        tmp_path,
        max_steps=3,
        activation_checkpointing=checkpointing,
        learning_rate=1e-3,
    ).train()

    assert calls["vision"] == calls["vision output"] == 3
    assert calls["vision backward"] == 0
    # The language tower is run again where its activations were not kept, or this counts nothing.
    assert calls["language"] == (6 if checkpointing else 3)
    assert calls["language backward"] == 1
