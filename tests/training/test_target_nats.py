"""Tests of vlcpt/training/target_nats.py: what images give each target, found while a set is measured."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support import TEN, digits, encode_rows, png, row, run_alone
from vlcpt import CPTDataset
from vlcpt.training.evaluate import EvalOptions, score_sets
from vlcpt.training.target_nats import NatsCollector, TargetPlaces

BLANK = ("pixel_values", "pixel_values_videos")


@pytest.fixture(scope="module")
def model(make_tiny_model):
    return make_tiny_model().eval()


@pytest.fixture(scope="module")
def ten(model, tiny_processor):
    """Ten documents in parts and packs, measured target by target."""
    dataset = CPTDataset(TEN, tiny_processor, max_length=24)
    assert dataset.ledger.total.documents["split"]
    return dataset, score_sets(
        model, {"ten": dataset}, tiny_processor, EvalOptions(batch_size=2), keeps_targets=True
    )["ten"]


def test_each_target_is_there_once_at_its_place_in_the_document(ten):
    dataset, scores = ten
    for number in range(len(TEN)):
        _, stream = dataset.documents.encoded(number)
        places = np.flatnonzero(~np.isnan(scores.targets.of_document(number, len(stream))))
        expected = np.flatnonzero(stream.labels >= 0)
        assert places.tolist() == expected.tolist()
    assert len(scores.targets.places) == dataset.ledger.total.tokens["targets"]


def test_a_targets_nats_are_those_of_the_plain_model(model, tiny_processor):
    rows = [TEN[0], TEN[3], TEN[9]]  # an image each, or none
    dataset = CPTDataset(rows, tiny_processor, max_length=70)
    scores = score_sets(model, {"three": dataset}, tiny_processor, keeps_targets=True)["three"]

    for number, sample in enumerate(encode_rows(rows, tiny_processor)):
        seen = {name: one for name in BLANK if (one := getattr(sample, name)) is not None}
        blank = replace(sample, **{name: torch.zeros_like(one) for name, one in seen.items()})
        with torch.no_grad():
            right, without = (run_alone(model, one).nll for one in (sample, blank))
        found = scores.targets.of_document(number, len(sample))
        assert found[~np.isnan(found)] == pytest.approx((without - right).numpy(), abs=1e-5)
        assert bool(seen) == bool(np.abs(np.nan_to_num(found)).max() > 1e-4)


def test_the_sums_are_those_of_the_targets(ten):
    _, scores = ten
    targets, result = scores.targets, scores.result()
    nats = targets.blank.astype(np.float64) - targets.right

    assert result["reliance"] == {
        "nats_per_target": pytest.approx(result["blank_images_loss"] - result["loss"], abs=1e-9),
        "share_over_0.1": pytest.approx((nats > 0.1).mean()),
    }
    assert result["reliance"]["nats_per_target"] == pytest.approx(nats.mean(), abs=1e-6)


def test_a_model_that_ignores_images_gets_nothing_from_them(make_tiny_model, tiny_processor):
    blind = make_tiny_model()
    with torch.no_grad():
        for parameter in blind.model.visual.merger.mlp[2].parameters():
            parameter.zero_()
    dataset = CPTDataset(TEN, tiny_processor, max_length=70)

    scores = score_sets(blind, {"ten": dataset}, tiny_processor, keeps_targets=True)["ten"]

    assert np.abs(scores.targets.blank - scores.targets.right).max() < 1e-5
    assert scores.result()["reliance"]["share_over_0.1"] == 0


def test_without_media_nothing_is_compared_and_images_give_nothing(model, tiny_processor):
    dataset = CPTDataset(
        [row(f"a<trainable_text>{digits(5)}</trainable_text>")], tiny_processor, max_length=70
    )

    scores = score_sets(model, {"text": dataset}, tiny_processor, keeps_targets=True)["text"]

    assert scores.result()["reliance"] is None
    assert np.nansum(scores.targets.of_document(0, 7)) == 0


def test_a_document_that_is_missing_from_one_side_is_compared_nowhere():
    right = TargetPlaces(torch.tensor([0, 0, 2]), torch.tensor([4, 5, 1]))
    blank = TargetPlaces(torch.tensor([0, 0, 1, 2]), torch.tensor([4, 5, 3, 1]))
    sums = torch.zeros(3, 4, dtype=torch.float64)
    collector = NatsCollector(sums, keeps_targets=True)

    collector.add(
        {"right": right, "blank": blank},
        {"right": torch.tensor([1.0, 1.0, 1.0]), "blank": torch.tensor([2.0, 1.0, 9.0, 4.0])},
    )

    assert sums[:, :3].tolist() == [[2, 1, 1], [0, 0, 0], [1, 3, 1]]
    targets = collector.targets(ranks=1)
    assert targets.of_document(1, 9) is None
    assert targets.of_document(2, 2)[1] == 3


def test_a_document_whose_image_cannot_be_decoded_is_in_no_sum(model, tiny_processor, tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    rows = [f'{{"text": "<image>{digits(8, number)}", "images": ["{number}.png"]}}\n' for number in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    skips = {"on_bad_data": "skip", "max_bad_fraction": 0.5}
    dataset = CPTDataset(tmp_path / "rows.jsonl", tiny_processor, max_length=64, **skips)
    (tmp_path / "2.png").write_bytes(png(2)[:60])

    scores = score_sets(model, {"four": dataset}, tiny_processor, keeps_targets=True)["four"]

    assert scores.targets.of_document(2, 20) is None
    assert scores.image_sums[:, 0].tolist() == [9, 9, 0, 9]
