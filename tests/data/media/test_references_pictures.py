"""PIL images in memory: the pixels of the same picture from a file, in every format, and what is refused."""

import io
import pickle

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader

from tests.processes import UNFORKED
from tests.support import opened, png
from vlcpt import CPTDataset, DocumentError, Image, load_processor
from vlcpt.data.media.open import MediaError, MediaLimits, read_image
from vlcpt.data.media.references import medium_at, picture_bytes
from vlcpt.demo import base_path

RGBA = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 84, 4), dtype=np.uint8))
PICTURES = {mode: RGBA.convert(mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr")}
PICTURES["I;16"] = PIL.Image.fromarray(np.arange(56 * 84, dtype=np.uint16).reshape(56, 84) * 13)
PICTURES["F"] = PIL.Image.fromarray(np.linspace(0, 1, 56 * 84, dtype=np.float32).reshape(56, 84))
for mode in ("P", "L"):
    PICTURES[f"{mode} with a transparent colour"] = RGBA.convert(mode)
    PICTURES[f"{mode} with a transparent colour"].info["transparency"] = 7
# What cannot be a PNG is compared with what else Pillow writes to the bit.
FORMATS = {"CMYK": "TIFF", "F": "TIFF"}


def saved(picture, format="PNG", **options):
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def pixels(reference, **limits):
    return np.asarray(
        read_image(medium_at(Image, reference), media_root=None, limits=MediaLimits(**limits)), dtype=int
    )


@pytest.mark.parametrize("mode", PICTURES)
def test_pixels_in_memory_are_those_of_the_same_picture_from_a_file(mode):
    picture = PICTURES[mode]
    # YCbCr has no file to the bit: Pillow's own conversion is what files of it go through.
    file = picture.convert("RGB") if mode == "YCbCr" else picture
    wanted = pixels(Image(data=saved(file, FORMATS.get(mode, "PNG"))))

    assert wanted.std() > 10  # or equal pixels prove nothing
    assert (pixels(picture) == wanted).all()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("decoded", [True, False])
def test_a_picture_that_was_opened_is_its_file_decoded_or_not(tmp_path, format, decoded):
    (tmp_path / "a").write_bytes(saved(RGBA.convert("RGB"), format))
    picture = PIL.Image.open(tmp_path / "a")
    wanted = np.asarray(PIL.Image.open(tmp_path / "a").convert("RGB"), dtype=int)
    if decoded:
        picture.load()

    assert (pixels(picture) == wanted).all()
    assert (pixels(picture) == wanted).all()  # nothing of it was used up
    assert (np.asarray(picture.convert("RGB")) == wanted).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("decoded", [True, False])
def test_a_camera_held_in_any_way_gives_an_upright_picture(orientation, decoded):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    file = saved(RGBA.convert("RGB"), "JPEG", exif=exif)
    picture = PIL.Image.open(io.BytesIO(file))
    if decoded:
        picture.load()
    assert (pixels(picture) == pixels(Image(data=file))).all()


def test_a_frame_that_was_sought_is_the_one_that_is_read():
    frames = [PIL.Image.new("RGB", (56, 56), colour) for colour in ("red", "blue")]
    picture = PIL.Image.open(io.BytesIO(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    picture.seek(1)
    assert pixels(picture)[0, 0].tolist() == [0, 0, 255]


def test_the_same_picture_gives_the_same_bytes():
    for picture in PICTURES.values():
        assert picture_bytes(picture) == picture_bytes(picture.copy())


@pytest.mark.parametrize("mode", PICTURES)
def test_a_spawned_worker_gets_the_same_picture(mode):
    """Pillow's own pickle forgets the transparency of a palette."""
    source = opened([{"text": "<image>a", "images": [PICTURES[mode]]}])
    rows = pickle.loads(pickle.dumps(source.rows))
    assert (pixels(rows.row(0)["images"][0]) == pixels(PICTURES[mode])).all()


def test_rows_with_a_picture_that_was_closed_reach_a_spawned_worker():
    with PIL.Image.open(io.BytesIO(png(1))) as picture:
        stream = picture.fp
    stream.close()
    source = opened([{"text": "a"}, {"text": "<image>a", "images": [picture]}])
    assert pickle.loads(pickle.dumps(source.rows)).row(0) == {"text": "a"}


def test_a_picture_whose_file_was_closed_is_an_error_with_row_and_field(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    with PIL.Image.open(tmp_path / "a.png") as picture:
        pass
    (tmp_path / "a.png").unlink()
    row = {"messages": [{"role": "assistant", "content": [{"type": "image", "image": picture}]}]}
    with pytest.raises(
        DocumentError, match=r"closed before its pixels were decoded. Call its load\(\)"
    ) as got:
        opened([row]).document(0)
    assert str(got.value).startswith("rows:1: messages[0].content[0].image: a PIL image: ")


def test_a_picture_cut_short_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    picture = PIL.Image.open(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(png(1)[:2000])
    with pytest.raises(MediaError, match="cut short, damaged"):
        pixels(picture)


@pytest.mark.parametrize("decoded", [True, False])
def test_the_limit_on_pixels_holds(decoded):
    picture = PIL.Image.open(io.BytesIO(png(1)))
    if decoded:
        picture.load()
    with pytest.raises(MediaError, match=r"56 × 56 = 3,136 pixels, above max_image_pixels = 3,135"):
        pixels(picture, max_image_pixels=3135)


def test_a_picture_is_no_video():
    with pytest.raises(DocumentError, match=r"videos\[0\]: a media reference must be a path"):
        opened([{"text": "<video>", "videos": [RGBA]}]).document(0)


ASKED = {"role": "user", "content": [{"type": "image", "image": RGBA}, {"type": "text", "text": "What?"}]}
ANSWER = {"role": "assistant", "content": "Noise."}
ROWS = {
    "vlcpt": {"text": "<image>a", "images": [RGBA]},
    "vlcpt with sizes": {"text": "<image>a", "images": [{"bytes": RGBA, "max_pixels": 3136}]},
    "segments": {
        "segments": [{"type": "image", "image": RGBA}, {"type": "text", "text": "a", "trainable": True}]
    },
    "sharegpt": {"conversations": [{"from": "gpt", "value": "a"}], "image": RGBA},
    "messages": {"messages": [ASKED, ANSWER]},
    "messages by list": {"messages": [{"role": "user", "content": "<image>What?"}, ANSWER], "images": [RGBA]},
    "messages by index": {
        "messages": [{"role": "user", "content": [{"type": "image", "index": 0}]}, ANSWER],
        "images": [RGBA],
    },
    "messages by url": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": RGBA}}]},
            ANSWER,
        ]
    },
    "messages with sizes": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": RGBA, "max_pixels": 3136}]},
            ANSWER,
        ]
    },
    "caption": {"image": RGBA, "caption": "a"},
    "obelics": {"images": [RGBA, None], "texts": [None, "a"]},
    "mmc4": {"text_list": ["a"], "image_info": [{"raw_url": RGBA, "matched_text_index": 0}]},
}


@pytest.mark.parametrize("form", ROWS)
def test_a_row_of_any_format_may_hold_a_picture(form):
    document = opened([ROWS[form]]).document(0)
    in_a_worker = pickle.loads(pickle.dumps(opened([ROWS[form]]).rows)).row(0)
    assert opened([in_a_worker]).document(0) == document
    (image,) = document.images
    assert (pixels(image) == pixels(Image(data=saved(RGBA)))).all()
    assert image.max_pixels == (3136 if "sizes" in form else None)
    assert document.not_read == ()


ROW = {"text": "<image>a <trainable_text>b</trainable_text>", "images": [RGBA]}


@pytest.mark.parametrize("way", ["decoded", "not decoded", "listed"])
def test_a_dataset_with_images_gives_the_same_documents(way):
    feature = datasets.Image(decode=way != "not decoded")
    features = datasets.Features({"text": datasets.Value("string"), "images": [feature]})
    found = datasets.Dataset.from_list([ROW] * 2, features=features)
    rows = list(found) if way == "listed" else found
    if way == "listed":
        assert isinstance(rows[0]["images"][0], PIL.Image.Image)
    document = opened(rows).document(1)
    (image,) = document.images
    assert (pixels(image) == pixels(RGBA)).all()


def items(rows, workers, start=None):
    dataset = CPTDataset(rows, load_processor(base_path()), max_length=512, packing=False)
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=start,
        collate_fn=list,
    )
    samples = sorted((sample for item in loader for sample in item), key=lambda one: one.input_ids.tolist())
    return dataset.digest, samples


@pytest.mark.parametrize(("workers", "start"), [(0, None), (2, "fork"), (2, UNFORKED)])
def test_workers_read_the_pixels_of_pictures_in_memory_and_of_files_not_decoded_yet(tmp_path, workers, start):
    (tmp_path / "a.png").write_bytes(png(1, 560, 560))
    given = [RGBA, PIL.Image.open(tmp_path / "a.png")]
    rows = [{"text": f"<image>{number}", "images": [given[number % 2]]} for number in range(4)]
    files = [{"bytes": saved(RGBA)}, str(tmp_path / "a.png")]
    wanted, of_files = items([row | {"images": [files[n % 2]]} for n, row in enumerate(rows)], 0)

    digest, samples = items(rows, workers, start)

    assert digest == wanted  # a resumed run finds the plan that it made
    assert len(samples) == 4
    for found, other in zip(samples, of_files, strict=True):
        assert torch.equal(found.input_ids, other.input_ids)
        assert torch.equal(found.pixel_values, other.pixel_values)
