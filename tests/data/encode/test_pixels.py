"""The pixels of patches are equal to the processor's; test_vision.py compares them."""

import torch

from vlcpt.data.encode import pixels
from vlcpt.data.encode.encoder import DocumentEncoder


def test_pixels_too_many_for_huge_pages_are_scaled_alike(tiny_processor, monkeypatch):
    scales = DocumentEncoder(tiny_processor).vision.scales
    given = torch.randint(0, 256, (300, scales.width // 2), dtype=torch.uint8)
    found = pixels.scaled_pixels(given, scales)

    monkeypatch.setattr(pixels, "_MANY_HUGE_PAGES", 0)

    assert torch.equal(pixels.scaled_pixels(given, scales), found)
