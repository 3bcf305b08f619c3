"""Tests of vlcpt/data/encode/fillers.py: one token, no target, nothing that it changes."""

import pytest
import torch

from tests.support import FOUR, encode_rows, largest_deviation, make_trainer
from vlcpt import CPTDataCollator, CPTDataset, ModelConfig, load_model
from vlcpt.data.encode.fillers import make_fillers
from vlcpt.training.loss import target_losses, total_weight

BOTH = ("image", "video")


@pytest.fixture(scope="module")
def samples(tiny_processor):
    """With an image, with text alone, with images and a video, with text alone."""
    return encode_rows(FOUR, tiny_processor)


def test_a_filler_has_the_positions_of_the_model_itself(tiny_model, tiny_processor):
    for modality, filler in make_fillers(tiny_processor, BOTH).items():
        types = torch.tensor([[0, 1 if modality == "image" else 2, 0]])
        positions, _ = tiny_model.model.get_rope_index(
            filler.input_ids[None],
            types,
            image_grid_thw=filler.image_grid_thw,
            video_grid_thw=filler.video_grid_thw,
            second_per_grid_ts=torch.ones(1),
        )

        assert filler.position_ids.tolist() == positions[:, 0].tolist()
        assert (filler.labels == -100).all()


def test_a_batch_gets_what_it_lacks_and_no_more(samples, tiny_processor):
    collate = CPTDataCollator(tiny_processor, fill_modalities=BOTH)
    image, text, both, _ = samples
    added = {}
    for name, sample in {"image": image, "text": text, "both": both}.items():
        batch = collate([[sample]])
        added[name] = batch["input_ids"].shape[1] - len(sample)
        assert batch["pixel_values"].shape[1] == batch["pixel_values_videos"].shape[1] == 1176
        assert batch["image_grid_thw"].shape[1] == batch["video_grid_thw"].shape[1] == 3

    assert added == {"image": 3, "text": 6, "both": 0}


def test_a_filler_is_a_document_of_its_own_at_the_end_of_the_shortest_row(samples, tiny_processor):
    image, text, both, other = samples
    rows = [[both], [image, text, other]]
    assert len(both) > len(image) + len(text) + len(other) + 3
    without_images = [[text, other], [other]]

    unchanged = CPTDataCollator(tiny_processor, fill_modalities=BOTH)(rows)
    filled = CPTDataCollator(tiny_processor, fill_modalities=["image"])(without_images)

    assert unchanged["input_ids"].shape[1] == len(both)
    assert filled["input_ids"].shape[1] == len(text) + len(other)  # there was room
    there = slice(len(other), len(other) + 3)
    assert filled["input_ids"][1, there].tolist() == [
        tiny_processor.tokenizer.convert_tokens_to_ids(name)
        for name in ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
    ]
    assert filled["position_ids"][0, 1, there].tolist() == [0, 1, 2]
    assert (filled["labels"][1, there] == -100).all()
    assert filled["position_ids"][0, 1, there.stop] == 0  # padding is a document again


def test_a_pack_of_which_nothing_is_left_still_calls_the_vision_tower(tiny_processor):
    batch = CPTDataCollator(tiny_processor, fill_modalities=BOTH)([[]])

    assert batch["input_ids"].shape == (1, 6)
    assert total_weight(batch) == 0


@pytest.mark.parametrize("kept", [[1], [0], [1, 3]], ids=["text", "image", "two texts"])
def test_loss_and_gradients_are_those_without_a_filler(tiny_model_dir, tiny_processor, samples, kept):
    found = []
    calls = []
    for fill in ((), BOTH):
        model = load_model(
            ModelConfig(str(tiny_model_dir), tuning="full", train_vision=True, train_merger=True)
        ).double()  # float32 rounds by nearly as much as is allowed here
        model.model.visual.register_forward_hook(lambda *ignored: calls.append(1))
        batch = CPTDataCollator(tiny_processor, fill_modalities=fill)([[samples[number] for number in kept]])
        losses = target_losses(model, batch)
        assert len(losses.nll) > 0
        loss = (losses.nll * losses.weights).sum() / losses.weights.sum()
        loss.backward()
        zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.item(), zeros | gradients))
        calls.append(0)

    assert calls == [*([1] * (0 in kept)), 0, 1, 1, 0]
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert largest_deviation(found[1][1], found[0][1]) < 1e-6


def test_an_unknown_modality_is_refused(tiny_processor):
    with pytest.raises(ValueError, match=r"fill_modalities has 'audio'\. Its values are image"):
        CPTDataCollator(tiny_processor, fill_modalities=["audio"])


def test_the_trainer_fills_what_the_run_has_where_a_tower_trains(tiny_model_dir, tiny_processor, tmp_path):
    with_images = CPTDataset(FOUR[:2], tiny_processor, max_length=128)
    with_videos = CPTDataset(FOUR[2:], tiny_processor, max_length=128)
    text = CPTDataset(FOUR[1:2], tiny_processor, max_length=128)
    assert (with_images.modalities, with_videos.modalities, text.modalities) == (("image",), BOTH, ())
    filled = {}
    for name, towers, train, evaluation in (
        ("frozen", {}, with_videos, None),
        ("merger", {"train_merger": True}, with_images, None),
        ("text", {"train_merger": True}, text, None),
        ("evaluation", {"train_vision": True}, text, {"a": text, "b": with_videos}),
    ):
        model = load_model(ModelConfig(str(tiny_model_dir), lora_r=2, **towers))
        trainer = make_trainer(model, train, tiny_processor, tmp_path, eval_dataset=evaluation)
        filled[name] = trainer.data_collator.fill_modalities

    assert filled == {"frozen": (), "merger": ("image",), "text": (), "evaluation": BOTH}
