"""Pictures in memory become the pixels that their files become, alike in every process."""

import pickle
from io import BytesIO

import datasets
import numpy as np
import pytest
from PIL import Image as PILImage
from torch.utils.data import ConcatDataset, DataLoader

from vlcpt import CPTDataset, Image, load_processor
from vlcpt.data.media.open import read_image
from vlcpt.data.media.references import medium_at
from vlcpt.demo import base_path

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 4), dtype=np.uint8)


def picture(mode):
    if mode == "I;16":
        return PILImage.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    if mode in ("I", "F"):
        return PILImage.fromarray(PIXELS[..., 0].astype(np.int32 if mode == "I" else np.float32) * 300)
    return PILImage.fromarray(PIXELS, "RGBA").convert("RGB" if mode == "P" else "RGBA").convert(mode)


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        *(("RGB", "PNG"), ("RGBA", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("1", "PNG"), ("P", "PNG")),
        *(("I;16", "PNG"), ("I", "TIFF"), ("F", "TIFF"), ("CMYK", "TIFF")),
    ],
)
def test_a_picture_in_memory_has_the_pixels_of_its_file(mode, format):
    file = BytesIO()
    picture(mode).save(file, format)
    expected = read_image(medium_at(Image, {"bytes": file.getvalue()}), media_root=None)

    for given in (picture(mode), PILImage.open(file)):
        assert given.mode == mode
        found = read_image(medium_at(Image, given), media_root=None)
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "I;16", "F"])
def test_a_picture_and_its_copy_in_another_process_have_the_same_bytes(mode):
    one = picture(mode)
    assert medium_at(Image, one) == medium_at(Image, pickle.loads(pickle.dumps(one)))
    assert medium_at(Image, one) == medium_at(Image, one.copy())
    assert medium_at(Image, one) != medium_at(Image, PILImage.new("RGB", one.size))


def test_a_transparent_colour_of_a_palette_stays_transparent():
    one = PILImage.new("P", (2, 2), 1)
    one.putpalette([0, 0, 0, 255, 0, 0])
    one.info["transparency"] = 1
    assert read_image(medium_at(Image, one), media_root=None).getpixel((0, 0)) == (255, 255, 255)


def test_a_picture_that_its_camera_turned_is_upright():
    exif = PILImage.Exif()
    exif[274] = 6
    file = BytesIO()
    PILImage.fromarray(PIXELS[..., :3]).save(file, "PNG", exif=exif)
    expected = read_image(medium_at(Image, {"bytes": file.getvalue()}), media_root=None)
    found = read_image(medium_at(Image, PILImage.open(file)), media_root=None)
    assert found.size == expected.size == (6, 8)
    assert found.tobytes() == expected.tobytes()


def test_limits_beside_a_picture_are_its_own():
    found = medium_at(Image, picture("RGB"), "images[0]", {"max_pixels": 3136})
    assert found.max_pixels == 3136
    assert found.data


def test_a_dataset_of_pictures_gives_the_same_items_in_a_spawned_worker():
    """One worker for rows and for a ``datasets.Dataset``: it imports for ten seconds what it needs."""
    rows = [
        {"messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": f"{n}"}]}
        | {"images": [PILImage.fromarray(np.full((56, 56, 3), n * 60, np.uint8))]}
        for n in range(3)
    ]
    features = datasets.Features(
        {
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "images": [datasets.Image()],
        }
    )
    not_decoded = datasets.Dataset.from_list(rows, features=features)
    processor = load_processor(base_path())
    both = [CPTDataset(one, processor, max_length=16, packing=False) for one in (rows, not_decoded)]
    assert [one.ledger.total.documents["used"] for one in both] == [3, 3]

    items = [dataset[number] for dataset in both for number in range(3)]
    spawned = DataLoader(ConcatDataset(both), None, num_workers=1, multiprocessing_context="spawn")
    for item, other in zip(items, spawned, strict=True):
        assert [one.input_ids.tolist() for one in item] == [one.input_ids.tolist() for one in other]
        assert [one.pixel_values.tolist() for one in item] == [one.pixel_values.tolist() for one in other]
    assert len({str(item[0].pixel_values.tolist()) for item in items[:3]}) == 3  # each its own


def test_a_tiff_that_pillow_turned_as_it_was_decoded_is_not_turned_again():
    """Its tags still say that it was to be."""
    exif = PILImage.Exif()
    exif[274] = 6
    file = BytesIO()
    exif[33723] = b"iptc"  # which Pillow would write again
    PILImage.fromarray(PIXELS[..., :3]).save(file, "TIFF", exif=exif)
    opened = PILImage.open(file)
    opened.load()
    assert opened.size == (6, 8)

    found = read_image(medium_at(Image, opened), media_root=None)

    assert found.tobytes() == opened.tobytes()
    assert medium_at(Image, opened) == medium_at(Image, opened.copy())
