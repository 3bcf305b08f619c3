"""Invariant 8: split documents train each target exactly once."""

import itertools

import pytest
import torch

from tests.published import PROCESSOR_LAYOUTS
from tests.support import encode_rows, png, row
from vlcpt import CPTDataset

pytestmark = pytest.mark.parametrize("layout", PROCESSOR_LAYOUTS, indirect=True)


@pytest.fixture(scope="module")
def long_row(tiny_processor):
    """A document of 190 text tokens, no two alike, so that each part has one place in it."""
    tokenizer = tiny_processor.tokenizer
    words = [token[1:] for token in tokenizer.get_vocab() if token.startswith("Ġ") and token[1:].isalpha()]
    words = [word for word in words if word.isascii() and len(tokenizer.encode(f" {word}")) == 1]
    assert len(words) >= 190

    def take(count):
        return "".join(f" {words.pop()}" for _ in range(count))

    def span(text):
        return f"<trainable_text>{text}</trainable_text>"

    text = take(10) + "<image>" + span(take(40)) + "<image><image>" + take(25)
    text += span(take(25) + "<image>" + take(25)) + take(25) + span(take(15)) + "<image>" + take(25)
    return row(text, images=[png(seed) for seed in range(5)])


def place_of(part: list[int], whole: list[int]) -> int:
    """Where a part stands in its document; only one place can be right."""
    places = [n for n in range(len(whole) - len(part) + 1) if whole[n : n + len(part)] == part]
    assert len(places) == 1
    return places[0]


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("max_length", [16, 17, 33, 64, 150, 1000])
def test_every_target_of_a_split_document_is_trained_once(tiny_processor, long_row, max_length, packing):
    (whole,) = encode_rows([long_row], tiny_processor)
    dataset = CPTDataset([long_row], tiny_processor, max_length=max_length, packing=packing)
    parts = [sample for number in range(len(dataset)) for sample in dataset[number]]
    assert (len(parts) > 1) == (max_length < 200)

    trained: list[int] = []
    images = 0
    for part in parts:
        assert len(part) <= max_length
        start = place_of(part.input_ids.tolist(), whole.input_ids.tolist())
        inside = (part.labels != -100).nonzero()[:, 0]
        assert torch.equal(part.labels[inside], whole.input_ids[start + inside])
        assert torch.equal(part.loss_weights[inside], whole.loss_weights[start + inside])
        assert inside.min() > 0  # a first token has no context
        trained += (start + inside).tolist()
        pads = int((part.input_ids == tiny_processor.image_token_id).sum())
        grids = 0 if part.image_grid_thw is None else len(part.image_grid_thw)
        assert pads == 4 * grids  # media are whole
        images += grids
    assert sorted(trained) == (whole.labels != -100).nonzero()[:, 0].tolist()
    # What follows the last target is left away, and so is a part without targets.
    assert images == 4 if len(parts) == 1 else 2 <= images <= 4


def test_a_later_part_opens_with_the_text_token_before_it(tiny_processor, long_row):
    (whole,) = encode_rows([long_row], tiny_processor)
    dataset = CPTDataset([long_row], tiny_processor, max_length=33, packing=False)
    media = [tiny_processor.image_token_id]
    media += tiny_processor.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    parts = [dataset[number][0] for number in range(len(dataset))]
    starts = sorted((place_of(p.input_ids.tolist(), whole.input_ids.tolist()), len(p)) for p in parts)

    for (first, length), (second, _) in itertools.pairwise(starts):
        assert second >= first + length - 1
        assert int(whole.input_ids[second]) not in media
    assert starts[0][0] == 0
    assert dataset.ledger.total.tokens["repeated"] == len(parts) - 1
