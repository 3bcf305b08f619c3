"""Frames and sizes are those of ``qwen_vl_utils``; each case where they are not is named, with the reason."""

from __future__ import annotations

import itertools

import pytest
import torch
from qwen_vl_utils import vision_process
from transformers import ProcessorMixin

from vlcpt.data.encode import vision
from vlcpt.data.media.open import MediaError
from vlcpt.data.media.videos import FRAME_FACTOR, MIN_FRAMES, sample_indices

TOTALS = [*range(2, 60), 299, 300, 301, 1799, 5000]
VIDEO_FPS = (1.0, 12.0, 23.976, 29.97, 60.0)
FPS = (0.1, 1.0, 2.0, 3.7, 30.0, 100.0)
MAX_FRAMES = (2, 3, 5, 16, 768)
SIDES = (1, 5, 13, 14, 15, 20, 27, 28, 29, 41, 42, 43, 56, 100, 333, 448, 600, 800, 1080, 1920, 4000, 5600)
LIMITS = ((3136, 12_845_056), (3136, 3136), (3136, 200_704), (200_704, 1_003_520))


def indices_upstream(total: int, video_fps: float, **given: float) -> list[int]:
    count = vision_process.smart_nframes(given, total, video_fps)
    return torch.linspace(0, total - 1, count).round().long().tolist()


def test_frames_are_the_same_over_a_grid_of_lengths_rates_and_limits() -> None:
    grid = [*itertools.product(TOTALS, VIDEO_FPS, FPS, MAX_FRAMES)]
    for total, video_fps, fps, max_frames in grid:
        wanted = indices_upstream(total, video_fps, fps=fps, max_frames=max_frames)
        assert list(sample_indices(total, video_fps, fps=fps, max_frames=max_frames)) == wanted
    assert len(grid) == 63 * 5 * 6 * 5


def test_a_video_of_one_frame_is_taken_twice_and_refused_upstream() -> None:
    assert sample_indices(1, 30.0, fps=2.0, max_frames=768) == (0, 0)
    with pytest.raises(ValueError, match=r"nframes should in interval \[2, 1\]"):
        vision_process.smart_nframes({"fps": 2.0, "max_frames": 768}, 1, 30.0)


def test_options_that_leave_no_frame_are_an_error_that_names_them_and_upstream_takes_others() -> None:
    for fps, max_frames in ((2.0, 1), (0.0, 768), (-1.0, 768)):
        with pytest.raises(MediaError, match=f"fps = {fps} and max_frames = {max_frames}"):
            sample_indices(100, 30.0, fps=fps, max_frames=max_frames)
    assert vision_process.smart_nframes({"fps": -1.0, "max_frames": 768}, 100, 30.0) == 4


def test_in_very_long_videos_positions_are_exact_and_upstream_off_by_a_frame() -> None:
    """Its ``linspace`` has 24 bits."""
    total, fps, differing = 400_001, 0.05, 0
    wanted = indices_upstream(total, 25.0, fps=fps, max_frames=768)
    ours = sample_indices(total, 25.0, fps=fps, max_frames=768)
    for number, (one, other) in enumerate(zip(ours, wanted, strict=True)):
        assert one == round(number * (total - 1) / (len(ours) - 1))
        assert abs(one - other) <= 1
        differing += one != other
    assert differing  # or the docstring has become untrue


def test_constants_and_defaults_are_the_same(tiny_processor: ProcessorMixin) -> None:
    assert (FRAME_FACTOR, MIN_FRAMES) == (vision_process.FRAME_FACTOR, vision_process.FPS_MIN_FRAMES)
    defaults = (vision.DEFAULT_FPS, tiny_processor.video_processor.max_frames)
    assert defaults == (vision_process.FPS, vision_process.FPS_MAX_FRAMES)


def test_sizes_are_the_same_unless_a_side_is_shorter_than_half_a_token_or_upstream_gives_none() -> None:
    """Ours are the processor's own, which resizes what ``qwen_vl_utils`` gives it by the same rule again."""
    same = short = vanished = refused = 0
    for height, width, (low, high) in itertools.product(SIDES, SIDES, LIMITS):
        if max(height, width) / min(height, width) > vision_process.MAX_RATIO:
            for rule in (vision.smart_resize, vision_process.smart_resize):
                with pytest.raises(ValueError, match="absolute aspect ratio must be smaller than 200"):
                    rule(height, width, 28, low, high)
            refused += 1
            continue
        ours = vision.smart_resize(height, width, 28, low, high)
        upstream = vision_process.smart_resize(height, width, 28, low, high)
        if ours == upstream:
            same += 1
        elif min(height, width) <= 14:  # rounded to 0 tokens here and then scaled up, to 1 there
            short += 1
        else:  # rounded down to a side of 0 pixels there, which cannot be resized
            assert 0 in upstream and 0 not in ours, (height, width, low, high)
            vanished += 1
    assert same > 1400 and short > 50 and vanished > 50 and refused > 50
