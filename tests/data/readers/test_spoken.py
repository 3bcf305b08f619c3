"""What all formats of conversations do with the settings of a row."""

import pytest

from vlcpt import DocumentError, Image, Video
from vlcpt.data.readers import docmatix, instructions, messages, sharegpt

SETTINGS = {"min_pixels": 784, "max_pixels": 50176, "fps": 2, "enable_thinking": False, "max_frames": None}
SAID = "<image>a<image><video>"
MEDIA = {"images": ["a.png", {"path": "b.png", "max_pixels": 3136}], "videos": ["c.mp4"]}
ROWS = {
    "sharegpt": (sharegpt.read_row, {"conversations": [{"from": "human", "value": SAID}]}),
    "messages": (messages.read_row, {"messages": [{"role": "user", "content": SAID}]}),
    "alpaca": (instructions.read_alpaca, {"instruction": SAID, "output": "b"}),
    "query": (instructions.read_query, {"query": SAID, "response": "b"}),
    "docmatix": (docmatix.read_row, {"texts": [{"user": SAID, "assistant": "b"}]}),
}


@pytest.mark.parametrize("format", ROWS)
def test_chat_template_kwargs_size_the_media_that_say_nothing_themselves(format):
    read, row = ROWS[format]

    document = read(row | MEDIA | {"chat_template_kwargs": SETTINGS})

    assert document.images == (
        Image("a.png", min_pixels=784, max_pixels=50176),
        Image("b.png", min_pixels=784, max_pixels=3136),
    )
    assert document.videos == (Video("c.mp4", min_pixels=784, max_pixels=50176, fps=2.0),)
    assert document.not_read == ("chat_template_kwargs.enable_thinking",)


def test_media_of_content_parts_are_sized_as_well():
    part = {"type": "image", "image": "a.png"}
    row = {"messages": [{"role": "user", "content": [part]}], "chat_template_kwargs": {"max_pixels": 50176}}
    assert messages.read_row(row).images == (Image("a.png", max_pixels=50176),)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("x", "expected settings in {}, found str"),
        ({"max_pixels": "many"}, "'max_pixels' of a media reference must be a number above 0; found 'many'"),
        ({"min_pixels": 9999}, "'min_pixels' 9999 is above 'max_pixels' 3136"),
    ],
)
def test_settings_that_mean_nothing_are_an_error(settings, message):
    read, row = ROWS["query"]
    with pytest.raises(DocumentError) as caught:
        read(row | MEDIA | {"chat_template_kwargs": settings})
    assert caught.value.field == "chat_template_kwargs"
    assert message in caught.value.reason


@pytest.mark.parametrize("format", ROWS)
def test_nulls_with_which_arrow_fills_a_row_are_absent(format):
    read, row = ROWS[format]
    filled = (
        row
        | MEDIA
        | dict.fromkeys(("system", "history", "objects", "audios", "chat_template_kwargs", "label"))
    )
    assert read(filled) == read(row | MEDIA)
