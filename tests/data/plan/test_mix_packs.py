"""Packs: every sample once, none too long, little room left, and as mixed as a random draw."""

import random
import time
from array import array
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcpt.data.plan import mix as packing
from vlcpt.data.plan.mix import LOOK_AHEAD, plan_packs


def packs_of(lengths: list[int], max_length: int) -> list[list[int]]:
    """The packs as lists of sample numbers."""
    numbers, ends = plan_packs(lengths, max_length)
    assert not len(ends) or ends[-1] == len(numbers)
    return [numbers[start:end].tolist() for start, end in pairwise([0, *ends])]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=80), st.integers(60, 100))
def test_every_sample_is_in_one_pack_and_no_pack_is_too_long(lengths, max_length):
    packs = packs_of(lengths, max_length)
    assert sorted(number for pack in packs for number in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[number] for number in pack) <= max_length for pack in packs)
    # Any two packs together are too long for one.
    totals = sorted(sum(lengths[number] for number in pack) for pack in packs)
    assert len(totals) < 2 or totals[0] + totals[1] > max_length


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=80), st.integers(30, 70), st.sampled_from([1, 3, 10, 1000]))
def test_packs_take_the_next_samples_and_then_the_longest_of_some_that_fits(lengths, max_length, ahead):
    left, packs = list(range(len(lengths))), []
    while left:
        pack, room = [], max_length
        while left and lengths[left[0]] <= room:
            pack.append(left.pop(0))
            room -= lengths[pack[-1]]
        while fitting := [number for number in left[:ahead] if lengths[number] <= room]:
            pack.append(max(fitting, key=lambda number: (lengths[number], number)))
            left.remove(pack[-1])
            room -= lengths[pack[-1]]
        packs.append(pack)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "LOOK_AHEAD", ahead)
        assert packs_of(lengths, max_length) == packs


@pytest.fixture(scope="module")
def pass_of_two_sources() -> tuple[np.ndarray, np.ndarray]:
    """Lengths of captions, and of pages of five times the length, shuffled; and which of them are pages."""
    rng = np.random.default_rng(0)
    captions, pages = (rng.lognormal(np.log(median), 0.6, 6000) for median in (250, 1200))
    lengths = np.clip(np.concatenate([captions, pages]), 8, 4096).astype(np.int32)
    order = rng.permutation(len(lengths))
    return lengths[order], order >= 6000


def test_packs_are_as_full_as_best_fit_makes_them(pass_of_two_sources):
    lengths, _ = pass_of_two_sources
    packs = packs_of(lengths.tolist(), 4096)
    assert len(lengths) > 4 * LOOK_AHEAD
    assert sum(lengths.tolist()) / (len(packs) * 4096) >= 0.998  # the last pack alone is a part of that


def test_lengths_in_a_pack_are_as_mixed_as_a_random_draw(pass_of_two_sources):
    """The variance of the packs' means of log length, against that of means of a random draw."""
    lengths, _ = pass_of_two_sources
    logs = np.log(lengths)
    packs = packs_of(lengths.tolist(), 4096)
    sizes = [len(pack) for pack in packs]
    drawn = np.split(np.random.default_rng(1).permutation(logs), np.cumsum(sizes)[:-1])

    def within(groups: list[np.ndarray]) -> float:
        """The part of the variance that is inside groups of two and more."""
        some = [group for group in groups if len(group) > 1]
        return float(np.mean([group.var(ddof=1) for group in some]) / logs.var())

    assert within([logs[pack] for pack in packs]) == pytest.approx(within(drawn), rel=0.1)


def test_a_step_has_as_much_of_a_source_as_a_random_draw_of_as_many_tokens(pass_of_two_sources):
    lengths, is_page = pass_of_two_sources
    packs = packs_of(lengths.tolist(), 4096)
    rng = np.random.default_rng(2)

    def spread(pages: np.ndarray, tokens: np.ndarray) -> float:
        """The standard deviation of the pages' share in steps of 16 packs, over some epochs."""
        shares = []
        for _ in range(20):
            steps = rng.permutation(len(tokens))[: len(tokens) // 16 * 16].reshape(-1, 16)
            shares.append(pages[steps].sum(axis=1) / tokens[steps].sum(axis=1))
        return float(np.std(np.concatenate(shares)))

    planned = spread(*(np.array([one[pack].sum() for pack in packs]) for one in (lengths * is_page, lengths)))
    # As if a sample could stand over the edge of a pack.
    cut = (np.cumsum(lengths) - 1) // 4096
    at_random = spread(*(np.bincount(cut, one) for one in (lengths * is_page, lengths)))
    assert planned == pytest.approx(at_random, rel=0.1)


def test_copies_of_a_document_fall_into_different_packs(pass_of_two_sources):
    lengths = np.repeat(pass_of_two_sources[0][:2000], 3)
    order = np.random.default_rng(3).permutation(len(lengths))
    packs = packs_of(lengths[order].tolist(), 4096)
    together = {
        document
        for pack in packs
        for document, copies in Counter((order[pack] // 3).tolist()).items()
        if copies > 1
    }
    assert len(together) <= 20  # 1%; best fit over all samples puts together two thirds


def test_the_first_packs_are_not_the_longest_samples(pass_of_two_sources):
    """Packs are read in their order where train_sampling_strategy is sequential."""
    lengths, _ = pass_of_two_sources
    packs = packs_of(lengths.tolist(), 4096)
    means = [lengths[pack].mean() for pack in packs]
    assert abs(np.corrcoef(np.arange(len(packs)), means)[0, 1]) < 0.1


def test_a_million_samples_take_seconds(pass_of_two_sources):
    lengths = array("i", np.tile(pass_of_two_sources[0], 84).tobytes())
    assert len(lengths) > 1e6
    before = time.process_time()
    plan_packs(lengths, 4096)
    assert time.process_time() - before < 10  # 1.4 on an idle core


def test_a_sample_longer_than_a_pack_is_refused():
    with pytest.raises(ValueError, match="sample 1 has 8 tokens, more than max_length 7"):
        packs_of([7, 8], 7)


def test_no_samples_make_no_packs():
    assert packs_of([], 10) == []


def test_a_plan_depends_on_the_lengths_alone():
    lengths = [random.Random(1).randint(1, 50) for _ in range(500)]
    assert packs_of(lengths, 64) == packs_of(list(lengths), 64)
