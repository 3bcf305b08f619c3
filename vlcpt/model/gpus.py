"""What GPUs can do at most, by their makers' data sheets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Gpu(NamedTuple):
    """A GPU's limits.

    Args:
        peak: Operations a second in dense products in bfloat16, added up in float32.
        memory: GiB, about.
    """

    peak: float
    memory: int


# Of several names in a GPU's own the longest counts.
GPUS: Mapping[str, Gpu] = {
    **{"GB200": Gpu(2.5e15, 184), "B200": Gpu(2.25e15, 178), "H200": Gpu(989e12, 140)},
    **{"H100": Gpu(989e12, 79), "H100 PCIe": Gpu(756e12, 79), "H100 NVL": Gpu(835e12, 93)},
    **{"H800": Gpu(989e12, 79), "H20": Gpu(148e12, 95), "A100": Gpu(312e12, 79), "A800": Gpu(312e12, 79)},
    **{"A40": Gpu(150e12, 44), "A30": Gpu(165e12, 23), "A10": Gpu(125e12, 22), "A10G": Gpu(70e12, 22)},
    **{"L40S": Gpu(362e12, 44), "L40": Gpu(181e12, 44), "L4": Gpu(121e12, 22)},
    **{"RTX 6000 Ada": Gpu(364e12, 47), "RTX A6000": Gpu(155e12, 47)},
    **{"RTX 4090": Gpu(165e12, 23), "RTX 3090": Gpu(71e12, 23), "MI300X": Gpu(1307e12, 191)},
}


def gpu_of(name: str) -> Gpu | None:
    """The limits of a GPU; None if it is not known, slower (a laptop's), or a part of one.

    Args:
        name: As ``torch.cuda.get_device_name`` gives it, or one of :data:`GPUS`.

    Example:
        >>> gpu_of("NVIDIA H100 PCIe"), gpu_of("NVIDIA H100 80GB HBM3").memory, gpu_of("Tesla T4")
        (Gpu(peak=756000000000000.0, memory=79), 79, None)
    """
    words = name.split()
    if {"Laptop", "Max-Q", "MIG"} & set(words):
        return None
    found = [known for known in GPUS if _stands_in(known.lower().split(), name.lower().split())]
    return GPUS[max(found, key=len)] if found else None


def _stands_in(known: list[str], words: list[str]) -> bool:
    # "A100-SXM4-80GB" is an A100.
    return any(
        [word.partition("-")[0] for word in words[start : start + len(known)]] == known
        for start in range(len(words))
    )
