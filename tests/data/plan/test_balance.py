"""Packs of nearly one cost, and steps whose packs cost alike: nothing is lost or less mixed."""

from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcpt.data.plan import balance
from vlcpt.data.plan.balance import (
    PackCost,
    even_packs,
    kinds_of_packs,
    order_of_steps,
    share_among_ranks,
)
from vlcpt.data.plan.mix import plan_packs

MAX_LENGTH = 512
# Of three tokens of an image two cost as much again; attention is a tenth of the longest sample.
COST = PackCost(token=100, pair=0.02, target=10, media=60, frame_pair=0.05)


def planned(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lengths, costs and sources of samples pack after pack, half of them captions; and where packs end."""
    rng = np.random.default_rng(seed)
    sources = rng.integers(0, 2, count)
    lengths = np.clip(rng.lognormal(np.where(sources == 0, 3.5, 5), 0.6), 4, MAX_LENGTH).astype(np.int64)
    media = np.where(sources == 0, (lengths * rng.uniform(0.2, 0.9, count)).astype(np.int64), 0)
    numbers, ends = plan_packs(array("i", lengths.astype(np.int32).tobytes()), MAX_LENGTH)
    costs = COST.of(lengths, lengths - media - 1, media, media.astype(float) ** 2)
    order = np.asarray(numbers)
    return lengths[order], costs[order], sources[order], np.asarray(ends)


def sums(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    return np.add.reduceat(values, np.append(0, ends[:-1]))


def step_balance(costs: np.ndarray, order: np.ndarray, step: int) -> float:
    steps = costs[order[: len(order) // step * step]].reshape(-1, step)
    return float((steps.mean(axis=1) / steps.max(axis=1)).mean())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(0, 10**9)), min_size=1, max_size=120),
    st.integers(0, 99),
)
def test_every_sample_stays_in_one_pack_that_holds_it(samples, seed):
    lengths, costs = (np.array(column) for column in zip(*samples, strict=True))
    numbers, ends = plan_packs(lengths.tolist(), 64)
    order, ends = np.asarray(numbers), np.asarray(ends)

    places, new_ends = even_packs(ends, lengths[order], costs[order], 64, seed)

    assert sorted(places.tolist()) == list(range(len(samples)))
    assert len(new_ends) == len(ends) and new_ends[-1] == len(samples)
    assert (np.diff(new_ends, prepend=0) > 0).all()
    assert sums(lengths[order][places], new_ends).max() <= 64


def test_packs_come_closer_in_cost():
    lengths, costs, _, ends = planned(4000, seed=0)

    places, new_ends = even_packs(ends, lengths, costs, MAX_LENGTH, seed=0)

    before, after = sums(costs, ends), sums(costs[places], new_ends)
    assert after.std() < before.std() / 2


@pytest.mark.parametrize("block", [16, 50])
def test_packs_of_one_block_keep_their_samples_among_them(monkeypatch, block):
    monkeypatch.setattr(balance, "BLOCK", block)
    lengths, costs, _, ends = planned(1000, seed=1)
    assert len(ends) > 2 * block

    places, new_ends = even_packs(ends, lengths, costs, MAX_LENGTH, seed=0)

    cuts = ends[block - 1 :: block]
    assert (new_ends[block - 1 :: block] == cuts).all()
    for first, last in zip([0, *cuts], [*cuts, len(lengths)], strict=False):
        assert sorted(places[first:last]) == list(range(first, last))
    assert (places != np.arange(len(places))).any()


def test_the_same_seed_gives_the_same_packs():
    lengths, costs, _, ends = planned(1000, seed=2)
    first, again, other = (even_packs(ends, lengths, costs, MAX_LENGTH, seed)[0] for seed in (5, 5, 6))

    assert (first == again).all()
    assert (first != other).any()


def test_packs_that_are_not_full_stay():
    """No sample fills its pack with another, so there is nothing to compare costs with."""
    ends, lengths = np.array([1, 2]), np.array([5, 5])

    places, new_ends = even_packs(ends, lengths, np.array([1, 9]), 64, seed=0)

    assert places.tolist() == [0, 1]
    assert new_ends.tolist() == [1, 2]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 3)), min_size=1, max_size=300),
    st.integers(1, 40),
    st.integers(0, 99),
)
def test_an_order_has_every_pack_once_and_each_step_as_many_of_a_kind_as_chance_gives(packs, step, seed):
    costs, kinds = (np.array(column) for column in zip(*packs, strict=True))

    order = order_of_steps(costs, kinds, step, np.random.default_rng(seed))

    at_random = np.random.default_rng(seed).permutation(len(packs))
    assert sorted(order) == list(range(len(packs)))
    for first in range(0, len(packs), step):
        assert sorted(kinds[order[first : first + step]]) == sorted(kinds[at_random[first : first + step]])


@pytest.mark.parametrize("step", [8, 16, 64])
def test_packs_of_a_step_cost_nearly_the_same(step):
    lengths, costs, sources, ends = planned(20_000, seed=3)
    places, new_ends = even_packs(ends, lengths, costs, MAX_LENGTH, seed=0)
    kinds = kinds_of_packs(sources[places], lengths[places], new_ends, step)

    order = order_of_steps(sums(costs[places], new_ends), kinds, step, np.random.default_rng(0))

    assert step_balance(sums(costs, ends), np.random.default_rng(0).permutation(len(ends)), step) < 0.95
    assert step_balance(sums(costs[places], new_ends), order, step) > 0.985


def test_the_share_of_a_source_in_a_step_varies_as_at_random():
    lengths, costs, sources, ends = planned(20_000, seed=3)
    places, new_ends = even_packs(ends, lengths, costs, MAX_LENGTH, seed=0)
    kinds = kinds_of_packs(sources[places], lengths[places], new_ends, 16)
    captions, new_captions = (
        sums(one, at)
        for one, at in (
            (lengths * (sources == 0), ends),
            ((lengths * (sources == 0))[places], new_ends),
        )
    )
    before, after = [], []
    for seed in range(10):
        shuffled = np.random.default_rng(seed).permutation(len(ends))
        order = order_of_steps(sums(costs[places], new_ends), kinds, 16, np.random.default_rng(seed))
        size = len(ends) // 16 * 16
        before.append(captions[shuffled[:size]].reshape(-1, 16).sum(axis=1))
        after.append(new_captions[order[:size]].reshape(-1, 16).sum(axis=1))

    assert np.std(after) < 1.1 * np.std(before)


def test_dear_steps_come_at_any_time():
    """The steps of a window are in random order, not from dear to cheap."""
    costs = np.arange(64 * 8)
    firsts = [
        int(order_of_steps(costs, np.zeros_like(costs), 8, np.random.default_rng(seed))[:8].mean()) // 8
        for seed in range(40)
    ]

    assert len(set(firsts)) > 20
    assert 20 < np.mean(firsts) < 44


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_ranks_share_all_packs_of_each_step(ranks, batch, accumulation, steps, seed):
    costs = np.random.default_rng(seed).integers(0, 10**6, (steps, ranks * batch * accumulation))

    shared = share_among_ranks(costs, ranks, batch)

    assert (np.sort(shared, axis=1) == np.arange(costs.shape[1])).all()


def test_ranks_that_accumulate_have_equally_much_in_all_and_at_a_time():
    costs = np.random.default_rng(0).integers(900, 1100, (50, 8 * 4))

    shared = np.take_along_axis(costs, share_among_ranks(costs, 8, 1), axis=1).reshape(50, 4, 8)

    of_ranks = shared.sum(axis=1)
    assert (of_ranks.mean(axis=1) / of_ranks.max(axis=1)).min() > 0.99
    assert (shared.max(axis=2) - shared.min(axis=2)).mean() < 60  # of 200 in a step
    whole = costs.reshape(50, 4, 8).sum(axis=1)
    assert (whole.mean(axis=1) / whole.max(axis=1)).mean() < 0.97  # as they came


def test_small_sources_are_one_kind():
    sources, lengths = np.arange(6), np.array([9, 8, 7, 3, 2, 1])

    kinds = kinds_of_packs(sources, lengths, np.arange(1, 7), 8)

    assert len(set(kinds[:3].tolist())) == 3
    assert len(set(kinds[3:].tolist())) == 1
