"""Tests of vlcpt/training/blank_images.py: an evaluation in training says how far text relies on images."""

import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import EvalPrediction

from tests.support import make_trainer
from tests.training.test_evaluate import SEEN, with_one_cut
from vlcpt import CPTDataset, ModelConfig, load_model
from vlcpt.errors import ConfigError
from vlcpt.model.tuning import apply_tuning
from vlcpt.training.blank_images import sums_with_blank
from vlcpt.training.evaluate import EvalOptions, evaluate_sets, trainer_metrics

RELIANCE = {"eval_blank_images_loss", "eval_reliance"}


@pytest.fixture(scope="module")
def model(make_tiny_model):
    return make_tiny_model().eval()


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_it_is_what_vlcpt_eval_measures(model, tiny_processor, tmp_path, batch_size, packing):
    dataset = CPTDataset(SEEN, tiny_processor, max_length=64, packing=packing)
    trainer = make_trainer(model, None, tiny_processor, tmp_path, per_device_eval_batch_size=batch_size)

    metrics = trainer.evaluate(dataset)
    found = evaluate_sets(model, {"seen": dataset}, tiny_processor, EvalOptions(batch_size=batch_size))[
        "seen"
    ]

    assert metrics["eval_blank_images_loss"] == pytest.approx(found["blank_images_loss"], abs=1e-5)
    assert metrics["eval_reliance"] == pytest.approx(found["reliance"]["nats_per_target"], abs=1e-5)
    assert metrics["eval_reliance"] == pytest.approx(
        metrics["eval_blank_images_loss"] - metrics["eval_loss"], abs=1e-9
    )
    assert abs(metrics["eval_reliance"]) > 0.01


def test_a_model_that_ignores_images_relies_on_them_by_nothing(make_tiny_model, tiny_processor, tmp_path):
    blind = make_tiny_model()
    with torch.no_grad():  # all images look alike to it
        for parameter in blind.model.visual.merger.mlp[2].parameters():
            parameter.zero_()
    dataset = CPTDataset(SEEN, tiny_processor, max_length=64)

    metrics = make_trainer(blind, None, tiny_processor, tmp_path).evaluate(dataset)

    assert metrics["eval_reliance"] == pytest.approx(0, abs=1e-6)


def test_it_is_absent_where_there_is_nothing_to_see_and_where_it_is_turned_off(
    model, tiny_processor, tmp_path
):
    seen, text = (CPTDataset(rows, tiny_processor, max_length=64) for rows in (SEEN, [SEEN[1]]))

    found = [
        make_trainer(model, None, tiny_processor, tmp_path, **settings).evaluate(dataset).keys()
        for dataset, settings in ((seen, {}), (text, {}), (seen, {"eval_blank_images": False}))
    ]

    assert found[0] - found[1] == found[0] - found[2] == RELIANCE


def test_a_batch_without_media_goes_through_the_model_once(model, tiny_processor, tmp_path):
    trainer = make_trainer(model, None, tiny_processor, tmp_path)
    texts = CPTDataset([SEEN[1]], tiny_processor, max_length=64)
    batch = trainer.data_collator([texts[0]])
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))

    with torch.no_grad():
        sums = sums_with_blank(model, batch, trainer.args, dict)
    hook.remove()

    assert len(calls) == 1
    assert sums[0, 0] == sums[0, 2] > 0


def test_a_document_that_cannot_be_read_is_on_neither_side(model, tiny_processor, tmp_path):
    dataset = with_one_cut(tmp_path, tiny_processor, max_bad_fraction=0.4)

    metrics = make_trainer(model, None, tiny_processor, tmp_path).evaluate(dataset)
    found = evaluate_sets(model, {"set": dataset}, tiny_processor)["set"]

    assert len(dataset.failures) == 1
    assert metrics["eval_reliance"] == pytest.approx(found["reliance"]["nats_per_target"], abs=1e-5)
    assert abs(metrics["eval_reliance"]) > 1e-3


def test_with_features_that_are_kept_it_is_the_same(make_tiny_model, tiny_processor, tmp_path):
    """First while the cache is filled, then from it, where the batch has no pixels at all."""
    frozen = apply_tuning(make_tiny_model(), ModelConfig("base"))
    dataset = CPTDataset(SEEN, tiny_processor, max_length=64)
    expected = make_trainer(frozen, None, tiny_processor, tmp_path / "a").evaluate(dataset)

    trainer = make_trainer(
        frozen,
        None,
        tiny_processor,
        tmp_path / "b",
        eval_dataset=dataset,
        vision_cache=str(tmp_path / "kept"),
    )
    found = [trainer.evaluate() for _ in range(2)]

    kept = [sample for number in range(len(dataset)) for sample in dataset[number]]
    assert all(one.pixel_values is None and one.pixel_values_videos is None for one in kept)
    for one in found:
        for name in ("eval_loss", *RELIANCE):
            assert one[name] == pytest.approx(expected[name], abs=1e-6)
    assert abs(expected["eval_reliance"]) > 0.01


def test_two_sets_whose_numbers_would_have_one_name_are_refused(model, tiny_processor, tmp_path):
    dataset = CPTDataset([SEEN[1]], tiny_processor, max_length=64)
    sets = {"a": dataset, "a_blank_images": dataset}

    with pytest.raises(ConfigError, match="'a' and 'a_blank_images' would be logged under one name"):
        make_trainer(model, None, tiny_processor, tmp_path, eval_dataset=sets)
    make_trainer(
        model, None, tiny_processor, tmp_path, eval_dataset=sets, eval_blank_images=False
    )  # each name is of one set


def test_trackers_and_the_history_get_what_the_log_gets(tiny_model_dir, tiny_processor, tmp_path):
    dataset = CPTDataset(SEEN, tiny_processor, max_length=64)
    model = load_model(ModelConfig(str(tiny_model_dir), lora_r=4))
    settings = {"eval_dataset": {"s": dataset}, "max_steps": 2, "report_to": ["tensorboard"]}
    trainer = make_trainer(
        model,
        dataset,
        tiny_processor,
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        **settings,
    )

    trainer.train()

    curve = [
        (one["step"], one["eval_s_reliance"]) for one in trainer.state.log_history if "eval_s_loss" in one
    ]
    assert [step for step, _ in curve] == [0, 1, 2]
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    seen = EventAccumulator(str(events.parent)).Reload().Scalars("eval/s_reliance")
    assert [one.step for one in seen] == [0, 1, 2]
    assert [one.value for one in seen] == pytest.approx([value for _, value in curve], rel=1e-5)


def test_the_terminal_shows_it_beside_the_loss(model, tiny_processor, tmp_path, capsys):
    dataset = CPTDataset(SEEN, tiny_processor, max_length=64)
    trainer = make_trainer(model, None, tiny_processor, tmp_path, eval_dataset={"seen": dataset})

    metrics = trainer.evaluate()

    shown = re.findall(r"evaluation  seen ([\d.]+) \(reliance ([+-][\d.]+)\)", capsys.readouterr().out)
    assert shown == [(f"{metrics['eval_seen_loss']:.4f}", f"{metrics['eval_seen_reliance']:+.4f}")]


def test_metrics_of_rows_with_blank_images():
    rows = torch.tensor([[2.0, 1.0, 3.0], [4.0, 2.0, 6.0]]).numpy()

    metrics = trainer_metrics(EvalPrediction(predictions=rows, label_ids=rows))

    assert (metrics["loss"], metrics["blank_images_loss"], metrics["reliance"]) == (2.0, 3.0, 1.0)
