"""OBELICS rows: every text and image, in order; URLs stand for files."""

import pytest

from vlcpt import DocumentError, Image, Text
from vlcpt.data.formats.marked import read_text
from vlcpt.data.formats.web import read_obelics

ROW = {
    "images": ["https://a.org/x/moon.jpg?w=640", None, "https://b.org/sun%20rise.png#top", None, None],
    "metadata": '[{"document_url": "https://a.org"}, null, {"alt_text": "sun"}, null, null]',
    "general_metadata": "{}",
    "texts": [None, "The moon.\n\nIt is round. <image>", None, "The sun.", "Both."],
}


def test_texts_and_images_stay_in_order():
    assert read_obelics(ROW).segments == (
        Image("moon.jpg"),
        Text("The moon.\n\nIt is round. <image>", trainable=True),
        Image("sun%20rise.png"),
        Text("The sun.\n\nBoth.", trainable=True),
    )


def test_a_mapping_column_names_the_files():
    row = {**ROW, "image_files": ["m/0001.jpg", None, "m/0002.png", None, None]}
    assert [image.path for image in read_obelics(row).images] == ["m/0001.jpg", "m/0002.png"]


def test_images_that_came_with_the_row_are_used_as_they_are():
    row = {"images": [{"bytes": b"x", "path": None}, None, "local/a.png"], "texts": [None, "a", None]}
    assert read_obelics(row).images == (Image(data=b"x"), Image("local/a.png"))


def test_one_url_twice_is_one_file_but_two_urls_are_not():
    same = {"images": ["http://a.org/1.png"] * 2, "texts": [None, None]}
    other = {"images": ["http://a.org/1.png", "http://b.org/1.png"], "texts": [None, None]}

    assert [image.path for image in read_obelics(same).images] == ["1.png", "1.png"]
    with pytest.raises(
        DocumentError, match=r"both end in '1\.png': one file cannot be both\. Name their files in"
    ):
        read_obelics(other)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"images": ["a"]}, "texts: the field is missing"),
        ({"images": [None], "texts": ["a", "b"]}, "images: has 1 entries but 'texts' has 2."),
        (
            {"images": [None], "texts": ["a"], "image_files": ["a", "b"]},
            "image_files: has 2 entries but 'texts'",
        ),
        (
            {"images": [None], "texts": [None]},
            "texts[0]: expected 'images' or 'texts' at this position; both are null",
        ),
        (
            {"images": ["a"], "texts": ["b"]},
            "texts[0]: expected 'images' or 'texts' at this position; both are set",
        ),
        ({"images": [None], "texts": [{"user": "a"}]}, "texts[0]: expected a string or null, found dict."),
        (
            {"images": ["http://a.org/"], "texts": [None]},
            "images[0]: the URL 'http://a.org/' ends in no file's name.",
        ),
        (
            {"images": ["http://[a"], "texts": [None]},
            "images[0]: the URL 'http://[a' ends in no file's name.",
        ),
        ({"images": [5], "texts": [None]}, "images[0]: a media reference must be a path"),
        (
            {"images": ["http://a.org/a"], "texts": [None], "image_files": [5]},
            "images[0]: expected a file's name",
        ),
    ],
)
def test_what_cannot_be_mapped_is_an_error(row, message):
    with pytest.raises(DocumentError) as caught:
        read_obelics(row)
    assert message in str(caught.value)


def test_all_of_a_plain_text_is_trained():
    assert read_text({"text": "<image> a"}).segments == (Text("<image> a", trainable=True),)
