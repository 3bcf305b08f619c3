"""Columns hold what was put in, whatever numbers, and little memory where they can."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcpt.data.plan import plan
from vlcpt.data.plan.plan import Columns

numbers = st.sampled_from([0, 1, 255, 256, 65_535, 65_536, -1, 2**31 - 1, -(2**31)]) | st.integers(0, 300)
pieces = st.lists(st.lists(st.tuples(numbers, st.just(7) | numbers), max_size=5), max_size=6)


@settings(max_examples=300, deadline=None)
@given(pieces, st.sampled_from([np.int32, np.int64]))
def test_columns_hold_what_was_put_in(found, dtype):
    put = Columns(["first", "second"])
    for piece in found:
        lines = np.array(piece, dtype=dtype).reshape(-1, 2)
        put.extend({"second": lines[:, 1], "first": lines[:, 0]})

    expected = np.array([line for piece in found for line in piece], dtype=np.int64).reshape(-1, 2)
    for one in (put, pickle.loads(pickle.dumps(put))):
        assert len(one) == len(expected)
        assert one["first"].dtype == np.int64
        assert one["first"].tolist() == expected[:, 0].tolist()
        assert one["second"].tolist() == expected[:, 1].tolist()
        last = np.arange(len(expected))[::-1]
        for numbers in (slice(1, None), last):
            assert one.lines(numbers)["first"].tolist() == expected[numbers, 0].tolist()
            assert one.lines(numbers)["second"].tolist() == expected[numbers, 1].tolist()
        assert [tuple(one.line(n).values()) for n in range(len(one))] == [
            tuple(line) for line in expected.tolist()
        ]


@pytest.mark.parametrize(
    ("largest", "size"), [(7, 0), (255, 1), (65_535, 2), (65_536, 4), (2**31 - 1, 4)], ids=str
)
def test_a_number_takes_as_many_bytes_as_the_largest_needs(largest, size):
    put = Columns(["a"])
    put.extend({"a": np.full(10_000, 7)})
    empty = len(pickle.dumps(put))
    put.extend({"a": np.append(np.full(89_999, 7), largest)})
    assert len(pickle.dumps(put)) - empty == pytest.approx(size * 100_000, abs=100)


def test_pieces_are_all_lines_in_order(monkeypatch):
    monkeypatch.setattr(plan, "_AT_ONCE", 4)
    found = Columns(["a"])
    found.extend({"a": np.arange(10)})
    assert [(some, lines["a"].tolist()) for some, lines in found.pieces()] == [
        (slice(0, 4), [0, 1, 2, 3]),
        (slice(4, 8), [4, 5, 6, 7]),
        (slice(8, 10), [8, 9]),
    ]


@pytest.mark.parametrize("numbers", [[0, 2**31], [2**31], [-(2**31) - 1, 0]], ids=str)
def test_a_number_of_more_than_32_bits_is_refused(numbers):
    with pytest.raises(OverflowError, match="take more than 32 bits"):
        Columns(["a"]).extend({"a": np.array(numbers)})


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"different lengths: \[1, 2\]"):
        Columns(["a", "b"]).extend({"a": np.zeros(1), "b": np.zeros(2)})
