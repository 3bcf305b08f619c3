"""Tests of vlcpt/training/evaluate.py, and of CPTTrainer.evaluate."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from tests.processes import run_on_ranks
from tests.support import FOUR, TEN, avi, digits, encode_rows, make_trainer, png, row, run_alone
from tests.training.measuring_rank import BATCH_SIZES
from vlcpt import CPTDataset, ModelConfig, load_model
from vlcpt.data.plan.ledger import BadDataError
from vlcpt.model.tuning import base_model
from vlcpt.training import evaluate
from vlcpt.training import evaluate as evaluate_module
from vlcpt.training.evaluate import EvalOptions, evaluate_sets, score_sets, trainer_metrics
from vlcpt.training.scores import perplexity
from vlcpt.training.step import sent


def mean_nll(model, samples):
    """Σ nll / Σ targets, each document alone, weights left out."""
    with torch.no_grad():
        nll = torch.cat([run_alone(model, sample).nll for sample in samples]).double()
    return float(nll.mean())


@pytest.fixture(scope="module")
def model(make_tiny_model):
    return make_tiny_model().eval()


@pytest.fixture(scope="module")
def loss_of_ten(model, tiny_processor):
    return mean_nll(model, encode_rows(TEN, tiny_processor))


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_loss_moves_with_neither_batch_size_nor_packing(
    model, tiny_processor, tmp_path, loss_of_ten, batch_size, packing
):
    dataset = CPTDataset(TEN, tiny_processor, max_length=70, packing=packing)
    trainer = make_trainer(model, None, tiny_processor, tmp_path, per_device_eval_batch_size=batch_size)

    metrics = trainer.evaluate(dataset)
    scored = evaluate_sets(model, {"ten": dataset}, tiny_processor, EvalOptions(batch_size=batch_size))["ten"]

    assert metrics["eval_loss"] == pytest.approx(loss_of_ten, rel=1e-6)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(loss_of_ten), rel=1e-5)
    assert metrics["eval_targets"] == scored["targets"] == dataset.ledger.total.tokens["targets"]
    assert scored["loss"] == pytest.approx(loss_of_ten, rel=1e-6)


def test_the_mean_of_batch_means_is_another_number(model, tiny_processor, loss_of_ten):
    """Or the comparison above proves nothing."""
    samples = encode_rows(TEN, tiny_processor)

    means = [mean_nll(model, [sample]) for sample in samples]

    assert abs(sum(means) / len(means) / loss_of_ten - 1) > 0.01


def test_each_set_of_several_has_its_own_metrics(model, tiny_processor, tmp_path):
    rows = {"new": TEN[:6], "old": TEN[6:]}
    sets = {name: CPTDataset(rows[name], tiny_processor, max_length=70) for name in rows}
    trainer = make_trainer(
        model, None, tiny_processor, tmp_path, per_device_eval_batch_size=2, eval_dataset=sets
    )

    metrics = trainer.evaluate()

    for name in rows:
        expected = mean_nll(model, encode_rows(rows[name], tiny_processor))
        assert metrics[f"eval_{name}_loss"] == pytest.approx(expected, rel=1e-6)
        assert metrics[f"eval_{name}_targets"] == sets[name].ledger.total.tokens["targets"]


def test_evaluation_leaves_the_models_mode_as_it_was(make_tiny_model, tiny_processor):
    model = make_tiny_model().train()

    evaluate_sets(model, {"one": CPTDataset(FOUR[:1], tiny_processor, max_length=70)}, tiny_processor)

    assert model.training


# One image or clip a document, all of one size, so that pixels can be handed on without resizing.
SEEN = [
    row(f"<image>a<trainable_text>{digits(6, 1)}</trainable_text>", images=[png(1)]),
    row(f"no image <trainable_text>{digits(9, 2)}</trainable_text>"),
    row(f"b <image><trainable_text>{digits(3, 3)}</trainable_text>", images=[png(2)]),
    row(f"<video>c<trainable_text>{digits(4, 4)}</trainable_text>", videos=[avi(1)]),
    row(f"<image><video>d<trainable_text>{digits(8, 5)}</trainable_text>", images=[png(3)], videos=[avi(2)]),
]


def test_shuffled_and_blank_images_are_measured_on_swapped_pixels(model, tiny_processor):
    dataset = CPTDataset(SEEN, tiny_processor, max_length=64)
    samples = encode_rows(SEEN, tiny_processor)
    fields = ("pixel_values", "pixel_values_videos")
    shuffled, blank = list(samples), list(samples)
    for field in fields:
        having = [number for number, sample in enumerate(samples) if getattr(sample, field) is not None]
        assert len(having) >= 2
        for place, number in enumerate(having):
            following = getattr(samples[having[(place + 1) % len(having)]], field)
            shuffled[number] = replace(shuffled[number], **{field: following})
            blank[number] = replace(blank[number], **{field: torch.zeros_like(following)})

    result = evaluate_sets(model, {"seen": dataset}, tiny_processor, EvalOptions(batch_size=2))["seen"]

    expected = [mean_nll(model, found) for found in (samples, shuffled, blank)]
    names = ("loss", "shuffled_images_loss", "blank_images_loss")
    assert [result[name] for name in names] == pytest.approx(expected, rel=1e-6)
    assert np.ptp(expected) > 0.01
    assert result["base_loss"] is None
    assert result["perplexity"] == pytest.approx(math.exp(expected[0]), rel=1e-5)


def test_another_documents_image_is_brought_to_the_grid(model, tiny_processor):
    rows = [
        row(f"<image>a<trainable_text>{digits(6, 1)}</trainable_text>", images=[png(1, 56, 84)]),
        row(f"<image>b<trainable_text>{digits(6, 2)}</trainable_text>", images=[png(2, 140, 56)]),
    ]
    dataset = CPTDataset(rows, tiny_processor, max_length=64, packing=False)
    swapped = dataset.with_pixels_of("next_document")

    for number in range(2):
        (own,), (other,) = dataset[number], swapped[number]
        assert torch.equal(own.image_grid_thw, other.image_grid_thw)
        assert own.pixel_values.shape == other.pixel_values.shape
        assert not torch.allclose(own.pixel_values, other.pixel_values)
    result = evaluate_sets(model, {"two": dataset}, tiny_processor)["two"]
    assert result["shuffled_images_loss"] != result["loss"]


def test_without_images_or_another_document_there_is_nothing_to_swap(model, tiny_processor):
    text = CPTDataset([SEEN[1]], tiny_processor, max_length=64)
    lone = CPTDataset([SEEN[0], SEEN[1]], tiny_processor, max_length=64)

    results = evaluate_sets(model, {"text": text, "lone": lone}, tiny_processor)

    assert results["text"]["shuffled_images_loss"] is results["text"]["blank_images_loss"] is None
    assert results["lone"]["shuffled_images_loss"] is None
    assert results["lone"]["blank_images_loss"] is not None


@pytest.mark.parametrize("way", [{}, {"train_merger": True, "lora_towers": ["language"]}], ids=str)
def test_the_base_of_an_adapter_is_measured_with_the_adapter_off(
    model, tiny_model_dir, tiny_processor, tmp_path, way
):
    dataset = CPTDataset(SEEN, tiny_processor, max_length=64)
    tuned = load_model(ModelConfig(str(tiny_model_dir), lora_r=4, **way))
    make_trainer(tuned, dataset, tiny_processor, tmp_path, max_steps=3, learning_rate=3e-2).train()

    result = evaluate_sets(tuned, {"seen": dataset}, tiny_processor)["seen"]

    samples = encode_rows(SEEN, tiny_processor)
    assert result["base_loss"] == pytest.approx(mean_nll(model, samples), rel=1e-6)
    assert result["loss"] == pytest.approx(mean_nll(tuned.eval(), samples), rel=1e-6)
    assert abs(result["base_loss"] - result["loss"]) > 0.1
    without = evaluate_sets(tuned, {"seen": dataset}, tiny_processor, with_base=False)["seen"]
    assert without["base_loss"] is None


def test_the_base_of_a_model_trained_in_full_is_the_one_given(model, make_tiny_model, tiny_processor):
    dataset = CPTDataset(SEEN, tiny_processor, max_length=64)
    base = make_tiny_model(seed=3)

    result = evaluate_sets(model, {"seen": dataset}, tiny_processor, base=base)["seen"]

    expected = mean_nll(base.eval(), encode_rows(SEEN, tiny_processor))
    assert result["base_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("max_length", [24, 70], ids=["split", "packed"])
def test_each_document_has_its_own_loss_however_it_is_packed_or_split(model, tiny_processor, max_length):
    dataset = CPTDataset(TEN, tiny_processor, max_length=max_length)
    assert len(dataset) != len(TEN)
    alone = CPTDataset(TEN, tiny_processor, max_length=max_length, packing=False)

    scores = score_sets(model, {"ten": dataset}, tiny_processor, EvalOptions(batch_size=2))["ten"]

    found = [scores.document(number, has_media=True) for number in range(len(TEN))]
    parts = {number: [] for number in range(len(TEN))}
    for index in range(len(alone)):
        (number,) = alone.document_numbers(index)
        parts[number] += alone[index]
    for number, samples in parts.items():
        assert found[number]["loss"] == pytest.approx(mean_nll(model, samples), rel=1e-5)
    assert sum(one["targets"] for one in found) == dataset.ledger.total.tokens["targets"]
    assert scores.result()["documents"] == len(TEN)


def test_an_untouched_adapter_has_learnt_exactly_nothing(tiny_model_dir, tiny_processor):
    dataset = CPTDataset(TEN, tiny_processor, max_length=70)
    untouched = load_model(ModelConfig(str(tiny_model_dir), **FROZEN))

    result = evaluate_sets(untouched, {"ten": dataset}, tiny_processor)["ten"]

    assert result["base_loss"] == result["loss"]
    assert result["intervals"]["learnt"] == [0.0, 0.0]


def test_a_model_that_ignores_images_relies_on_them_by_nothing(make_tiny_model, tiny_processor):
    blind = make_tiny_model()
    with torch.no_grad():  # all images look alike to it
        for parameter in blind.model.visual.merger.mlp[2].parameters():
            parameter.zero_()
    dataset = CPTDataset(SEEN * 2, tiny_processor, max_length=64)

    result = evaluate_sets(blind, {"seen": dataset}, tiny_processor)["seen"]

    for name in ("shuffled", "blank"):
        assert abs(result[f"{name}_images_loss"] - result["loss"]) < 1e-6
        low, high = result["intervals"][name]
        assert -0.01 < low <= 0 <= high < 0.01


def test_a_document_that_cannot_be_read_is_in_no_sum(model, tiny_processor, tmp_path):
    rows = []
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(png(number))
        rows.append({"text": f"<image>{digits(8, number)}", "images": [f"{number}.png"]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    skips = {"on_bad_data": "skip", "max_bad_fraction": 0.5}
    dataset = CPTDataset(tmp_path / "rows.jsonl", tiny_processor, max_length=64, **skips)
    cut = tmp_path / "3.png"
    cut.write_bytes(cut.read_bytes()[:60])  # its header is whole

    scores = score_sets(model, {"six": dataset}, tiny_processor)["six"]

    result = scores.result()
    assert result["documents"] == 5
    assert scores.document(3, has_media=True) is None
    assert scores.document(2, has_media=True)["shuffled_images_loss"] is None  # which would show 3.png
    others = [scores.document(number, has_media=True) for number in (0, 1, 2, 4, 5)]
    targets = sum(one["targets"] for one in others)
    assert result["loss"] == pytest.approx(sum(one["loss"] * one["targets"] for one in others) / targets)


def test_bits_per_byte_are_of_the_text_without_end_of_text(model, tiny_processor):
    texts = [" naïve", "中文。", "🧑‍🔬 and 12"]
    rows = [row(f"A:<trainable_text>{text}</trainable_text>") for text in texts]
    dataset = CPTDataset(rows, tiny_processor, max_length=64)
    eos = tiny_processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    nll = 0.0
    with torch.no_grad():
        for sample in encode_rows(rows, tiny_processor):
            alone = run_alone(model, sample)
            assert alone.ids[-1] == eos
            nll += float(alone.nll[:-1].sum())

    result = evaluate_sets(model, {"texts": dataset}, tiny_processor)["texts"]

    size = sum(len(text.encode()) for text in texts)
    assert result["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-6)


def test_each_set_is_tracked_under_its_name_and_read_once(model, tiny_processor):
    seen = []

    def track(batches, description):
        seen.append([description, 0])
        for batch in batches:
            seen[-1][1] += 1
            yield batch

    dataset = CPTDataset(SEEN, tiny_processor, max_length=20)
    evaluate_sets(model, {"seen": dataset}, tiny_processor, EvalOptions(track=track))

    assert seen == [["measuring seen", len(dataset)]]
    assert len(dataset) > 1


def with_one_cut(folder, processor, max_bad_fraction):
    """Three documents, an image of which is whole in its header alone."""
    (folder / "cut.png").write_bytes(png(0)[:60])
    (folder / "whole.png").write_bytes(png(1))
    rows = [{"text": f"<image>page {name}", "images": [f"{name}.png"]} for name in ("whole", "cut")]
    rows.append({"text": "no image"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return CPTDataset(
        folder / "rows.jsonl",
        processor,
        max_length=70,
        on_bad_data="skip",
        max_bad_fraction=max_bad_fraction,
    )


def test_documents_that_fail_when_they_are_measured_count_towards_the_limit(model, tiny_processor, tmp_path):
    dataset = with_one_cut(tmp_path, tiny_processor, max_bad_fraction=0.3)

    with pytest.raises(BadDataError, match=r"^1 of 3 rows of 'rows' cannot .* set max_bad_fraction above 0"):
        evaluate_sets(model, {"set": dataset}, tiny_processor)


def test_what_is_below_the_limit_is_left_out_of_the_measure_named_and_counted_once(
    model, tiny_processor, tmp_path, caplog
):
    """Once, though its image is read in several passes, and by the Trainer as well."""
    dataset = with_one_cut(tmp_path, tiny_processor, max_bad_fraction=0.4)

    found = evaluate_sets(model, {"set": dataset}, tiny_processor)["set"]
    metrics = make_trainer(model, None, tiny_processor, tmp_path).evaluate(dataset)

    assert len(dataset.failures) == 1
    assert found["targets"] == metrics["eval_targets"] == dataset.ledger.total.tokens["targets"]
    assert [one.getMessage() for one in caplog.records if "cut.png" in one.getMessage()]


def test_the_trainers_evaluation_stops_at_the_same_limit(model, tiny_processor, tmp_path):
    dataset = with_one_cut(tmp_path, tiny_processor, max_bad_fraction=0.3)

    with pytest.raises(BadDataError, match=r"^1 of 3 rows of 'rows' cannot"):
        make_trainer(model, None, tiny_processor, tmp_path).evaluate(dataset)


def test_metrics_add_up_rows_and_do_not_average_them():
    rows = np.array([[2.0, 1.0], [9.0, 3.0], [0.0, 0.0]])

    metrics = trainer_metrics(EvalPrediction(predictions=rows, label_ids=rows))

    assert metrics == {"loss": 2.75, "perplexity": math.exp(2.75), "targets": 4}


def test_a_perplexity_too_large_for_a_number_is_infinite():
    assert perplexity(1000.0) == math.inf


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    "way",
    [
        {"lora_r": 4},
        {"lora_r": 4, "train_merger": True, "lora_towers": ["language"]},
        {"lora_r": 4, "train_vision": True, "train_merger": True},
        {"tuning": "full"},
        {"tuning": "qlora", "lora_r": 4},
    ],
    ids=str,
)
def test_evaluation_in_bfloat16_is_that_of_the_trainer(
    tiny_model_dir, tiny_processor, tmp_path, way, batch_size
):
    """As training computes, also of images; in the weights' own float32 the numbers are others."""
    dataset = CPTDataset(SEEN, tiny_processor, max_length=64, packing=False)
    model = load_model(ModelConfig(str(tiny_model_dir), **way))
    measured = partial(evaluate_sets, model, {"one": dataset}, tiny_processor, with_base=False)

    found, in_float32 = (
        measured(EvalOptions(batch_size, autocast=autocast))["one"]["loss"]
        for autocast in (torch.bfloat16, None)
    )
    # Last: accelerate puts its autocast into the model.
    settings = {"bf16": True, "per_device_eval_batch_size": batch_size}
    trainer = make_trainer(model, None, tiny_processor, tmp_path, eval_dataset=dataset, **settings)
    expected = trainer.evaluate()["eval_loss"]

    assert found == pytest.approx(expected, abs=1e-9)
    assert abs(in_float32 - expected) > 1e-5


FROZEN = {"lora_r": 4}
TRAINED = [
    {"lora_r": 4, "train_merger": True},
    {"lora_r": 4, "train_vision": True, "lora_towers": ["language"]},
]


def moved(tiny_model_dir, **way):
    """A model whose trained weights are not those of its start."""
    model = load_model(ModelConfig(str(tiny_model_dir), **way)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


def tower_calls(*models):
    """A list that gets a line with each call of a vision tower."""
    calls = []
    for one in models:
        base_model(one).model.visual.register_forward_hook(lambda *_: calls.append("called"))
    return calls


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_features_that_model_and_base_share_change_no_number(
    tiny_model_dir, tiny_processor, monkeypatch, autocast
):
    dataset = CPTDataset(SEEN, tiny_processor, max_length=64)
    model = moved(tiny_model_dir, **FROZEN)
    measured = partial(
        evaluate_sets, model, {"seen": dataset}, tiny_processor, EvalOptions(2, autocast=autocast)
    )

    shared = measured()
    monkeypatch.setattr(evaluate, "see_alike", lambda *_: False)

    assert shared == measured()
    assert shared["seen"]["loss"] != shared["seen"]["base_loss"]


def test_a_frozen_tower_sees_each_image_once_for_model_and_base(tiny_model_dir, tiny_processor):
    dataset = CPTDataset(SEEN, tiny_processor, max_length=64, packing=False)
    model = moved(tiny_model_dir, **FROZEN)
    calls = tower_calls(model)

    result = evaluate_sets(model, {"seen": dataset}, tiny_processor)["seen"]

    assert result["base_loss"] is not None
    media = 3 + 2  # images and videos, each a call
    assert len(calls) == 3 * media  # right, shuffled, blank


@pytest.mark.parametrize("way", TRAINED, ids=str)
def test_a_trained_tower_sees_for_the_base_as_it_was(tiny_model_dir, tiny_processor, way):
    dataset = CPTDataset(SEEN, tiny_processor, max_length=64, packing=False)
    model = moved(tiny_model_dir, **way)
    calls = tower_calls(model)

    found = evaluate_sets(model, {"seen": dataset}, tiny_processor)["seen"]

    assert len(calls) == 4 * (3 + 2)
    untrained = load_model(ModelConfig(str(tiny_model_dir), **FROZEN)).eval()
    samples = encode_rows(SEEN, tiny_processor)
    assert found["base_loss"] == pytest.approx(mean_nll(untrained, samples), rel=1e-6)


@pytest.mark.parametrize(("tower", "passes"), [("vision", 4), ("merger", 4), ("language", 3)])
def test_a_base_of_its_own_shares_features_where_its_tower_is_equal(
    tiny_model_dir, tiny_processor, tower, passes
):
    dataset = CPTDataset(SEEN, tiny_processor, max_length=64, packing=False)
    ways = {name: {f"train_{name}": True} for name in ("vision", "merger")}
    alone = {"train_language": False, **ways[tower]} if tower in ways else {}
    model = moved(tiny_model_dir, tuning="full", **alone)
    base = load_model(ModelConfig(str(tiny_model_dir), tuning="full")).eval()
    calls = tower_calls(model, base)

    found = evaluate_sets(model, {"seen": dataset}, tiny_processor, base=base)["seen"]

    assert len(calls) == passes * (3 + 2)
    samples = encode_rows(SEEN, tiny_processor)
    assert found["base_loss"] == pytest.approx(mean_nll(base, samples), rel=1e-6)
    assert found["loss"] == pytest.approx(mean_nll(model, samples), rel=1e-6)


@pytest.fixture(scope="module")
def on_two_ranks(tiny_model_dir, tmp_path_factory):
    """What each of two ranks found; see tests/training/measuring_rank.py."""
    folder = tmp_path_factory.mktemp("measured")
    done = run_on_ranks("tests.training.measuring_rank", str(folder), str(tiny_model_dir))
    assert done.returncode == 0, done.stdout
    return [json.loads((folder / f"rank-{rank}").read_text()) for rank in range(2)]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_ranks_that_share_the_items_get_the_numbers_of_one_process(
    tiny_model_dir, tiny_processor, on_two_ranks, batch_size
):
    dataset = CPTDataset(TEN, tiny_processor, max_length=70, packing=False)
    model = load_model(ModelConfig(str(tiny_model_dir), lora_r=4))

    expected = evaluate_sets(model, {"set": dataset}, tiny_processor, EvalOptions(batch_size))["set"]

    assert None not in expected.values()
    for rank in on_two_ranks:
        found, wanted = dict(rank[str(batch_size)]), dict(expected)
        intervals = {name: pytest.approx(one, rel=1e-9) for name, one in wanted.pop("intervals").items()}
        assert found.pop("intervals") == intervals
        assert found.pop("reliance") == pytest.approx(wanted.pop("reliance"), rel=1e-9)
        assert found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
@pytest.mark.alone
def test_ranks_gather_each_target_once(tiny_model_dir, tiny_processor, on_two_ranks):
    dataset = CPTDataset(TEN, tiny_processor, max_length=70, packing=False)
    model = load_model(ModelConfig(str(tiny_model_dir), lora_r=4))

    expected = score_sets(model, {"set": dataset}, tiny_processor, keeps_targets=True)["set"].targets

    for rank in on_two_ranks:
        for name, values in rank["targets"].items():
            assert values == pytest.approx(getattr(expected, name).tolist(), abs=1e-6)


@pytest.mark.slow
@pytest.mark.alone
def test_a_document_that_cannot_be_read_ends_all_ranks_at_once(on_two_ranks):
    errors = [rank["cut"] for rank in on_two_ranks]

    (first,) = [error for error in errors if error.startswith("DocumentError: ")]
    assert "cut.png" in first
    message = first.removeprefix("DocumentError: ")
    assert [e for e in errors if e != first] in ([f"CollectiveError: rank {n}: {message}"] for n in range(2))
    assert sum(rank["cut, read"] for rank in on_two_ranks) < 80  # and not when the others are done


@pytest.mark.slow
@pytest.mark.alone
def test_documents_that_fail_on_different_ranks_are_too_many_together(on_two_ranks):
    for rank in on_two_ranks:
        assert rank["too many"].startswith("BadDataError: 2 of 80 rows of 'two' cannot be used")


@pytest.mark.slow
@pytest.mark.alone
def test_a_worker_that_dies_ends_all_ranks(on_two_ranks):
    assert on_two_ranks[1]["dead"].startswith("LoadingError: a process that read documents was killed")
    assert on_two_ranks[0]["dead"].startswith("CollectiveError: rank 1: a process that read documents was")


@pytest.mark.slow
@pytest.mark.alone
def test_ranks_measure_again_after_one_has_failed(on_two_ranks):
    assert all(rank["after"] == rank["1"] for rank in on_two_ranks)


@pytest.mark.parametrize("as_bytes", [True, False])
def test_pixels_go_as_bytes_only_where_they_may(model, tiny_processor, monkeypatch, as_bytes):
    dataset, seen = CPTDataset(TEN, tiny_processor, max_length=70), []
    monkeypatch.setattr(
        evaluate_module, "sent", lambda batch, *rest: seen.append(batch) or sent(batch, *rest)
    )

    found = evaluate_sets(model, {"ten": dataset}, tiny_processor, EvalOptions(pixel_bytes=as_bytes))["ten"]

    kinds = {batch["pixel_values"].dtype for batch in seen if "pixel_values" in batch}
    assert torch.float32 in kinds or as_bytes
    assert (torch.uint8 in kinds) == as_bytes  # images beside others are float32 either way
    assert found["loss"] == evaluate_sets(model, {"ten": dataset}, tiny_processor)["ten"]["loss"]
