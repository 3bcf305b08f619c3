"""Invariant 1: the targets' text is the spans' text, no medium is a target, pads are counted per image."""

import unicodedata

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.published import PROCESSOR_LAYOUTS
from tests.support import TEN, png, row
from vlcpt import CPTDataCollator, CPTDataset, Document, Image, Text, encode_document

pytestmark = pytest.mark.parametrize("layout", PROCESSOR_LAYOUTS, indirect=True)

WORDS = ["a", "Word", "'s", "e", "\u0301", "中文", "。", "🧑‍🔬", "한글", "12", "if x:\n    y", "\\"]
SPACES = [" ", "\n", "\t", "\u3000"]
TAGS = ["<b>", "</b>", "<image>", "<trainable_text>", "<|image_pad|>", "<|endoftext|>", "<tool_call>"]
PIECES = [*WORDS, *SPACES, *TAGS]
texts = st.lists(st.sampled_from(PIECES) | st.characters(codec="utf-8"), min_size=1, max_size=6).map("".join)
segments = st.lists(
    st.builds(Text, texts, st.booleans(), st.sampled_from([0.5, 1.0])) | st.just(Image(data=png(1))),
    min_size=1,
    max_size=8,
)


def solid(text: str) -> str:
    return "".join(character for character in text if not character.isspace())


def span_text(document: Document) -> str:
    """The spans' characters as the tokenizer has them: neighbouring spans normalised together."""
    runs = [""]
    for segment in document.segments:
        if isinstance(segment, Text) and segment.trainable:
            runs[-1] += segment.text
        else:
            runs.append("")
    return "".join(solid(unicodedata.normalize("NFC", run)) for run in runs)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(segments)
def test_the_targets_text_is_the_spans_text(tiny_processor, found):
    # A first token has no context and is no target, so none of the drawn text stands first.
    document = Document((Text("A. "), *found))
    sample = encode_document(document, tiny_processor, train_eos="never")

    is_target = sample.labels != -100
    ids = sample.input_ids[is_target]
    assert solid(tiny_processor.tokenizer.decode(ids)) == span_text(document)
    assert torch.equal(sample.labels[is_target], ids)
    assert torch.equal(is_target, sample.loss_weights > 0)
    # The vocabulary proper ends where the control tokens begin; those come from media alone.
    control = sample.input_ids >= tiny_processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    images = len(document.images)
    assert int(control.sum()) == 1 + images * (2 + 4)
    assert not (control & is_target).any()


def test_no_medium_is_a_target_and_pads_equal_the_grid_of_each_image(tiny_processor):
    dataset = CPTDataset(TEN, tiny_processor, max_length=70)
    batch = CPTDataCollator(tiny_processor)([dataset[number] for number in range(len(dataset))])
    tokens = tiny_processor.tokenizer.convert_tokens_to_ids
    start, end = tokens("<|vision_start|>"), tokens("<|vision_end|>")

    for pad, grids, pixels in (
        ("<|image_pad|>", "image_grid_thw", "pixel_values"),
        ("<|video_pad|>", "video_grid_thw", "pixel_values_videos"),
    ):
        counts = []
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            for place in (number for number, token in enumerate(ids) if token == start):
                stop = ids.index(end, place)
                assert set(labels[place : stop + 1]) == {-100}
                if ids[place + 1] == tokens(pad):
                    assert set(ids[place + 1 : stop]) == {tokens(pad)}
                    counts.append(stop - place - 1)
        assert counts == (batch[grids].prod(dim=1) // 4).tolist()
        assert len(counts) >= 3
        assert len(batch[pixels]) == int(batch[grids].prod(dim=1).sum())


def test_end_of_text_is_learnt_and_padding_of_the_same_id_is_not(tiny_processor):
    rows = [row("a <trainable_text>b</trainable_text>"), row("a <trainable_text>b c d e</trainable_text>")]
    dataset = CPTDataset(rows, tiny_processor, max_length=16, packing=False)
    batch = CPTDataCollator(tiny_processor)([dataset[0], dataset[1]])

    is_eos = batch["input_ids"] == tiny_processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert is_eos.sum() > 2
    assert (is_eos & (batch["labels"] != -100)).sum(dim=1).tolist() == [1, 1]
