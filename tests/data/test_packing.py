"""Packs: every sample once, none too long, little room left."""

import random
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcpt.data.packing import plan_packs


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
@given(st.lists(st.integers(0, 30), max_size=80), st.integers(30, 70))
def test_equal_lengths_at_once_are_as_one_by_one(lengths, max_length):
    packs: list[list[int]] = []
    last_changed: dict[int, int] = {}  # of packs with equal room, the one that was filled last is taken
    for step, number in enumerate(sorted(range(len(lengths)), key=lambda one: -lengths[one])):
        rooms = {n: max_length - sum(lengths[one] for one in pack) for n, pack in enumerate(packs)}
        fitting = [n for n, room in rooms.items() if room >= lengths[number]]
        pack = min(fitting, key=lambda n: (rooms[n], -last_changed[n]), default=len(packs))
        packs += [[]] if pack == len(packs) else []
        packs[pack].append(number)
        last_changed[pack] = step

    assert packs_of(lengths, max_length) == packs


def test_the_fullest_pack_that_has_room_is_taken():
    # 6 and 5 open a pack each; 3 goes to the 6, which it fills, and 4 to the 5.
    assert packs_of([3, 6, 4, 5], max_length=9) == [[1, 0], [3, 2]]


def test_packs_of_many_random_lengths_are_99_percent_full():
    rng = random.Random(0)
    lengths = [rng.randint(50, 4000) for _ in range(20_000)]
    before = time.process_time()
    packs = packs_of(lengths, 8192)
    assert time.process_time() - before < 3
    assert sum(lengths) / (len(packs) * 8192) >= 0.99


def test_a_sample_longer_than_a_pack_is_refused():
    with pytest.raises(ValueError, match="sample 1 has 8 tokens, more than max_length 7"):
        packs_of([7, 8], 7)


def test_no_samples_make_no_packs():
    assert packs_of([], 10) == []


def test_a_plan_depends_on_the_lengths_alone():
    lengths = [random.Random(1).randint(1, 50) for _ in range(500)]
    assert packs_of(lengths, 64) == packs_of(list(lengths), 64)
