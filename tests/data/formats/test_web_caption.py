"""Captions: media first, unless the caption says where."""

import pytest

from tests.support import opened
from vlcpt import DocumentError, Image, Text, Video
from vlcpt.data.formats.web import read_caption


@pytest.mark.parametrize(
    ("row", "segments"),
    [
        ({"image": "a.png", "caption": "A cat."}, (Image("a.png"), Text("A cat.", trainable=True))),
        ({"image": {"bytes": b"x"}, "text": "A cat."}, (Image(data=b"x"), Text("A cat.", trainable=True))),
        ({"video": "a.mp4", "caption": "It runs."}, (Video("a.mp4"), Text("It runs.", trainable=True))),
        (
            {"images": ["a.png", "b.png"], "caption": "Two <cats>.", "text": None},
            (Image("a.png"), Image("b.png"), Text("Two <cats>.", trainable=True)),
        ),
        (
            {"image": "a.png", "caption": "A cat<image>\nsleeps."},
            (Text("A cat", trainable=True), Image("a.png"), Text("\nsleeps.", trainable=True)),
        ),
        (
            {"image": "a.png", "caption": "<trainable_text>a"},
            (Image("a.png"), Text("<trainable_text>a", trainable=True)),
        ),
    ],
)
def test_a_caption_is_trained_after_its_media(row, segments):
    assert read_caption(row).segments == segments


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "a.png"}, "caption: the field is missing. Fields found: 'image'."),
        ({"image": "a.png", "caption": None}, "caption: expected a string, found NoneType."),
        (
            {"image": None, "caption": "a"},
            "image: expected an image or a video. Fields found: 'image', 'caption'",
        ),
        (
            {"image": "a.png", "caption": "<image><image>"},
            "caption: there are 2 <image> markers but the row lists 1",
        ),
    ],
)
def test_what_cannot_be_mapped_is_an_error(row, message):
    with pytest.raises(DocumentError) as caught:
        read_caption(row)
    assert message in str(caught.value)


def test_a_backslash_makes_a_marker_its_characters():
    found = read_caption({"image": "a.png", "caption": r"the tag \<image>"}).segments
    assert found == (Image("a.png"), Text("the tag <image>", trainable=True))


@pytest.mark.parametrize("field", ["image_path", "图片", "photo"])
def test_a_table_whose_media_have_another_name_is_an_error_that_says_what_to_call_them(tmp_path, field):
    path = tmp_path / "rows.csv"
    path.write_text(f"{field},caption\na.png,A valve.\n", encoding="utf-8")
    (tmp_path / "a.png").write_bytes(b"")

    with pytest.raises(DocumentError, match=f"'{field}' seems to have a medium: call it 'image' or 'video'"):
        opened(path)
    with pytest.raises(
        DocumentError, match=f"The row has one in '{field}', which .*: call it 'image' or 'video'"
    ):
        opened(path, format="caption").document(0)
