"""MMC4 rows: every sentence, and each image before the sentence that it matches."""

import pytest

from vlcpt import DocumentError, Image, Text
from vlcpt.data.formats.web import read_mmc4


def image(index, name=None, url="http://a.org/photos/a.jpg"):
    return {"image_name": name, "raw_url": url, "matched_text_index": index, "matched_sim": 0.3}


ROW = {
    "text_list": ["One.", "Two <image>.", "Three."],
    "url": "http://a.org",
    "image_info": [image(2, "b904.png"), image(0, None), image(2, "c1.jpg")],
    "similarity_matrix": [[0.1, 0.2, 0.3]] * 3,
}


def test_each_image_stands_before_its_sentence():
    assert read_mmc4(ROW).segments == (
        Image("a.jpg"),
        Text("One. Two <image>. ", trainable=True),
        Image("b904.png"),
        Image("c1.jpg"),
        Text("Three.", trainable=True),
    )


def test_a_row_without_images_is_text():
    assert read_mmc4({"text_list": ["a", "", "b"], "image_info": None}).segments == (
        Text("a b", trainable=True),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_list": None}, "text_list: expected a list of sentences, found none."),
        ({"text_list": ["a", 5, "b"]}, "text_list[1]: expected a string, found int."),
        ({"image_info": ["a"]}, "image_info[0]: expected an image in {}, found str."),
        ({"image_info": [image(3)]}, "image_info[0].matched_text_index: expected the number of a"),
        ({"image_info": [image(3)]}, "0 to 2; found 3."),
        ({"image_info": [image(None)]}, "found None."),
        ({"image_info": [image(-1)]}, "found -1."),
        ({"image_info": [image(True)]}, "found True."),
        ({"image_info": [image(0, None, None)]}, "image_info[0]: a media reference must be a path"),
        ({"image_info": [image(0, None, "http://a.org/")]}, "Name its file in image_info[].image_name."),
    ],
)  # fmt: skip
def test_what_cannot_be_mapped_is_an_error(changes, message):
    with pytest.raises(DocumentError) as caught:
        read_mmc4({**ROW, **changes})
    assert message in str(caught.value)
