"""Tests of vlcpt/model/vision_cache.py."""

import logging

import pytest
import torch
from torch.distributed.utils import _recursive_to

from tests.support import avi, png, row
from vlcpt import CPTDataCollator, CPTDataset, ModelConfig
from vlcpt.errors import ConfigError
from vlcpt.file_writes import WriteError
from vlcpt.model.tuning import apply_tuning, base_model
from vlcpt.model.vision_cache import open_store, require_frozen, with_features

ROWS = [
    row("<image>a<image><trainable_text>b</trainable_text>", images=[png(1), png(2, 84, 56)]),
    row("<video><trainable_text>c</trainable_text><image>d<trainable_text>e</trainable_text>",
        images=[png(3, 56, 84)], videos=[avi(1)]),
]  # fmt: skip


@pytest.fixture
def model(tiny_model):
    return tiny_model.requires_grad_(False).eval()


def batch_of(processor, store, rows=ROWS):
    dataset = CPTDataset(rows, processor, max_length=256)
    dataset.use_features(store)
    return CPTDataCollator(processor)([dataset[0]])


def logits(model, batch):
    names = ("labels", "loss_weights")
    with torch.no_grad():
        return model(**{name: value for name, value in batch.items() if name not in names}).logits


def calls_of(model):
    calls = []
    model.model.visual.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    return calls


@pytest.mark.usefixtures("one_thread")
def test_logits_are_those_of_pixels_to_the_bit_whatever_is_kept(model, tiny_processor, tmp_path):
    expected = logits(model, batch_of(tiny_processor, None))
    store = open_store(model, tmp_path)

    empty = with_features(model, batch_of(tiny_processor, store))
    complete = with_features(model, batch_of(tiny_processor, store))
    key = batch_of(tiny_processor, store)["media"][1].key
    store.path(key).unlink()
    partly = batch_of(tiny_processor, store)
    partly_kept = [one.is_kept for one in partly["media"]]

    assert partly_kept == [True, False, True, True]
    for found in (empty, complete, with_features(model, partly)):
        assert "pixel_values" not in found
        assert torch.equal(logits(model, found), expected)


def test_the_tower_is_called_once_a_kind_for_what_is_missing_and_never_again(model, tiny_processor, tmp_path):
    calls, store = calls_of(model), open_store(model, tmp_path)

    with_features(model, batch_of(tiny_processor, store))
    assert calls == [16 + 24 + 24, 32]  # patches of three images and of one clip

    with_features(model, batch_of(tiny_processor, store))
    assert len(calls) == 2


def test_an_image_that_comes_twice_in_a_batch_is_computed_once(model, tiny_processor, tmp_path):
    twice = row("<image>a<image>b<image><trainable_text>c</trainable_text>", images=[png(1), png(2), png(1)])
    store, calls = open_store(model, tmp_path), calls_of(model)

    batch = batch_of(tiny_processor, store, [twice])
    first, other, again = with_features(model, batch)["mm_encoder_outputs"]["image"].pooler_output

    assert calls == [2 * 16]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_an_earlier_batch_computed_is_taken_though_the_worker_had_not_seen_it(
    model, tiny_processor, tmp_path
):
    store = open_store(model, tmp_path)
    ahead = batch_of(tiny_processor, store)  # read before any of it is kept
    shared = batch_of(tiny_processor, store, [ROWS[0]])
    kept = with_features(model, shared)["mm_encoder_outputs"]["image"].pooler_output
    calls = calls_of(model)

    found = with_features(model, ahead)["mm_encoder_outputs"]["image"].pooler_output

    assert calls == [24, 32]
    assert torch.equal(torch.cat(list(found))[: sum(map(len, kept))], torch.cat(list(kept)))


def test_features_are_stored_in_the_type_in_which_the_tower_computes(
    make_tiny_model, tiny_processor, tmp_path
):
    for dtype, autocast, expected in (
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ):
        model = make_tiny_model(dtype=dtype).requires_grad_(False)
        store = open_store(model, tmp_path, autocast=autocast)
        with_features(model, batch_of(tiny_processor, store))

        kept = batch_of(tiny_processor, store)
        assert kept["image_features"].dtype == expected


def test_a_lower_type_is_used_from_the_first_batch_on(model, tiny_processor, tmp_path):
    store = open_store(model, tmp_path, dtype=torch.bfloat16)

    first = logits(model, with_features(model, batch_of(tiny_processor, store)))
    again = logits(model, with_features(model, batch_of(tiny_processor, store)))

    assert torch.equal(first, again)
    assert not torch.equal(first, logits(model, batch_of(tiny_processor, None)))


# --- what the features depend on ---


def test_features_of_other_weights_are_never_used(model, tiny_processor, tmp_path):
    before = open_store(model, tmp_path)
    with_features(model, batch_of(tiny_processor, before))

    with torch.no_grad():
        model.model.visual.merger.mlp[2].bias[0] += 1e-3

    after = open_store(model, tmp_path)
    batch = batch_of(tiny_processor, after)
    assert after.tower != before.tower
    assert not any(one.is_kept for one in batch["media"])
    expected = logits(model, batch_of(tiny_processor, None))
    assert torch.equal(logits(model, with_features(model, batch)), expected)


@pytest.mark.parametrize(
    "other",
    [{"autocast": torch.bfloat16}, {"converted": torch.bfloat16}, {"dtype": torch.bfloat16}],
    ids=["autocast", "converted", "stored"],
)
def test_features_in_other_types_are_others(model, tmp_path, other):
    assert open_store(model, tmp_path, **other).tower != open_store(model, tmp_path).tower


def test_features_of_the_other_patch_embedding_are_others(model, tmp_path):
    towers = [open_store(model, tmp_path, patch_embedding=form).tower for form in ("auto", "conv", "linear")]

    assert len(set(towers)) == 3


def test_another_configuration_of_the_tower_is_another_tower(model, tmp_path):
    before = open_store(model, tmp_path).tower
    model.config.vision_config.window_size *= 2

    assert open_store(model, tmp_path).tower != before


def test_the_language_model_is_no_part_of_it(make_tiny_model, tmp_path):
    model = make_tiny_model()
    before = open_store(model.requires_grad_(False), tmp_path)
    torch.nn.init.ones_(model.lm_head.weight)

    tuned = apply_tuning(model, ModelConfig("base"))

    assert open_store(tuned, tmp_path) == before


def test_weights_that_deepspeed_has_converted_are_the_same_tower(make_tiny_model, tmp_path):
    before = open_store(make_tiny_model().requires_grad_(False), tmp_path, converted=torch.bfloat16)
    after = make_tiny_model().requires_grad_(False).bfloat16()

    assert open_store(after, tmp_path, converted=torch.bfloat16) == before


@pytest.mark.parametrize(
    ("way", "name"),
    [
        ({"train_vision": True}, "vision tower"),
        ({"train_merger": True}, "merger"),
        ({"train_merger": True, "lora_towers": ["language"]}, "merger"),
        ({"tuning": "full", "train_merger": True}, "merger"),
    ],
)
def test_a_tower_that_changes_is_refused(make_tiny_model, way, name):
    model = apply_tuning(make_tiny_model(), ModelConfig("base", **way))

    with pytest.raises(ConfigError, match=f"vision_cache: the {name} trains or has an adapter"):
        require_frozen(model)


def test_an_adapter_that_does_not_train_is_refused_too(make_tiny_model):
    model = apply_tuning(make_tiny_model(), ModelConfig("base", train_vision=True)).requires_grad_(False)

    with pytest.raises(ConfigError, match="the vision tower trains or has an adapter"):
        require_frozen(model)


# --- where something is wrong ---


def test_a_damaged_file_is_computed_again_and_written_again(model, tiny_processor, tmp_path, caplog):
    store = open_store(model, tmp_path)
    with_features(model, batch_of(tiny_processor, store))
    one = batch_of(tiny_processor, store)["media"][0]
    store.path(one.key).write_bytes(store.path(one.key).read_bytes()[:-1])
    calls = calls_of(model)

    found = with_features(model, batch_of(tiny_processor, store))

    assert "is damaged" in caplog.text
    assert calls == [16]
    assert torch.equal(logits(model, found), logits(model, batch_of(tiny_processor, None)))
    assert store.get(one.key, one.tokens) is not None


def test_a_folder_that_cannot_be_written_to_is_a_warning_once_and_training_goes_on(
    model, tiny_processor, tmp_path, caplog
):
    (tmp_path / "file").write_text("in the way")
    store = open_store(model, tmp_path / "file")

    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            found = with_features(model, batch_of(tiny_processor, store))
        assert torch.equal(logits(model, found), logits(model, batch_of(tiny_processor, None)))

    assert caplog.text.count("could not be written") == 1
    assert "Training continues" in caplog.text
    with pytest.raises(WriteError):
        with_features(model, batch_of(tiny_processor, store), must_keep=True)


def test_pixels_beside_those_that_are_to_be_kept_are_refused(model, tiny_processor, tmp_path):
    dataset = CPTDataset([ROWS[0]], tiny_processor, max_length=256)
    dataset.use_features(open_store(model, tmp_path))
    plain = CPTDataset([ROWS[1]], tiny_processor, max_length=256)

    batch = CPTDataCollator(tiny_processor)([[*dataset[0], *plain[0]]])

    with pytest.raises(ValueError, match="3 images with pixels, but 2 are to be kept"):
        with_features(model, batch)


def test_where_parameters_are_partitioned_the_tower_is_never_called(model, tiny_processor, tmp_path):
    store = open_store(model, tmp_path)
    with_features(model, batch_of(tiny_processor, store))
    calls = calls_of(model)
    for parameter in model.model.visual.parameters():
        parameter.ds_id = 1  # as DeepSpeed marks them
    kept = batch_of(tiny_processor, store)

    assert with_features(model, kept)["mm_encoder_outputs"].keys() == {"image", "video"}
    store.path(kept["media"][0].key).unlink()
    with pytest.raises(ConfigError, match=r"features are missing.*zero3.*vlcpt prepare CONFIG"):
        with_features(model, batch_of(tiny_processor, store))
    assert calls == []


def test_a_batch_without_a_store_stays_as_it_is(model, tiny_processor):
    batch = batch_of(tiny_processor, None)

    assert with_features(model, batch) == batch


def test_ddp_hands_features_on_to_its_device(model, tiny_processor, tmp_path):
    found = with_features(model, batch_of(tiny_processor, open_store(model, tmp_path)))

    # What DDP does with the arguments of its forward where it has a GPU.
    (moved,) = _recursive_to(found, torch.device("cpu"), use_side_stream_for_tensor_copies=False)

    assert torch.equal(logits(base_model(model), moved), logits(model, found))


def test_features_are_not_taken_for_those_of_another_model(model, make_tiny_model, tiny_processor, tmp_path):
    batch = batch_of(tiny_processor, open_store(model, tmp_path))
    other = make_tiny_model(seed=1).requires_grad_(False)

    with pytest.raises(ValueError, match="features of another vision tower than this model's"):
        with_features(other, batch)


def test_features_that_an_earlier_pass_made_of_a_batch_are_kept(model, tiny_processor, tmp_path):
    batch = batch_of(tiny_processor, open_store(model, tmp_path))
    made = with_features(model, batch)["mm_encoder_outputs"]

    again = with_features(model, {**batch, "mm_encoder_outputs": made})

    assert again["mm_encoder_outputs"] is made
    assert "pixel_values" not in again
    assert "media" not in again


def test_what_a_batch_computes_of_a_kind_is_copied_from_the_device_at_once(
    model, tiny_processor, tmp_path, monkeypatch
):
    store, put = open_store(model, tmp_path), []
    monkeypatch.setattr(type(store), "put", lambda self, key, features: put.append(features))

    with_features(model, batch_of(tiny_processor, store))

    memories = [one.untyped_storage().data_ptr() for one in put]
    assert len(put) == 4  # three images, one clip
    assert len(set(memories)) == 2
