"""Tests of vlcpt/model/timing.py: the median of a few calls, the first left out."""

import time

import pytest
import torch

from vlcpt.model import timing
from vlcpt.model.timing import median_seconds

CPU = torch.device("cpu")


def test_the_first_call_is_not_counted():
    pauses = iter([0.1, *[0.0] * 9])

    assert median_seconds(lambda: time.sleep(next(pauses)), CPU) < 0.05


def test_slow_work_is_measured_once(monkeypatch):
    monkeypatch.setattr(timing, "_LONGEST", 0.02)
    calls = []

    def slow():
        calls.append(1)
        time.sleep(0.03)

    assert median_seconds(slow, CPU) >= 0.03
    assert len(calls) == 1


def test_a_full_gpu_is_no_measurement():
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        median_seconds(full, CPU)
