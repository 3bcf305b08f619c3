"""Query and response."""

import pytest

from vlcpt import DocumentError
from vlcpt.data.formats.chat import read_query

ROW = {"query": "Why?", "response": "So."}


def test_the_history_comes_first_and_its_answers_are_trained():
    assert read_query(ROW | {"history": [["a", "b"]], "system": "s"}).to_markup() == (
        "s\na\n<trainable_text>b\n</trainable_text>Why?\n<trainable_text>So.</trainable_text>"
    )


def test_an_instruction_may_stand_for_the_query():
    row = {"instruction": "Why?", "response": "So.", "query": None}
    assert read_query(row) == read_query(ROW)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query": 1}, "query: expected a string, found int."),
        ({"response": None}, "response: expected a string, found NoneType."),
        ({"instruction": "And?"}, "instruction: 'query' and 'instruction' are both given."),
        ({"rejected_response": "No."}, "rejected_response: the row is a pair"),
        ({"label": False}, "label: false marks a bad answer (KTO)"),
        ({"chat_template_kwargs": {"max_pixels": "a"}}, "chat_template_kwargs: 'max_pixels' of a media"),
    ],
)
def test_what_cannot_be_read_is_named(fields, message):
    with pytest.raises(DocumentError) as caught:
        read_query(ROW | fields)
    assert str(caught.value).startswith(message)
