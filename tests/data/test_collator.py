"""One batch from packs: rows, documents apart, media in order."""

import pytest
import torch

from tests.support import avi, png, row
from vlcpt import CPTDataCollator, encode_document, parse_markup


def encode(processor, text, images=(), videos=()):
    found = row(text, images=images, videos=videos)
    document = parse_markup(found["text"], found.get("images", ()), found.get("videos", ()))
    return encode_document(document, processor)


@pytest.fixture(scope="module")
def samples(tiny_processor):
    return {
        "text": encode(tiny_processor, "12<trainable_text>3</trainable_text>"),
        "image": encode(tiny_processor, "1<image>2", images=[png(1)]),
        "two": encode(tiny_processor, "<image>1<image>", images=[png(2, 28, 84), png(3, 84, 28)]),
        "video": encode(tiny_processor, "<video>1", videos=[avi(1)]),
        "both": encode(tiny_processor, "<video>1<image>", images=[png(4)], videos=[avi(2)]),
    }


@pytest.fixture(scope="module")
def batch(samples, tiny_processor):
    packs = [
        [samples["text"], samples["image"]],
        [samples["two"]],
        [samples["both"], samples["video"], samples["text"]],
    ]
    return CPTDataCollator(tiny_processor)(packs)


def test_a_batch_has_the_shapes_it_promises(batch, samples):
    length = len(samples["both"]) + len(samples["video"]) + len(samples["text"])
    for name in ("input_ids", "labels", "loss_weights"):
        assert batch[name].shape == (3, length)
    assert batch["position_ids"].shape == (4, 3, length)
    assert batch["pixel_values"].shape == (16 + 12 + 12 + 16, 1176)
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4], [1, 6, 2], [1, 2, 6], [1, 4, 4]]
    assert batch["pixel_values_videos"].shape == (64, 1176)
    assert batch["video_grid_thw"].tolist() == [[2, 4, 4], [2, 4, 4]]
    for name in ("input_ids", "labels", "position_ids", "image_grid_thw", "video_grid_thw"):
        assert batch[name].dtype == torch.int64
    for name in ("loss_weights", "pixel_values", "pixel_values_videos"):
        assert batch[name].dtype == torch.float32


def test_input_ids_come_first_because_trainer_reads_the_batch_size_there(batch):
    assert next(iter(batch)) == "input_ids"


def test_there_is_no_cache_and_no_mask_so_that_documents_stay_apart(batch):
    assert batch["use_cache"] is False
    assert "attention_mask" not in batch


def test_pixels_are_in_the_order_of_rows_and_samples(batch, samples):
    images = [samples[name].pixel_values for name in ("image", "two", "both")]
    videos = [samples[name].pixel_values_videos for name in ("both", "video")]
    assert torch.equal(batch["pixel_values"], torch.cat(images))
    assert torch.equal(batch["pixel_values_videos"], torch.cat(videos))


def test_the_text_row_begins_again_with_every_document(batch, samples):
    lengths = [len(samples[name]) for name in ("both", "video", "text")]
    assert batch["position_ids"][0, 2].tolist() == [n for length in lengths for n in range(length)]
    wanted = torch.cat([samples[name].position_ids for name in ("both", "video", "text")], dim=1)
    assert torch.equal(batch["position_ids"][1:, 2], wanted)


def test_padding_is_a_document_of_its_own_and_no_target(batch, samples, tiny_processor):
    end = len(samples["text"]) + len(samples["image"])
    room = batch["input_ids"].shape[1] - end
    assert room > 0
    pad = tiny_processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert batch["input_ids"][0, end:].tolist() == [pad] * room
    assert batch["labels"][0, end:].tolist() == [-100] * room
    assert batch["loss_weights"][0, end:].tolist() == [0.0] * room
    assert batch["position_ids"][:, 0, end:].tolist() == [list(range(room))] * 4


def test_end_of_text_before_the_padding_stays_a_target(samples, tiny_processor):
    """Both have the same id: nothing may tell them apart by it."""
    trained = encode(tiny_processor, "1<trainable_text>2</trainable_text>")
    batch = CPTDataCollator(tiny_processor)([[trained], [samples["two"]]])
    assert batch["labels"][0, :4].tolist() == [-100, *trained.input_ids[1:].tolist(), -100]


def test_no_document_has_its_first_token_as_a_target(batch):
    first = batch["position_ids"][0] == 0
    assert first.sum() == 2 + 1 + 1 + 1 + 3  # documents, and the padding of two rows
    assert (batch["labels"][first] == -100).all()


def test_a_batch_of_text_alone_has_no_pixels(samples, tiny_processor):
    batch = CPTDataCollator(tiny_processor)([[samples["text"]]])
    bounds = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "document_lengths"}
    assert set(batch) == {"input_ids", "labels", "loss_weights", "position_ids", "use_cache", *bounds}


def test_a_sample_alone_is_a_pack_of_one(samples, tiny_processor):
    collate = CPTDataCollator(tiny_processor)
    alone, packed = collate([samples["image"]]), collate([[samples["image"]]])
    assert alone.keys() == packed.keys()
    for key, value in alone.items():
        same = torch.equal(value, packed[key]) if isinstance(value, torch.Tensor) else value == packed[key]
        assert same, key


def test_the_bounds_are_those_of_the_documents_and_of_the_padding(batch):
    """Told by the text row, which begins at 0 with each of them."""
    starts = (batch["position_ids"][0].flatten() == 0).nonzero()[:, 0].tolist()

    assert batch["cu_seq_lens_q"].tolist() == [*starts, batch["input_ids"].numel()]
    assert batch["cu_seq_lens_q"].dtype == torch.int32  # what kernels take
    assert batch["document_lengths"] == batch["cu_seq_lens_k"].diff().tolist()
    assert batch["max_length_q"] == batch["max_length_k"] == max(batch["document_lengths"])


def test_what_the_vision_tower_takes_is_what_it_works_out_itself(
    batch, samples, tiny_processor, make_tiny_model
):
    tower = make_tiny_model().model.visual
    collate = CPTDataCollator(tiny_processor)
    collate.window_size = tower.config.window_size
    given = collate([[samples["both"], samples["two"]], [samples["image"]]])

    for modality, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        prefix = f"{modality}_"
        told = {name.removeprefix(prefix): one for name, one in given.items() if name.startswith(prefix)}
        grids = told.pop("grid_thw")
        assert {"window_index", "cu_window_seqlens", "cu_seqlens", "position_ids"} <= told.keys()
        # Wrong ones would be used, so that this compares what is given with what is worked out.
        assert torch.equal(
            tower(given[pixels], grids, **told).pooler_output, tower(given[pixels], grids).pooler_output
        )
        with pytest.raises(IndexError):
            tower(given[pixels], grids, **told | {"window_index": told["window_index"] + 10_000})


def test_the_model_takes_a_batch_as_it_is(batch, make_tiny_model):
    arguments = {key: value for key, value in batch.items() if key not in ("labels", "loss_weights")}
    with torch.no_grad():
        logits = make_tiny_model()(**arguments).logits
    assert logits.shape[:2] == batch["input_ids"].shape
    assert logits.isfinite().all()
