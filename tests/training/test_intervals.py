"""Tests of vlcpt/training/intervals.py: how often intervals of known sets hold the truth."""

import numpy as np
import pytest

from vlcpt.training.intervals import FEWEST, loss_intervals

RIGHT, BASE, BLANK, SHUFFLED = range(4)
NAMES = {
    **{"loss": (RIGHT, None), "learnt": (BASE, RIGHT)},
    **{"shuffled": (SHUFFLED, RIGHT), "blank": (BLANK, RIGHT)},
}


def drawn(seed, documents):
    """Sums of documents: lengths have a long tail, the longer are harder, half have images."""
    rng = np.random.default_rng(seed)
    targets = np.maximum(1, rng.lognormal(3.5, 1.0, documents)).astype(int)
    hard = rng.gamma(4, 0.5, documents) * (1 + 0.1 * np.log(targets))
    blank = np.where(rng.random(documents) < 0.5, rng.gamma(2, 0.4, documents), 0)
    worse = [0 * hard, rng.gamma(2, 0.2, documents), blank, blank * rng.uniform(0.5, 1, documents)]
    noise = rng.normal(0, 0.3, (4, documents)) / np.sqrt(targets)
    nll = (hard + np.array(worse) + noise) * targets
    return np.stack([nll.T, np.repeat(targets[:, None], 4, axis=1)], axis=2)


def estimates(sums):
    nll, targets = sums.sum(axis=0).T
    losses = nll / targets
    return {
        name: losses[one] - (0 if other is None else losses[other]) for name, (one, other) in NAMES.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("documents", [FEWEST, 12, 20, 60, 200])
def test_intervals_hold_the_truth_in_90_to_98_percent_of_200_seeded_sets(documents):
    truth = estimates(drawn(seed=10_000, documents=1_000_000))
    sets = [loss_intervals(drawn(seed, documents), NAMES) for seed in range(200)]

    for name, value in truth.items():
        held = np.mean([low <= value <= high for low, high in (one[name] for one in sets)])
        assert 0.90 <= held <= 0.98, (name, held)


def test_an_interval_holds_its_estimate_and_narrows_with_documents():
    few, many = (loss_intervals(drawn(1, count), NAMES) for count in (50, 5000))

    for name, (low, high) in many.items():
        assert low < estimates(drawn(1, 5000))[name] < high
        assert high - low < (few[name][1] - few[name][0]) / 4


def test_a_difference_is_known_better_than_its_losses():
    """Documents are paired: that one is hard for both models is no doubt about their difference."""
    found = loss_intervals(drawn(2, 100), NAMES)

    widths = {name: high - low for name, (low, high) in found.items()}
    assert widths["learnt"] < widths["loss"] / 3


def test_a_loss_that_is_the_same_in_every_document_differs_by_exactly_nothing():
    sums = drawn(3, 100)
    sums[:, BASE] = sums[:, RIGHT]

    assert loss_intervals(sums, NAMES)["learnt"] == (0.0, 0.0)


def test_a_difference_of_rounding_alone_has_a_tiny_interval():
    sums = drawn(4, 100)
    sums[:, BASE] = sums[:, RIGHT]
    sums[:, BASE, 0] += np.random.default_rng(0).normal(0, 1e-7, 100)

    low, high = loss_intervals(sums, NAMES)["learnt"]

    assert -1e-8 < low < high < 1e-8


def test_documents_that_one_pass_could_not_read_are_left_out_of_that_pass():
    sums = drawn(5, 200)
    sums[:5, SHUFFLED] = 0

    low, high = loss_intervals(sums, NAMES)["shuffled"]

    assert low < estimates(sums)["shuffled"] < high


def test_seven_documents_have_no_interval_and_eight_have():
    assert loss_intervals(drawn(6, 7), NAMES) == dict.fromkeys(NAMES)
    assert None not in loss_intervals(drawn(6, 8), NAMES).values()


def test_the_same_sums_give_the_same_bounds():
    assert loss_intervals(drawn(7, 30), NAMES) == loss_intervals(drawn(7, 30), NAMES)
