"""Formats by name, and the one that the first rows show."""

import logging

import pytest

from vlcpt import Document, DocumentError, Text
from vlcpt.data.readers.rows import MemoryRows
from vlcpt.data.readers.schemas import FORMATS, SCHEMAS, check_format, detect_format, schema_reader
from vlcpt.data.turn_edges import TurnEdge

TURNS = [{"from": "human", "value": "a"}]
MESSAGES = [{"role": "user", "content": "a"}]
# One row of each, as Arrow gives it where other rows have more.
ROWS = {
    "vlcpt": [
        {"text": "a"},
        {"text": "a", "images": ["a"], "image": None},
        {"text": "a", "images": ["a"], "image": "thumbnail"},
        {"text": "a", "messages": None},
    ],
    "segments": [{"segments": []}],
    "sharegpt": [{"conversations": TURNS, "image": "a.png"}, {"conversations": TURNS, "images": ["a.png"]}],
    "messages": [{"messages": MESSAGES}, {"messages": MESSAGES, "images": ["a.png"], "text": None}],
    "caption": [{"image": "a", "caption": "a"}, {"image": {}, "text": "a"}, {"video": "a", "caption": "b"}],
    "obelics": [{"images": [None, "a"], "texts": ["a", None], "metadata": "[]"}],
    "mmc4": [{"text_list": ["a"], "image_info": [], "similarity_matrix": []}],
}  # fmt: skip


def detect(*rows):
    return detect_format(MemoryRows(rows, "rows"), "rows")


@pytest.mark.parametrize(("format", "row"), [(format, row) for format, rows in ROWS.items() for row in rows])
def test_each_format_is_told_from_its_fields(format, row):
    assert detect(row) == format


def test_what_was_chosen_and_why_is_logged(caplog):
    with caplog.at_level(logging.INFO):
        detect({"broken": 1}, *ROWS["messages"])
    assert caplog.messages == [
        "rows: format messages, because row 2 has messages of role and content. "
        "Set format to read it otherwise."
    ]


def test_documents_need_no_schema():
    assert detect(Document((Text("a"),))) == "vlcpt"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"conversations": TURNS, "messages": MESSAGES}],
            r"sharegpt \(row 1: conversations of from and value\), messages \(row 1: messages of role and",
        ),
        (
            [{"messages": MESSAGES}, {"text": "a"}],
            r"first rows fit more than one format: messages \(row 1: .*\), vlcpt \(row 2: text with markup\)",
        ),
        (
            [{"text": "<trainable_text>a</trainable_text>", "image": "a"}],
            r"vlcpt \(row 1: .*\), caption \(row 1",
        ),
    ],
)
def test_rows_that_fit_two_formats_are_an_error_that_names_them(rows, message):
    with pytest.raises(DocumentError, match=rf"^rows: .*{message}.*Set format to the one that is meant\."):
        detect(*rows)


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"instruction": "a", "output": "b"}, "'instruction', 'output'"),
        ({}, "none"),
        ({"images": ["a"], "texts": [{"user": "a"}]}, "'images', 'texts'"),
        ({f"f{n}": 1 for n in range(30)}, "'f19', …"),
    ],
)
def test_rows_that_fit_none_are_an_error_that_names_fields_and_formats(row, fields):
    with pytest.raises(DocumentError) as caught:
        detect(row)
    assert str(caught.value).startswith("rows:1: no format fits the fields ")
    assert f"{fields}. Known formats: vlcpt: text with markup; segments: " in caught.value.reason


@pytest.mark.parametrize(
    ("format", "targets", "message"),
    [
        ("sharegtp", None, f"unknown format 'sharegtp'. Known: {', '.join(FORMATS)}."),
        ("messages", "user", "targets 'user' is unknown. Format messages has: assistant, last, all."),
        ("obelics", "assistant", "targets 'assistant' is unknown. Format obelics has: all."),
        (
            "vlcpt",
            "all",
            "targets 'all' does not apply to format vlcpt: its rows mark what trains. Remove it.",
        ),
        ("segments", "all", "does not apply to format segments"),
        ("auto", "none", "targets 'none' is unknown. Format auto has: assistant, last, all."),
    ],
)
def test_an_option_that_a_format_does_not_have_is_an_error(format, targets, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        check_format(format, targets)
    assert message in str(caught.value)


@pytest.mark.parametrize("format", SCHEMAS)
def test_every_choice_of_targets_reads_a_row(format):
    row = ROWS["vlcpt" if format == "text" else format][0]
    for targets in (None, *SCHEMAS[format].targets):
        assert isinstance(schema_reader(format, targets=targets)(row), Document)


def test_a_chat_template_is_for_formats_with_turns():
    with pytest.raises(
        ValueError, match=r"does not apply to format caption, only to sharegpt, messages\. Remove"
    ):
        check_format("caption", chat_template=True)
    assert schema_reader("sharegpt", chat_template=True)(ROWS["sharegpt"][0]).segments[0] == TurnEdge("start")


def test_untagged_reaches_the_one_format_that_has_it():
    assert not schema_reader("vlcpt", untagged="mask")({"text": "a"}).segments[0].trainable
