"""Rows of segments: nothing in a text is markup, and every key is checked."""

import pytest

from vlcpt import DocumentError, Image, Text, Video
from vlcpt.data.formats.marked import read_segments


def row(*segments):
    return {"segments": list(segments)}


def text(value="a", trainable=True, **more):
    return {"type": "text", "text": value, "trainable": trainable, **more}


def test_segments_become_segments():
    found = read_segments(
        row(
            {"type": "image", "image": {"path": "a.png", "max_pixels": 784}},
            text("a", False),
            text("b", weight=0.5),
            {"type": "video", "video": "a.mp4"},
        )
    )
    assert found.segments == (
        Image("a.png", max_pixels=784),
        Text("a"),
        Text("b", trainable=True, weight=0.5),
        Video("a.mp4"),
    )
    assert found.tagged


def test_tags_in_a_text_are_characters():
    literal = r"<trainable_text>\<image></trainable_text>"
    document = read_segments(row(text(literal)))
    assert document.segments == (Text(literal, trainable=True),)


def test_the_nulls_that_arrow_fills_in_are_no_keys():
    found = read_segments(
        row({"type": "text", "text": "a", "trainable": True, "weight": None, "image": None, "video": None})
    )
    assert found.segments == (Text("a", trainable=True),)


def test_empty_spans_are_counted_and_their_neighbours_merge():
    document = read_segments(row(text("a", False), text(""), text("b", False)))
    assert document.segments == (Text("ab"),)
    assert document.empty_spans == 1


@pytest.mark.parametrize(
    ("segments", "place", "message"),
    [
        ("x", "segments", "expected a list"),
        ([text(), "x"], "segments[1]", "expected a segment with a 'type', found str."),
        ([{"text": "a"}], "segments[0]", "'type' must be 'text', 'image' or 'video'; found None."),
        ([{"type": ["text"]}], "segments[0]", "found ['text']."),
        ([text(None)], "segments[0]", "'text' must be a string; found NoneType."),
        ([{"type": "text", "text": "a"}], "segments[0]", "'trainable' must be true or false; found None."),
        ([text("a", 1)], "segments[0]", "'trainable' must be true or false; found 1."),
        ([text(weight="2")], "segments[0]", "'weight' must be a number; found '2'."),
        ([text(weight=True)], "segments[0]", "'weight' must be a number; found True."),
        ([text(weight=0)], "segments[0]", "the weight 0.0 is out of range. Use a number above 0, up to 100."),
        ([text(wieght=2)], "segments[0]", "a segment of type 'text' has no key 'wieght'."),
        ([{"type": "image", "image": "a", "text": "b"}], "segments[0]", "type 'image' has no key"),
        ([{"type": "image"}], "segments[0]", "a media reference must be a path"),
        ([{"type": "video", "video": {}}], "segments[0]", "a media reference needs 'path' or 'bytes'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(segments, place, message):
    with pytest.raises(DocumentError) as caught:
        read_segments({"segments": segments})
    assert caught.value.field == place
    assert message in caught.value.reason


def test_a_missing_field_is_named_with_those_found():
    message = (
        r"segments: the field is missing; did you mean 'segments' by 'segment'\? Fields found: 'segment'\."
    )
    with pytest.raises(DocumentError, match=message):
        read_segments({"segment": []})
