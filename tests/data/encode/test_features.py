"""Tests of vlcpt/data/encode/features.py."""

import copy
import logging
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.support import avi, png, row
from vlcpt import CPTDataCollator, CPTDataset
from vlcpt.data.encode.features import FeatureStore, sweep

WIDTH = 8


@pytest.fixture
def store(tmp_path):
    return FeatureStore(tmp_path / "cache", "tower", WIDTH)


def some(tokens=5, seed=0, dtype=torch.float32):
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_come_back_to_the_bit_and_in_their_type(store, dtype):
    store.put("key", some(dtype=dtype))

    found = store.get("key", 5)

    assert found.dtype == dtype
    assert torch.equal(found, some(dtype=dtype))


def test_a_lower_type_is_stored_only_where_it_was_asked_for(tmp_path):
    store = FeatureStore(tmp_path, "tower", WIDTH, dtype=torch.bfloat16)

    store.put("key", some())

    assert torch.equal(store.get("key", 5), some().bfloat16())


def test_features_are_mapped_and_not_read_into_memory(store):
    store.put("key", some(200_000))
    path = str(store.path("key"))

    found = store.get("key", 200_000)

    with open("/proc/self/maps", encoding="utf-8") as maps:
        assert any(path in line for line in maps)
    del found


def test_a_file_is_plain_safetensors(store):
    store.put("key", some())

    assert torch.equal(load_file(store.path("key"))["features"], some())


def cut(content):
    return content[:-7]


def flipped(content):
    return content[:-7] + bytes([content[-7] ^ 1]) + content[-6:]


def emptied(content):
    return b""


def without_header(content):
    return bytes(len(content))


@pytest.mark.parametrize("damage", [cut, flipped, emptied, without_header])
def test_a_damaged_file_counts_as_missing_with_a_warning(store, caplog, damage):
    store.put("key", some())
    path = store.path("key")
    path.write_bytes(damage(path.read_bytes()))

    with caplog.at_level(logging.WARNING):
        found = store.get("key", 5)

    assert found is None
    assert f"{path} is damaged" in caplog.text
    assert "computed again" in caplog.text
    store.put("key", some())
    assert store.get("key", 5) is not None


def test_a_file_that_got_the_name_of_another_is_not_used(store):
    store.put("aakey", some())
    store.path("aaother").write_bytes(store.path("aakey").read_bytes())

    assert store.get("aaother", 5) is None


def test_features_of_another_number_of_tokens_are_not_used(store):
    store.put("key", some(5))

    assert store.get("key", 6) is None


def test_nothing_is_found_and_nothing_said_where_nothing_is(store, caplog):
    assert store.get("key", 5) is None
    assert caplog.text == ""
    assert not store.is_begun


# --- keys ---


def dataset_of(rows, processor, store, **options):
    dataset = CPTDataset(rows, processor, max_length=256, **options)
    dataset.use_features(store)
    return dataset


def media_of(rows, processor, store, **options):
    dataset = dataset_of(rows, processor, store, **options)
    return [one for number in range(len(dataset)) for sample in dataset[number] for one in sample.media]


def filled(store, media):
    """A store in which all of these media are, each with features of its own."""
    wide = FeatureStore(store.folder, store.tower, WIDTH)
    for number, one in enumerate(media):
        wide.put(one.key, some(one.tokens, number))
    return wide


IMAGE = row("<image>one <trainable_text>two</trainable_text>", images=[png(1)])
CLIP = row("<video>one <trainable_text>two</trainable_text>", videos=[avi(1)])


@pytest.mark.parametrize("one", [IMAGE, CLIP], ids=["image", "video"])
def test_a_medium_whose_features_are_kept_is_not_decoded(tiny_processor, store, one, monkeypatch):
    filled(store, media_of([one], tiny_processor, store))
    for name in ("read_image", "read_video"):
        monkeypatch.setattr(f"vlcpt.data.encode.vision.{name}", None)  # to call it is an error

    (sample,) = dataset_of([one], tiny_processor, store)[0]

    assert sample.media[0].is_kept
    assert sample.pixel_values is None
    assert sample.pixel_values_videos is None
    features = sample.image_features if one is IMAGE else sample.video_features
    assert features.shape == (sample.media[0].tokens, WIDTH)


def test_features_stand_in_the_order_of_the_media_in_the_batch(tiny_processor, store):
    rows = [
        row("<image>a<image><trainable_text>b</trainable_text>", images=[png(1), png(2, 84, 56)]),
        row("<image><trainable_text>c</trainable_text>", images=[png(3, 56, 84)]),
    ]
    media = media_of(rows, tiny_processor, store)
    filled(store, media)
    dataset = dataset_of(rows, tiny_processor, store)

    batch = CPTDataCollator(tiny_processor)([dataset[0]])

    assert [one.key for one in batch["media"]] == [one.key for one in media]
    expected = torch.cat([some(one.tokens, number) for number, one in enumerate(media)])
    assert torch.equal(batch["image_features"], expected)
    assert "pixel_values" not in batch
    assert "image_grid_thw" not in batch


def test_only_media_without_features_have_pixels(tiny_processor, store):
    rows = [row("<image>a<image><trainable_text>b</trainable_text>", images=[png(1), png(2, 84, 56)])]
    first, _ = media_of(rows, tiny_processor, store)
    store.put(first.key, some(first.tokens))
    dataset = dataset_of(rows, tiny_processor, store)

    batch = CPTDataCollator(tiny_processor)([dataset[0]])

    assert [one.is_kept for one in batch["media"]] == [True, False]
    assert len(batch["image_features"]) == first.tokens
    assert batch["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert len(batch["pixel_values"]) == 24


def test_other_pixels_than_a_documents_own_are_never_from_the_store(tiny_processor, store):
    rows = [IMAGE, row("<image>a <trainable_text>b</trainable_text>", images=[png(9)])]
    filled(store, media_of(rows, tiny_processor, store))
    dataset = dataset_of(rows, tiny_processor, store)

    for pixels_of in ("blank", "next_document"):
        samples = dataset.with_pixels_of(pixels_of)[0]
        assert all(sample.media == () and sample.pixel_values is not None for sample in samples)


def key_of(one, processor, store, **options):
    (medium,) = media_of([one], processor, store, **options)
    return medium.key


@pytest.mark.parametrize("one", [IMAGE, CLIP], ids=["image", "video"])
@pytest.mark.parametrize(
    ("name", "value"), [("image_mean", (0.5, 0.5, 0.5)), ("image_std", (0.5, 0.5, 0.5)), ("resample", 2)]
)
def test_other_settings_of_the_processor_are_another_key(tiny_processor, store, one, name, value):
    other = copy.deepcopy(tiny_processor)
    setattr(other.image_processor, name, value)
    setattr(other.video_processor, name, value)

    assert key_of(one, other, store) != key_of(one, tiny_processor, store)


def test_another_grid_is_another_key(tiny_processor, store):
    before = key_of(IMAGE, tiny_processor, store)

    assert key_of(IMAGE, tiny_processor, store, max_pixels=28 * 56) != before
    assert key_of(IMAGE, tiny_processor, store, max_pixels=10**6) == before  # the same pixels


def test_other_frames_of_a_clip_are_another_key(tiny_processor, store):
    before = key_of(CLIP, tiny_processor, store)

    assert key_of(CLIP, tiny_processor, store, fps=4.0) != before
    # As many frames on the same grid, from other places: one that is twice as long.
    longer = row(CLIP["text"], videos=[avi(1, frames=32)])
    assert key_of(longer, tiny_processor, store, max_frames=4) != before


def test_a_file_with_other_content_is_another_key(tiny_processor, store, tmp_path):
    rows = [{"text": "<image>a <trainable_text>b</trainable_text>", "images": [str(tmp_path / "a.png")]}]
    (tmp_path / "a.png").write_bytes(png(1))
    dataset = dataset_of(rows, tiny_processor, store)
    (before,) = dataset[0][0].media
    store.put(before.key, some(before.tokens))
    assert dataset[0][0].media[0].is_kept

    (tmp_path / "a.png").write_bytes(png(2))

    (after,) = dataset[0][0].media
    assert after.key != before.key
    assert not after.is_kept
    assert dataset[0][0].pixel_values is not None


def test_where_a_file_lies_is_not_in_its_key(tiny_processor, store, tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    by_path = {**IMAGE, "images": [str(tmp_path / "a.png")]}

    assert key_of(by_path, tiny_processor, store) == key_of(IMAGE, tiny_processor, store)


# --- many processes ---


def write_some(folder, worker, keys, tokens, failed):
    store = FeatureStore(folder, "tower", WIDTH)
    for number in random.Random(worker).sample(range(keys), keys):
        found = store.get(f"{number:04}", tokens)
        if found is not None and not torch.equal(found, some(tokens, number)):
            failed.value = 1
        store.put(f"{number:04}", some(tokens, number))


@pytest.mark.slow
def test_many_processes_that_write_the_same_media_leave_each_whole(store, caplog):
    context = multiprocessing.get_context("fork")
    failed = context.Value("i", 0)
    given = [(store.folder, worker, 60, 500, failed) for worker in range(8)]
    processes = [context.Process(target=write_some, args=one) for one in given]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)

    assert [process.exitcode for process in processes] == [0] * 8
    assert not failed.value
    assert all(torch.equal(store.get(f"{number:04}", 500), some(500, number)) for number in range(60))
    assert caplog.text == ""
    assert not list(store.folder.rglob("*.partial"))


def write_for_ever(folder):
    store = FeatureStore(folder, "tower", WIDTH)
    while True:
        for number in range(4):
            store.put(f"{number:04}", some(40_000, number))


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_writes_leaves_no_part_of_a_file(store, caplog):
    found = 0
    for attempt in range(15):
        process = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(store.folder,))
        process.start()
        time.sleep(0.05 + 0.01 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
        for number in range(4):
            features = store.get(f"{number:04}", 40_000)
            assert features is None or torch.equal(features, some(40_000, number))
            found += features is not None

    assert found
    assert caplog.text == ""


def test_what_a_killed_process_left_is_swept_away_and_nothing_else(store):
    store.put("key", some())
    old, new = (store.path("key").with_name(f".{name}.partial") for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"part")
    os.utime(old, (0, 0))

    sweep(store.folder)

    assert not old.exists()
    assert new.exists()
    assert store.get("key", 5) is not None
