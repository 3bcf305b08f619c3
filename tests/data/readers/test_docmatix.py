"""Images and the questions about them: Docmatix, The Cauldron, FineVision."""

import pytest

from vlcpt import DocumentError, Image, Text
from vlcpt.data.readers.docmatix import read_row

ROW = {
    "images": [{"bytes": b"1", "path": None}, {"bytes": b"2", "path": None}],
    "texts": [
        {"user": "What is on page 1?", "assistant": "A valve.", "source": "PDFA key: 1"},
        {"user": "And then?", "assistant": "A pump.", "source": "PDFA key: 1"},
    ],
}


def test_a_row_is_one_document_of_all_images_and_all_questions():
    document = read_row(ROW)

    assert document.segments == (
        Image(data=b"1"),
        Image(data=b"2"),
        Text("What is on page 1?\n"),
        Text("A valve.\n", trainable=True),
        Text("And then?\n"),
        Text("A pump.", trainable=True),
    )
    assert document.not_read == ("texts[].source",)


def test_a_row_without_images_is_text_alone():
    pair = {"user": "a", "assistant": "b", "source": None}
    assert read_row({"images": [], "texts": [pair]}).to_markup() == "a\n<trainable_text>b</trainable_text>"
    assert read_row({"images": None, "texts": [pair]}).not_read == ()


def test_a_switch_turns_its_answer_off():
    row = {"texts": [{"user": "a", "assistant": "b", "loss": False}, {"user": "c", "assistant": "d"}]}
    assert read_row(row).to_markup() == "a\nb\nc\n<trainable_text>d</trainable_text>"


@pytest.mark.parametrize(
    ("texts", "field", "message"),
    [
        ([], "texts", "expected a list of questions and answers, found none"),
        (["a"], "texts[0]", "expected a turn in {}, found str"),
        ([{"user": "a", "assistant": None}], "texts[0].assistant", "expected a string, found NoneType"),
        ([{"user": 1, "assistant": "b"}], "texts[0].user", "expected a string, found int"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_names_the_place(texts, field, message):
    with pytest.raises(DocumentError) as caught:
        read_row({"images": ["a.png"], "texts": texts})
    assert caught.value.field == field
    assert message in caught.value.reason
