"""Shares and replay: how often each document is read."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcpt.data.plan.mix import draw_documents, passes_for_shares, repeat_documents


@pytest.mark.parametrize(
    ("targets", "shares", "passes"),
    [
        ([100, 300], [None, None], [1, 1]),
        ([100, 300], [0.5, 0.5], [3, 1]),
        ([100, 300], [0.5, None], [3, 1]),
        ([300, 100], [0.5, None], [1, 3]),
        ([100, 100], [0.75, 0.25], [3, 1]),
        # 100 of 500 is a fifth already
        ([100, 400], [0.2, None], [1, 1]),
        # those without a share divide the rest by their targets
        ([100, 200, 200], [0.6, None, None], [6, 1, 1]),
        ([10, 0], [None, None], [1, 1]),
        ([100, 300, 0], [0.5, 0.5, None], [3, 1, 1]),
    ],
)
def test_every_source_is_read_once_and_the_others_as_often_as_their_share_asks(targets, shares, passes):
    assert passes_for_shares(targets, shares) == pytest.approx(passes)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 10_000), st.integers(1, 100) | st.none()), min_size=1, max_size=6))
def test_realised_shares_are_those_asked_for(sources):
    targets = [count for count, _ in sources]
    given_shares = [share for _, share in sources if share is not None]
    whole = sum(given_shares) + (50 if None in [share for _, share in sources] else 0)
    shares = [None if share is None else share / whole for _, share in sources]

    passes = passes_for_shares(targets, shares)

    total = sum(count * times for count, times in zip(targets, passes, strict=True))
    assert min(passes) == pytest.approx(1.0)  # no source is read more than it must
    for count, times, share in zip(targets, passes, shares, strict=True):
        assert times >= 1
        if share is not None:
            assert count * times / total == pytest.approx(share)


@pytest.mark.parametrize(
    ("targets", "shares", "message"),
    [
        ([1, 1], [0.7, 0.7], "the shares add up to 1.4 and every source has one"),
        ([1, 1], [0.2, 0.2], "the shares add up to 0.4 and every source has one"),
        ([1, 1], [1.0, None], "the shares add up to 1 and one source has none"),
        ([0, 1], [0.5, None], "a source with share 0.5 has no targets. Remove its share."),
    ],
)
def test_shares_that_cannot_be_met_are_an_error(targets, shares, message):
    with pytest.raises(ValueError, match=message):
        passes_for_shares(targets, shares)


def test_whole_passes_repeat_every_document_alike():
    counts = repeat_documents(np.array([5, 9, 1]), 3.0, np.random.default_rng(0))
    assert counts.tolist() == [3, 3, 3]


def test_a_part_of_a_pass_is_drawn():
    targets = np.full(1000, 10)
    counts = repeat_documents(targets, 1.25, np.random.default_rng(0))
    assert set(counts.tolist()) == {1, 2}
    assert (targets * counts).sum() == 12_500
    assert counts[:500].sum() != 625  # at random, not from the front


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.floats(0, 5_000), st.integers(0, 9))
def test_drawn_targets_are_within_half_a_document_of_those_wanted(targets, wanted, seed):
    counts = draw_documents(np.array(targets), wanted, np.random.default_rng(seed))
    assert abs((np.array(targets) * counts).sum() - wanted) <= max(targets) / 2 + 1e-6
    assert counts.max() - counts.min() <= 1  # none twice before all were once


def test_nothing_is_drawn_from_nothing():
    assert draw_documents(np.zeros(0, dtype=np.int64), 10, np.random.default_rng(0)).tolist() == []
    assert draw_documents(np.array([3]), 0, np.random.default_rng(0)).tolist() == [0]


def test_a_draw_depends_on_the_seed():
    targets = np.full(100, 3)
    first, again, other = (draw_documents(targets, 150, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
