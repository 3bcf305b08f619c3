"""Media references: every form a row may have, and errors that name the key."""

import base64
import json
import time

import pytest

from tests.support import opened
from vlcpt import DocumentError, Image, Video
from vlcpt.data.media.references import medium_at

URI = "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()


@pytest.mark.parametrize(
    ("reference", "image"),
    [
        ("a.png", Image("a.png")),
        ("https://example.org/a.png", Image("https://example.org/a.png")),  # refused when it is opened
        ({"path": "a.png"}, Image("a.png")),
        ({"bytes": b"x"}, Image(data=b"x")),
        ({"bytes": b"x", "path": "a.png"}, Image("a.png", b"x")),
        ({"bytes": None, "path": "a.png"}, Image("a.png")),
        ({"bytes": b"x", "path": None}, Image(data=b"x")),
        ({"bytes": b"", "path": "a.png"}, Image("a.png", b"")),
        ({"path": "a.png", "min_pixels": 784, "max_pixels": 1e6}, Image("a.png", None, 784, 1_000_000)),
        ({"path": "a.png", "max_pixels": None}, Image("a.png")),
        (URI, Image(data=b"\x89PNG")),
        ({"path": URI.replace("data:", "DATA:"), "max_pixels": 784}, Image(data=b"\x89PNG", max_pixels=784)),
        (Image("a.png", max_pixels=784), Image("a.png", max_pixels=784)),
    ],
)
def test_an_image_is_read_from_every_form_a_row_may_have(reference, image):
    found = medium_at(Image, reference)
    assert found == image
    assert all(type(value) is int for value in (found.min_pixels, found.max_pixels) if value is not None)


def test_a_video_has_its_own_sampling():
    assert medium_at(Video, {"path": "a.mp4", "fps": 1, "max_frames": 8}) == Video(
        "a.mp4", fps=1.0, max_frames=8
    )
    assert medium_at(Video, "a.mp4") == Video("a.mp4")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (None, "must be a path, a data: URI, or a dict with 'path' or 'bytes'; found NoneType."),
        (b"", "found bytes."),
        (["a.png"], "found list."),
        (7, "found int."),
        ("", "a media reference is an empty path."),
        ({}, "a media reference needs 'path' or 'bytes'; both are missing."),
        ({"max_pixels": 784}, "both are missing."),
        ({"path": "a", "maxpixels": 1}, "has no key 'maxpixels'. Did you mean 'max_pixels'?"),
        ({"path": "a", "url": 1}, "has no key 'url'. Known: bytes, max_pixels, min_pixels, path."),
        ({"path": "a", "fps": 1}, "has no key 'fps'."),
        ({"path": "a", "data": b""}, "has no key 'data'."),
        ({"path": 7}, "'path' of a media reference must be str; found int."),
        ({"bytes": "x"}, "'bytes' of a media reference holds no valid base64"),
        (
            {"path": "a", "max_pixels": 0},
            "'max_pixels' of a media reference must be a number above 0; found 0.",
        ),
        ({"path": "a", "max_pixels": 1.5}, "found 1.5."),
        ({"path": "a", "max_pixels": "784"}, "found '784'."),
        ({"path": "a", "max_pixels": True}, "found True."),
        ({"path": "a", "max_pixels": float("nan")}, "found nan."),
        ({"path": "a", "max_pixels": float("inf")}, "found inf."),
        ("data:image/png,abc", "must have the form data:image/png;base64,…"),
        ("data:image/png;base64,a?c=", "a data: URI holds no valid base64"),
    ],
)
def test_anything_else_is_an_error_that_says_what_was_found(reference, message):
    with pytest.raises(DocumentError) as caught:
        medium_at(Image, reference)
    assert message in caught.value.reason
    assert caught.value.kind == "reference"


def test_a_long_data_uri_is_not_repeated_in_the_message():
    with pytest.raises(DocumentError) as caught:
        medium_at(Image, "data:" + "x" * 100_000)
    assert len(caught.value.reason) < 300


def test_base64_may_have_line_breaks_and_stand_under_bytes():
    data = bytes(range(256)) * 3
    wrapped = base64.encodebytes(data).decode()
    assert "\n" in wrapped
    for reference in (
        f"data:image/png;base64,{wrapped}",
        {"bytes": wrapped},
        {"bytes": wrapped, "path": None},
    ):
        assert medium_at(Image, reference).data == data
    with pytest.raises(DocumentError, match="holds no valid base64"):
        medium_at(Image, {"bytes": "not base64!"})


@pytest.mark.parametrize("encode", [base64.b64encode, base64.encodebytes])
def test_bare_base64_is_an_error_that_stays_short(encode):
    with pytest.raises(DocumentError, match=r"data:image/…;base64,") as caught:
        medium_at(Image, encode(bytes(range(256)) * 4000).decode())
    assert len(str(caught.value)) < 300


def test_bytes_alone_are_a_file_as_binary_columns_have_it():
    assert medium_at(Image, b"GIF89a").data == b"GIF89a"


@pytest.mark.parametrize(
    "start", [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF\x00\x00\x00\x00WEBP"]
)
@pytest.mark.parametrize("size", [80, 200, 5000, 700_000])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes])
def test_base64_without_a_header_is_said_so_in_few_words_whatever_its_length_and_alphabet(
    start, size, encode
):
    text = encode(start + bytes(range(256)) * (size // 256) + b"\xfb" * (size % 256)).decode()
    for reference in (text, {"path": text}):
        with pytest.raises(
            DocumentError, match=r"base64 without a header. Write it as data:image/"
        ) as caught:
            medium_at(Image, reference)
        assert len(str(caught.value)) < 300


def test_rows_of_bare_base64_are_read_through_in_a_second(tmp_path):
    picture = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 3000).decode()
    rows = [{"text": "<image>a <trainable_text>b</trainable_text>", "images": [picture]}] * 5
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = opened(tmp_path / "rows.jsonl")
    since = time.monotonic()

    for number in range(5):
        with pytest.raises(DocumentError, match="base64 without a header"):
            source.document(number)

    assert time.monotonic() - since < 1


@pytest.mark.parametrize(
    "path", ["/9j/a.jpg", "a" * 250, "iVBORw0KGgo", "/data/" + "sub_folder-7/" * 30 + "a.png"]
)
def test_a_path_that_looks_like_base64_at_first_stays_a_path(path):
    assert medium_at(Image, path) == Image(path)


def test_nulls_with_which_arrow_fills_a_reference_are_absent():
    """A list of references has the keys of all of them, in every row of the table."""
    assert medium_at(Image, {"path": "a.png", "bytes": None, "fps": None, "caption": None}) == Image("a.png")
