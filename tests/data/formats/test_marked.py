"""Rows with markup."""

import pytest

from tests.support import opened
from vlcpt import DocumentError, Image, Text, Video
from vlcpt.data.formats.marked import OTHER_BRACKETS, read_marked


def test_a_row_becomes_its_segments_and_other_fields_are_ignored():
    row = {
        "text": "<image>a<trainable_text>b</trainable_text><video>",
        "images": ["a.png"],
        "videos": [{"path": "a.mp4", "fps": 1}],
        "score": 0.5,
    }
    assert read_marked(row).segments == (
        Image("a.png"),
        Text("a"),
        Text("b", trainable=True),
        Video("a.mp4", fps=1.0),
    )


def test_absent_and_null_media_are_none():
    assert read_marked({"text": "a"}) == read_marked({"text": "a", "images": None, "videos": []})


def test_untagged_rows_follow_untagged():
    assert read_marked({"text": "a"}, untagged="mask").segments == (Text("a"),)
    with pytest.raises(DocumentError, match="no <trainable_text> anywhere"):
        read_marked({"text": "a"}, untagged="error")


def test_a_field_in_the_singular_is_named_where_its_files_are_missed():
    with pytest.raises(
        DocumentError, match=r"'images' lists 0 files.*The row has one in 'image', .*: list it in 'images'"
    ):
        opened([{"text": "<image>a", "image": "a.png"}], format="vlcpt").document(0)
    assert read_marked({"text": "a", "image": "a.png"}).images == ()


@pytest.mark.parametrize(
    "text", ["<video controls></video> <video>", "<image>x</image>", "<trainable-text>a", "</trainable_text>"]
)
def test_a_mistake_in_a_row_without_media_names_the_format_where_nothing_is_markup(text):
    with pytest.raises(DocumentError, match=r"as in web pages or code, set format: text\.$"):
        opened([{"text": text}]).document(0)


def test_a_mistake_in_a_row_with_media_does_not_name_a_format_that_would_lose_them():
    with pytest.raises(DocumentError, match="lists 1 file") as raised:
        opened([{"text": "<image><image>", "images": ["a.png"]}]).document(0)
    assert "format: text" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "a ＜trainable_text＞b＜/trainable_text＞",
        "a 〈trainable_text〉b〈/trainable_text〉",
        "a &lt;trainable_text&gt;b&lt;/trainable_text&gt;",
        "a &#60;Trainable-Text&#62;b",
        r"a \u003ctrainable_text\u003eb",
        "a ＜/trainable_text＞",
    ],
)
def test_tags_in_other_brackets_are_named_where_there_is_no_tag(text):
    document = read_marked({"text": text})

    assert document.not_read == (OTHER_BRACKETS,)
    assert [segment.text for segment in document.segments] == [text]  # they are characters


@pytest.mark.parametrize(
    "text",
    [
        "&lt;trainable&gt; and ＜text＞ are not trainable_text",
        "[trainable_text] &lt;b&gt;",
        "<trainable_text>write &lt;trainable_text&gt; in HTML</trainable_text>",
    ],
)
def test_other_text_in_such_brackets_is_text(text):
    assert read_marked({"text": text}).not_read == ()
