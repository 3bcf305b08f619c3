"""Tests of vlcpt/training/continuations.py: what is written is what plain ``generate`` writes."""

from base64 import b64decode
from io import BytesIO

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from tests.support import avi, digits, png, row
from vlcpt import CPTDataset, ModelConfig, load_model
from vlcpt.training.continuations import continue_documents
from vlcpt.training.evaluate import EvalOptions

ROWS = [
    row("no image, <trainable_text>but words</trainable_text>"),
    row(
        f"<image>Fig. 1<trainable_text>{digits(20, 1)}</trainable_text> and <image>", images=[png(1), png(2)]
    ),
    row("two <image><image><trainable_text>7</trainable_text>", images=[png(3, 84, 56), png(4)]),
]


def plainly(model, processor, text, images, most):
    """Greedy, by the processor and ``generate`` of transformers alone."""
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    files = [Image.open(BytesIO(one)) for one in images] or None
    inputs = processor(text=[text.replace("<image>", image)], images=files, return_tensors="pt")
    end = processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=most, eos_token_id=end, pad_token_id=end
    )
    written = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(written, skip_special_tokens=True)


@pytest.fixture(scope="module", params=["plain", "by documents"])
def model(request, make_tiny_model, tiny_model_dir):
    if request.param == "plain":
        return make_tiny_model().eval()
    return load_model(ModelConfig(str(tiny_model_dir), lora_r=4))


def test_documents_are_continued_as_generate_would(model, make_tiny_model, tiny_processor):
    dataset = CPTDataset(ROWS, tiny_processor, max_length=128)

    found = continue_documents(model, dataset, tiny_processor, 3, EvalOptions())

    plain = make_tiny_model().eval()
    expected = [
        plainly(plain, tiny_processor, "<image>Fig. 1", [png(1)], 20),
        plainly(plain, tiny_processor, "two <image><image>", [png(3, 84, 56), png(4)], 16),
        # The space is part of the span's first token, as it was in training.
        plainly(plain, tiny_processor, "no image,", [], 16),
    ]
    assert [one["continuation"] for one in found] == expected
    assert all(expected)


def test_a_continuation_stands_beside_the_truth_and_what_came_before(model, tiny_processor):
    dataset = CPTDataset(ROWS, tiny_processor, max_length=128)

    first, *_ = continue_documents(model, dataset, tiny_processor, 1, EvalOptions())

    assert first["before"] == "[image]Fig. 1"
    assert first["truth"] == digits(20, 1)
    assert first["media"] == ["image given as bytes"]
    (small,) = first["thumbnails"]
    kind, code = small.split(",")
    assert kind == "data:image/png;base64"
    with Image.open(BytesIO(b64decode(code))) as picture, Image.open(BytesIO(png(1))) as own:
        assert picture.convert("RGB").tobytes() == own.convert("RGB").tobytes()
    assert first["source"] == "rows:2"


def test_a_part_of_a_long_document_is_continued_from_its_first_target(model, tiny_processor):
    """What lies before the part is too long to be read again."""
    words = "context " * 60
    dataset = CPTDataset(
        [row(f"{words}<trainable_text>{digits(5)}</trainable_text>")], tiny_processor, max_length=32
    )
    opening = dataset.documents.opening(0)

    (found,) = continue_documents(model, dataset, tiny_processor, 4, EvalOptions())

    assert len(opening.sample) < 32
    assert found["truth"] == digits(5)


def test_a_video_before_the_span_is_seen(model, tiny_processor):
    rows = [row(f"<video>a<trainable_text>{digits(9)}</trainable_text>", videos=[avi(one)]) for one in (1, 2)]
    dataset = CPTDataset(rows, tiny_processor, max_length=64)

    opening = dataset.documents.opening(1)
    found = continue_documents(model, dataset, tiny_processor, 2, EvalOptions())

    assert opening.sample.pixel_values_videos is not None
    assert [one["before"] for one in found] == ["[video]a", "[video]a"]


def test_a_document_that_cannot_be_read_is_passed_over(model, tiny_processor, tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    lines = [f'{{"text": "<image>{digits(4, number)}", "images": ["{number}.png"]}}\n' for number in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    dataset = CPTDataset(tmp_path / "rows.jsonl", tiny_processor, max_length=64)
    (tmp_path / "0.png").write_bytes(png(0)[:60])  # its header is whole

    (found,) = continue_documents(model, dataset, tiny_processor, 1, EvalOptions())

    assert found["media"] == ["1.png"]


def test_only_the_last_pictures_are_shown_and_one_that_cannot_be_decoded_is_none(tiny_processor, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    images = '["0.png", "1.png", "2.png"]'
    line = f'{{"text": "{"<image>" * 3}<trainable_text>1</trainable_text>", "images": {images}}}\n'
    (tmp_path / "rows.jsonl").write_text(line)
    documents = CPTDataset(tmp_path / "rows.jsonl", tiny_processor, max_length=64).documents
    opening = documents.opening(0)
    (tmp_path / "1.png").write_bytes(b"no picture")

    found = documents.pictures(opening, 2, 160)

    assert [one[:15] for one in found] == ["", "data:image/png;"]


def test_the_models_mode_is_left_as_it_was(make_tiny_model, tiny_processor):
    model = make_tiny_model().train()

    continue_documents(
        model, CPTDataset(ROWS, tiny_processor, max_length=128), tiny_processor, 1, EvalOptions()
    )

    assert model.training
    assert not torch.is_inference_mode_enabled()
