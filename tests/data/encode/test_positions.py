"""Tests of vlcpt/data/encode/positions.py: the model's own, for any mixture of text, images and videos."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlcpt.data.encode.positions import VisionBlock, mrope_positions

shared = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_text_counts_on():
    assert mrope_positions(3, []).tolist() == [[0, 1, 2]] * 3
    assert mrope_positions(3, []).dtype == torch.int64


def test_an_image_has_rows_and_columns_and_text_goes_on_after_its_larger_side():
    # one text token, an image of 2 rows and 3 columns, one text token
    assert mrope_positions(8, [VisionBlock(1, (1, 2, 3), 1.0)]).tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4],
        [0, 1, 1, 1, 2, 2, 2, 4],
        [0, 1, 2, 3, 1, 2, 3, 4],
    ]


def test_a_videos_steps_follow_its_interval():
    # three steps of 1 × 1, half a second apart, where a second is three positions
    assert mrope_positions(4, [VisionBlock(0, (3, 1, 1), 1.5)]).tolist() == [
        [0, 1, 3, 1],
        [0, 0, 0, 1],
        [0, 0, 0, 1],
    ]


@pytest.fixture(scope="module")
def model(make_tiny_model):
    return make_tiny_model().model


segments = st.lists(
    st.tuples(
        st.sampled_from(["text", "image", "video"]),
        st.integers(1, 6),  # tokens of text, or steps of a video
        st.integers(1, 5),
        st.integers(1, 5),
        st.sampled_from([0.5, 1.0, 1 / 3, 0.37, 2.2, 7.0]) | st.floats(0.01, 20),
    ),
    min_size=1,
    max_size=8,
)


@settings(shared, max_examples=200)
@given(segments)
def test_positions_equal_the_models_own(model, found):
    ids, types, blocks = [], [], []
    images, videos, seconds = [], [], []
    for kind, count, height, width, second in found:
        if kind == "text":
            ids += [5] * count
            types += [0] * count
            continue
        time = count if kind == "video" else 1
        pads = time * height * width
        blocks.append(
            VisionBlock(len(ids) + 1, (time, height, width), 2 * second if kind == "video" else 1.0)
        )
        # A start and an end token around the pads.
        ids += [6] + [7] * pads + [8]
        types += [0] + [1 if kind == "image" else 2] * pads + [0]
        (images if kind == "image" else videos).append([time, 2 * height, 2 * width])
        if kind == "video":
            seconds.append(second)

    wanted, _ = model.get_rope_index(
        torch.tensor([ids]),
        torch.tensor([types], dtype=torch.int32),
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
        second_per_grid_ts=seconds or None,
    )

    assert torch.equal(mrope_positions(len(ids), blocks), wanted[:, 0])
