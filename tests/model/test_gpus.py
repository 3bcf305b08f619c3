"""Tests of vlcpt/model/gpus.py."""

import pytest

from vlcpt.model.gpus import GPUS, gpu_of


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("h100", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA L40S", 362e12),
    ],
)
def test_a_gpu_is_known_by_its_whole_name(name, peak):
    assert gpu_of(name).peak == peak


@pytest.mark.parametrize(
    "name", ["Tesla T4", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100 MIG 1g.5gb", ""]
)
def test_a_gpu_that_is_not_known_or_slower_has_no_limits(name):
    assert gpu_of(name) is None


def test_peaks_are_of_dense_products_in_16_bits():
    """With sparsity makers say twice as much, and no GPU of today has more than these."""
    assert all(50e12 < gpu.peak <= 2.5e15 for gpu in GPUS.values())
