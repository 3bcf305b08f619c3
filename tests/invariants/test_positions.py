"""Invariant 2: positions equal the model's own ``get_rope_index``."""

import pytest
import torch

from tests.published import LAYOUTS
from tests.support import TEN, avi, digits, encode_rows, own_positions, png, row
from vlcpt import CPTDataCollator, CPTDataset, Video, encode_document, parse_markup

pytestmark = pytest.mark.parametrize("layout", LAYOUTS, indirect=True)


def test_positions_in_a_batch_are_those_of_each_document(tiny_model, tiny_processor):
    """Packs and padding included: each document starts at 0 again, in all four rows."""
    whole = {tuple(s.input_ids.tolist()): s for s in encode_rows(TEN, tiny_processor)}
    dataset = CPTDataset(TEN, tiny_processor, max_length=70)
    packs = [dataset[number] for number in range(len(dataset))]
    batch = CPTDataCollator(tiny_processor)(packs)

    compared = 0
    for number, pack in enumerate(packs):
        start = 0
        for sample in pack:
            stop = start + len(sample)
            ids = tuple(batch["input_ids"][number, start:stop].tolist())
            full = next(s for key, s in whole.items() if key[: len(ids)] == ids)
            found = batch["position_ids"][:, number, start:stop]
            assert torch.equal(found[1:], own_positions(tiny_model, full)[:, 0, : len(ids)])
            assert torch.equal(found[0], torch.arange(len(ids)))
            compared += full.pixel_values is not None
            start = stop
    assert sum(map(len, packs)) == len(TEN)
    assert compared >= 4  # documents with images


# frames and rate of the file, frames to take a second; 2 frames make a time step
CLIPS = {
    "a second apart": (16, 8, 2.0),
    "uneven": (25, 10, 1.7),
    "slow": (40, 4, 0.4),
    "dense": (12, 12, 12.0),
}


@pytest.mark.parametrize("clip", CLIPS)
def test_positions_of_a_video_follow_its_time(tiny_model, tiny_processor, clip):
    frames, rate, fps = CLIPS[clip]
    video = Video(data=avi(0, frames, rate, 84, 56), fps=fps)
    markup = "a <image><video> b <image>c <trainable_text>d e f</trainable_text>"
    document = parse_markup(markup, [{"bytes": png(1)}, {"bytes": png(2, 84, 140)}], [video])
    sample = encode_document(document, tiny_processor)
    steps = int(sample.video_grid_thw[0, 0])
    # As the model's own processor has it: seconds of the file over the frames taken, times two.
    seconds = 2 * (frames / rate) / (2 * steps)

    assert steps > 1
    assert torch.equal(sample.position_ids, own_positions(tiny_model, sample, seconds)[:, 0])
    assert len(sample.position_ids[0].unique()) > steps


def test_positions_of_a_later_part_start_at_0(tiny_model, tiny_processor):
    spans = [f"<trainable_text>{digits(count)}</trainable_text>" for count in (30, 9)]
    text = f"a <image>{spans[0]}<image>{spans[1]}"
    rows = [row(text, images=[png(1), png(2, 84, 56)])]
    dataset = CPTDataset(rows, tiny_processor, max_length=24, packing=False)

    parts = [dataset[number][0] for number in range(len(dataset))]

    assert len(parts) > 2
    assert sum(part.image_grid_thw is not None for part in parts) == 2
    for part in parts:
        assert torch.equal(part.position_ids, own_positions(tiny_model, part)[:, 0])
