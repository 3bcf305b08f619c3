"""Images, and questions with answers."""

import pytest

from tests.support import opened
from vlcpt import DocumentError, Image
from vlcpt.data.formats.chat import read_docmatix

TEXTS = [{"user": "a", "assistant": "b", "source": "s"}, {"user": "c", "assistant": "d", "source": None}]
ROW = {"images": [{"bytes": b"x", "path": None}, {"bytes": b"y", "path": None}], "texts": TEXTS}


def test_all_images_come_first_and_the_answers_are_trained():
    document = read_docmatix(ROW)
    assert document.segments[:2] == (Image(data=b"x"), Image(data=b"y"))
    answers = "a\n<trainable_text>b\n</trainable_text>c\n<trainable_text>d</trainable_text>"
    assert document.to_markup() == "<image><image>" + answers
    assert opened([ROW]).document(0).not_read == ("texts[].source",)
    assert read_docmatix(ROW, targets="all").to_markup() == (
        "<image><image><trainable_text>a\nb\nc\nd</trainable_text>"
    )


def test_an_entry_that_is_switched_off_is_context_whatever_the_targets():
    row = ROW | {"texts": [TEXTS[0] | {"weight": 0}, TEXTS[1] | {"weight": 0.5}]}
    assert read_docmatix(row, targets="all").to_markup() == (
        "<image><image>a\nb\n<trainable_text>c\n</trainable_text>"
        '<trainable_text weight="0.5">d</trainable_text>'
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"texts": [{"user": "a"}]}, "texts[0].assistant: the field is missing."),
        ({"texts": [{"user": 1, "assistant": "b"}]}, "texts[0].user: expected a string, found int."),
        ({"texts": ["a"]}, "texts[0]: expected a turn in {}, found str."),
        ({"images": ["a", None]}, "images[1]: a media reference must be"),
        ({"label": False}, "label: false marks a bad answer"),
    ],
)
def test_what_cannot_be_read_is_named(fields, message):
    with pytest.raises(DocumentError) as caught:
        read_docmatix(ROW | fields)
    assert str(caught.value).startswith(message)
