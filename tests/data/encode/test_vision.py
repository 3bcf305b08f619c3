"""Grids from headers and patches from pixels: the processor's own, whatever the size and the limits."""

import copy
from functools import lru_cache
from io import BytesIO

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support import avi, png
from vlcpt import Document, DocumentError, Image, Source, Text, Video, encode_document
from vlcpt.data.encode import vision
from vlcpt.data.encode.encoder import DocumentEncoder, scaled_sample
from vlcpt.data.encode.vision import EncodingOptions
from vlcpt.data.media.open import MediaLimits, read_image
from vlcpt.data.media.references import medium_at
from vlcpt.data.media.videos import clip_of, read_video

shared = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
clip_bytes = lru_cache(avi)


def blank(height: int, width: int) -> bytes:
    file = BytesIO()
    PIL.Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def place(processor, medium, **options):
    """The medium's place in a document of its own."""
    return DocumentEncoder(processor, EncodingOptions(**options)).vision.place(medium, 0, Document((medium,)))


def size(low=784, high=200_704):
    return {"shortest_edge": low, "longest_edge": high}


@pytest.mark.parametrize("layout", ["saved", "3B"], indirect=True)
@settings(shared, max_examples=120)
@given(st.integers(1, 900), st.integers(1, 900), st.sampled_from([None, 784, 5_000, 50_176, 1_000_000]))
@example(28, 28, None)
@example(1, 200, None)
@example(448, 448, 200_704)
def test_an_images_grid_equals_the_processors(tiny_processor, height, width, max_pixels):
    if max(height, width) > 200 * min(height, width):
        return
    picture = PIL.Image.new("RGB", (width, height))
    low = tiny_processor.image_processor.size["shortest_edge"]
    options = {} if max_pixels is None else {"size": size(min(low, max_pixels), max_pixels)}
    wanted = tiny_processor.image_processor(images=[picture], return_tensors="pt", **options)

    placed = place(tiny_processor, Image(data=blank(height, width)), max_pixels=max_pixels)

    assert list(placed.grid_thw) == wanted["image_grid_thw"][0].tolist()
    assert placed.size == (height, width)
    assert placed.tokens == int(wanted["image_grid_thw"].prod()) // 4
    if max_pixels is None:  # transformers' own count knows no other limits
        counts = tiny_processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
        assert [placed.tokens] == counts["num_image_tokens"]
    assert placed.stop == placed.tokens + 2


@pytest.mark.parametrize(
    ("own", "given_limits", "used"),
    [
        ({}, {}, (784, 200_704)),
        ({}, {"max_pixels": 7_840}, (784, 7_840)),
        ({"max_pixels": 20_000}, {"max_pixels": 7_840}, (784, 20_000)),  # the row's own wins
        ({"min_pixels": 150_000}, {}, (150_000, 200_704)),
        ({"min_pixels": 400_000}, {}, (400_000, 400_000)),  # alone, it moves the processor's other limit
        ({}, {"max_pixels": 500}, (500, 500)),
        ({}, {"min_pixels": 50_000, "max_pixels": 7_840}, (7_840, 7_840)),  # tokens must fit
        ({"max_pixels": 3_000}, {"min_pixels": 50_000}, (3_000, 3_000)),
    ],
)
def test_pixel_limits_come_from_the_row_then_the_options_then_the_processor(
    tiny_processor, own, given_limits, used
):
    wanted = tiny_processor.image_processor(
        images=[PIL.Image.new("RGB", (260, 190))], size=size(*used), return_tensors="pt"
    )
    placed = place(tiny_processor, Image(data=blank(190, 260), **own), **given_limits)
    assert list(placed.grid_thw) == wanted["image_grid_thw"][0].tolist()


@pytest.mark.parametrize(("height", "width"), [(1, 201), (402, 2)])
def test_an_image_thinner_than_1_to_200_is_refused(tiny_processor, height, width):
    document = Document((Image(data=blank(height, width)),), source=Source("a.jsonl", 3))
    with pytest.raises(DocumentError) as caught:
        encode_document(document, tiny_processor)
    assert str(caught.value).startswith(
        f"a.jsonl:3: images: image given as bytes has {height} × {width} pixels:"
    )
    assert str(caught.value).endswith("Crop it.")
    assert caught.value.kind == "medium"


@pytest.mark.parametrize("layout", ["saved", "3B"], indirect=True)
def test_an_images_patches_equal_the_processors_to_the_bit(tiny_processor):
    files = [png(1, 56, 56), png(2, 90, 41), png(3, 700, 500), png(4, 28, 300)]
    text = "<|vision_start|><|image_pad|><|vision_end|>" * 4 + "<|endoftext|>"
    pictures = [PIL.Image.open(BytesIO(file)) for file in files]
    wanted = tiny_processor(text=[text], images=pictures, return_tensors="pt")

    sample = encode_document(Document(tuple(Image(data=file) for file in files)), tiny_processor)

    assert torch.equal(sample.input_ids, wanted["input_ids"][0])
    assert torch.equal(sample.image_grid_thw, wanted["image_grid_thw"])
    assert torch.equal(sample.pixel_values, wanted["pixel_values"])
    assert sample.pixel_values.dtype == torch.float32


VIDEOS = [
    # frames, rate, width, height, options
    (16, 8, 56, 56, {}),
    (30, 10, 84, 112, {"fps": 4.0}),
    (1, 8, 56, 56, {}),
    (5, 25, 70, 42, {}),
    (40, 20, 448, 560, {"max_pixels": 50_000}),
    (24, 6, 56, 84, {"max_frames": 6}),
    (16, 8, 56, 56, {"min_pixels": 20_000}),
    (16, 8, 112, 112, {"max_pixels": 400}),
]


def sampled(processor, frames, rate, width, height, options):
    """A video, its frames as chosen, and what the processor makes of them."""
    video = Video(data=clip_bytes(0, frames, rate, width, height), **options)
    clip = clip_of(video, fps=2.0, max_frames=768, media_root=None)
    pixels = torch.from_numpy(read_video(video, clip, media_root=None)).permute(0, 3, 1, 2)
    limits = [options.get("min_pixels", 784), options.get("max_pixels", 200_704)]
    made = processor.video_processor(
        [pixels],
        size=size(min(limits), limits[1]),
        do_sample_frames=False,
        cap_pixels_per_frame=True,
        return_tensors="pt",
    )
    return video, clip, made


@pytest.mark.parametrize("layout", ["saved", "3B"], indirect=True)
@pytest.mark.parametrize(("frames", "rate", "width", "height", "options"), VIDEOS)
def test_a_videos_grid_and_patches_equal_the_processors(tiny_processor, frames, rate, width, height, options):
    video, clip, wanted = sampled(tiny_processor, frames, rate, width, height, options)

    placed = place(tiny_processor, video)
    sample = encode_document(Document((video,)), tiny_processor)

    assert list(placed.grid_thw) == wanted["video_grid_thw"][0].tolist()
    assert placed.grid_thw[0] == len(clip.indices) / 2
    assert torch.equal(sample.video_grid_thw, wanted["video_grid_thw"])
    assert torch.equal(sample.pixel_values_videos, wanted["pixel_values_videos"])
    assert sample.pixel_values is None


def test_a_videos_interval_is_two_positions_a_second(tiny_processor):
    # 16 frames at 8 a second, 2 of them taken a second: 4 frames, 2 steps of a second each.
    assert place(tiny_processor, Video(data=clip_bytes(0, 16, 8))).interval == 2.0
    assert place(tiny_processor, Video(data=clip_bytes(0, 16, 8), fps=4.0)).interval == 1.0


@pytest.mark.parametrize("budget", [100, 300, 450, 500, 540, 560, 700, 900, 2_000])
def test_the_pixels_of_a_long_video_are_capped_together(tiny_processor, monkeypatch, budget):
    """Each frame may have 200,704 pixels, all of them together 90% of what 128,000 tokens show."""
    full = place(tiny_processor, Video(data=clip_bytes(0, 64, 8, 448, 448))).tokens
    monkeypatch.setattr(tiny_processor.video_processor, "max_video_tokens", budget)
    video, _, wanted = sampled(tiny_processor, 64, 8, 448, 448, {})
    placed = place(tiny_processor, video)
    assert list(placed.grid_thw) == wanted["video_grid_thw"][0].tolist()
    assert placed.tokens <= 0.9 * budget < full


@settings(shared, max_examples=200)
@given(
    st.integers(2, 700),
    st.integers(2, 700),
    st.sampled_from([None, 2_000, 100_000]),
    st.integers(784, 200_704),
)
@example(10, 700, None, 1000)
@example(28, 28, 100_000, 784 * 40)
@example(1_434, 23, 2_000, 37_721)  # takes more tokens under the lower limit
def test_the_tokens_that_an_image_takes_under_a_lower_limit_are_foretold(
    tiny_processor, height, width, own_min, limit
):
    if max(height, width) > 200 * min(height, width):
        return
    file = blank(height, width)
    before = place(tiny_processor, Image(data=file, min_pixels=own_min))
    after = place(tiny_processor, Image(data=file, min_pixels=own_min, max_pixels=limit))
    assert before.tokens_at(limit) == after.tokens


@pytest.mark.parametrize("low", [784, 50_000])
def test_the_tokens_that_a_video_takes_under_a_lower_limit_are_foretold(tiny_processor, low):
    file = clip_bytes(0, 16, 8, 336, 224)
    before = place(tiny_processor, Video(data=file, min_pixels=low))
    for limit in range(784, 70_000, 784):
        after = place(tiny_processor, Video(data=file, min_pixels=low, max_pixels=limit))
        assert before.tokens_at(limit) == after.tokens


def test_another_documents_pixels_are_brought_to_the_same_grid(tiny_processor):
    encoder = DocumentEncoder(tiny_processor)
    mine = Document((Image(data=png(1, 56, 84)), Text("a"), Image(data=png(2, 28, 28))))
    other = Document((Image(data=png(3, 300, 200)),))
    stream = encoder.tokens(mine)

    own = encoder.sample(mine, stream)
    swapped = encoder.sample(mine, stream, pixels_of=(other, other))
    masked = encoder.sample(mine, stream, pixels_of=(None, None))

    own, swapped = (scaled_sample(one, encoder.vision.scales) for one in (own, swapped))
    for sample in (swapped, masked):
        assert torch.equal(sample.image_grid_thw, own.image_grid_thw)
        assert sample.pixel_values.shape == own.pixel_values.shape
        assert torch.equal(sample.input_ids, own.input_ids)
    theirs = PIL.Image.open(BytesIO(png(3, 300, 200))).resize((56, 84))
    wanted = tiny_processor.image_processor(images=[theirs], return_tensors="pt")["pixel_values"]
    assert torch.equal(swapped.pixel_values[: len(wanted)], wanted)
    assert not masked.pixel_values.any()


def test_the_mean_colour_is_zero_after_normalising(tiny_processor):
    mean = [round(255 * part) for part in tiny_processor.image_processor.image_mean]
    picture = PIL.Image.new("RGB", (56, 56), tuple(mean))
    assert (
        tiny_processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"].abs().max()
        < 0.01
    )


def test_another_video_is_brought_to_the_same_grid(tiny_processor):
    encoder = DocumentEncoder(tiny_processor)
    mine = Document((Video(data=clip_bytes(0, 40, 8, 56, 84)),))
    other = Document((Video(data=clip_bytes(1, 16, 8, 84, 56)),))
    stream = encoder.tokens(mine)
    swapped = encoder.sample(mine, stream, pixels_of=(other, other))
    assert swapped.video_grid_thw.tolist() == [[5, 6, 4]]
    assert swapped.pixel_values_videos.shape == encoder.sample(mine, stream).pixel_values_videos.shape
    # The other's four frames, then its last one held.
    assert torch.equal(swapped.pixel_values_videos[-24:], swapped.pixel_values_videos[-48:-24])
    assert not torch.equal(swapped.pixel_values_videos[:24], swapped.pixel_values_videos[-24:])


def test_a_file_that_changed_during_the_run_is_an_error(tiny_processor, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(1, 56, 56))
    encoder = DocumentEncoder(tiny_processor)
    document = Document((Image(str(path)),), source=Source("a.jsonl", 1))
    stream = encoder.tokens(document)
    path.write_bytes(png(1, 112, 56))
    with pytest.raises(DocumentError) as caught:
        encoder.sample(document, stream)
    assert (
        f"a.jsonl:1: images: {path} decodes to the grid [1, 4, 8] but its header promised [1, 4, 4]."
        in str(caught.value)
    )


def test_a_missing_or_broken_medium_names_document_and_file(tiny_processor, tmp_path):
    source = Source("a.jsonl", 4)
    for medium, field, words in [
        (Image("no.png"), "images", "'no.png' does not exist"),
        (Image(data=b"not a picture"), "images", "image given as bytes is not a readable JPEG, PNG"),
        (Video(data=b"not a clip, not at all"), "videos", "video given as bytes is not an MP4"),
    ]:
        with pytest.raises(DocumentError) as caught:
            encode_document(Document((medium,), source=source), tiny_processor, media_root=str(tmp_path))
        assert str(caught.value).startswith(f"a.jsonl:4: {field}: {words}")


@pytest.mark.parametrize("asked", [10**8 + 1, 10**12, 1e299])
@pytest.mark.parametrize("kind", [Image, Video])
def test_a_row_cannot_enlarge_a_medium_beyond_the_limits(tiny_processor, kind, asked):
    """It took all memory, or ended in an error of NumPy's."""
    data = png(0) if kind is Image else avi(0)
    document = Document((medium_at(kind, {"bytes": data, "path": "a.x", "min_pixels": asked}),))
    with pytest.raises(
        DocumentError, match=r"a\.x: min_pixels asks for more than 100,000,000 pixels"
    ) as caught:
        DocumentEncoder(tiny_processor).tokens(document)
    assert len(str(caught.value)) < 300


def test_a_row_cannot_enlarge_the_frames_of_a_video_beyond_the_limit_for_all(tiny_processor):
    video = Video("a.avi", data=avi(0), min_pixels=1_000_000)
    most, less = (EncodingOptions(limits=MediaLimits(max_video_pixels=n)) for n in (4_000_000, 3_999_999))
    DocumentEncoder(tiny_processor, most).tokens(Document((video,)))
    with pytest.raises(DocumentError, match="in each of 4 frames, which max_video_pixels forbids"):
        DocumentEncoder(tiny_processor, less).tokens(Document((video,)))


def test_limits_of_media_files_are_kept(tiny_processor):
    with pytest.raises(DocumentError, match="above max_image_pixels = 100"):
        place(tiny_processor, Image(data=blank(20, 20)), limits=MediaLimits(max_image_pixels=100))


def test_gray_and_transparent_images_have_patches_too(tiny_processor):
    gray = np.arange(56 * 56, dtype=np.uint8).reshape(56, 56)
    for mode in ("L", "RGBA", "P"):
        file = BytesIO()
        PIL.Image.fromarray(gray).convert(mode).save(file, "PNG")
        sample = encode_document(Document((Image(data=file.getvalue()),)), tiny_processor)
        assert sample.image_grid_thw.tolist() == [[1, 4, 4]]
        assert sample.pixel_values.std() > 0


MODES = ("RGB", "L", "RGBA", "P", "CMYK", "1", "LA", "I;16")
SIZES = ((1, 1), (28, 28), (57, 91), (600, 800), (801, 599), (30, 2000), (1333, 47))


def picture_of(mode: str, height: int, width: int) -> bytes:
    """Noise over a slope as a file, so that every resize has something to round."""
    rng = np.random.default_rng(height * width)
    slope = np.linspace(0, 200, height * width * 3).reshape(height, width, 3)
    made = PIL.Image.fromarray((slope + rng.integers(0, 56, slope.shape)).astype(np.uint8))
    if mode == "I;16":
        made = PIL.Image.fromarray(np.asarray(made.convert("L")).astype(np.uint16) * 256)
    file = BytesIO()
    (made if mode == "I;16" else made.convert(mode)).save(file, "TIFF" if mode == "CMYK" else "PNG")
    return file.getvalue()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pixels_kept_as_bytes_become_the_processors_to_the_bit(tiny_processor, mode, height, width):
    picture = picture_of(mode, height, width)
    encoder = DocumentEncoder(tiny_processor)
    document = Document((Image(data=picture), Text("a")))

    sample = encoder.sample(document, encoder.tokens(document))
    scaled = scaled_sample(sample, encoder.vision.scales)

    shown = read_image(Image(data=picture), media_root=None)  # how each mode is shown has its own tests
    wanted = tiny_processor.image_processor([shown], return_tensors="pt")["pixel_values"]
    assert sample.pixel_values.dtype == torch.uint8
    assert sample.pixel_values.nbytes * 8 == wanted.nbytes
    assert torch.equal(scaled.pixel_values, wanted)


def test_a_processor_that_does_something_else_with_pixels_does_it_itself(tiny_processor):
    other = copy.deepcopy(tiny_processor)
    other.image_processor.do_normalize = False
    document = Document((Image(data=png(1, 56, 84)), Text("a")))

    encoder = DocumentEncoder(other)
    sample = encoder.sample(document, encoder.tokens(document))

    picture = PIL.Image.open(BytesIO(png(1, 56, 84)))
    wanted = other.image_processor([picture], return_tensors="pt")["pixel_values"]
    assert encoder.vision.scales is None
    assert torch.equal(sample.pixel_values, wanted)


def test_a_photo_that_is_taken_in_strips_has_the_processors_pixels_too(tiny_processor):
    """The last strip is a part of one."""
    height, width = 1301, 1203
    assert height * width * 3 > vision._LARGE and height % vision._STRIP
    picture = picture_of("RGB", height, width)
    document = Document((Image(data=picture), Text("a")))
    encoder = DocumentEncoder(tiny_processor)

    sample = encoder.sample(document, encoder.tokens(document))

    opened = PIL.Image.open(BytesIO(picture)).convert("RGB")
    wanted = tiny_processor.image_processor([opened], return_tensors="pt")["pixel_values"]
    assert torch.equal(scaled_sample(sample, encoder.vision.scales).pixel_values, wanted)
    assert np.array_equal(vision._bytes_of(opened), np.array(opened))
