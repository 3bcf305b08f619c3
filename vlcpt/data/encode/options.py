"""How documents are encoded, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlcpt.data.media.open import DEFAULT_LIMITS, MediaLimits

TrainEos = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class EncodingOptions:
    """What a configuration says of it, by its own names.

    Args:
        train_eos: Whether the closing ``<|endoftext|>`` is a target: ``auto`` where the last text
            that is not white space is.
        min_pixels, max_pixels: Pixel limits of a medium after resizing; default: the processor's.
        fps, max_frames: Frames a second and in all to take from a video.
        limits: What a media file may be.
    """

    train_eos: TrainEos = "auto"
    min_pixels: int | None = None
    max_pixels: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    limits: MediaLimits = DEFAULT_LIMITS


DEFAULT_OPTIONS = EncodingOptions()
