"""Formats by name, and the one that the first rows show."""

import copy
import json
import logging
import random
import re
from pathlib import Path

import pytest

from tests.support import opened
from vlcpt import Document, DocumentError, Text
from vlcpt.data.documents import TurnEdge
from vlcpt.data.formats.detect import (
    FORMATS,
    SCHEMAS,
    check_format,
    detect_format,
    log_formats,
    schema_reader,
)
from vlcpt.data.rows.tables import MemoryRows

TURNS = [{"from": "human", "value": "a"}]
MESSAGES = [{"role": "user", "content": "a"}]
# One row of each, as Arrow gives it where other rows have more.
ROWS = {
    "vlcpt": [
        {"text": "a"},
        {"text": "a", "images": ["a"], "image": None},
        {"text": "a", "images": ["a"], "image": "thumbnail"},
        {"text": "a", "messages": None},
        {"text": "a", "instruction": "b", "output": "c"},
        {"text": "<image>a <trainable_text>b</trainable_text>", "images": ["a"], "caption": "c"},
        {"text": "<VID1>", "videos": ["a"], "caption": "c", "image": "thumbnail"},
        {"text": "<trainable_text>b</trainable_text>", "caption": "c"},
        {"text": "a b", "instruction": "a", "output": "b"},
        {"text": "a", "image": "", "video": None},
    ],
    "segments": [{"segments": []}],
    "sharegpt": [{"conversations": TURNS, "image": "a.png"}, {"conversations": TURNS, "images": ["a.png"]}],
    "messages": [{"messages": MESSAGES}, {"messages": MESSAGES, "images": ["a.png"], "text": None}],
    "alpaca": [
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "input": None, "output": "b", "response": None, "history": [], "text": None},
    ],
    "query": [
        {"query": "a", "response": "b"},
        {"instruction": "a", "response": "b", "output": None, "images": ["a"]},
    ],
    "docmatix": [
        {"images": ["a"], "texts": [{"user": "a", "assistant": "b", "source": None}]},
        {"images": [], "texts": [{"user": "a", "assistant": "b"}]},
    ],
    "caption": [
        *({"image": "a", "caption": "a"}, {"image": {}, "text": "a"}, {"video": "a", "caption": "b"}),
        *({"images": ["a"], "caption": "b"}, {"image": "a", "text": "<image>a"}),
        {"image": "a", "text": "alt text", "caption": "b"},
    ],
    "obelics": [{"images": [None, "a"], "texts": ["a", None], "metadata": "[]"}],
    "mmc4": [{"text_list": ["a"], "image_info": [], "similarity_matrix": []}],
}  # fmt: skip


def detect(*rows):
    return detect_format(MemoryRows(rows, "rows"), "rows")


@pytest.mark.parametrize(("format", "row"), [(format, row) for format, rows in ROWS.items() for row in rows])
def test_each_format_is_recognised_by_its_fields(format, row):
    assert detect(row) == format


def test_what_was_chosen_and_why_is_logged_in_a_line_a_format(caplog):
    with caplog.at_level(logging.INFO):
        log_formats({"chats": "messages", "pages": "vlcpt", "more": "messages"})

    assert caplog.messages == [
        "format messages was found, because the first rows have messages of role and content, e.g. of chats. "
        "Set format of a source to read it otherwise.",
        "format vlcpt was found, because the first rows have text, marked or not, e.g. of pages. "
        "Set format of a source to read it otherwise.",
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
            r"first rows fit more than one format: messages .*, vlcpt \(row 2: text, marked or not\)",
        ),
        (
            [{"text": "<trainable_text>a</trainable_text>", "image": "a"}],
            r"vlcpt \(row 1: .*\), caption \(row 1",
        ),
        ([{"text": "a", "images": ["a"], "caption": "b"}], r"vlcpt \(row 1: .*\), caption \(row 1"),
        ([{"text": "<image>a", "image": "a", "caption": "b"}], r"vlcpt \(row 1: .*\), caption \(row 1"),
    ],
)
def test_rows_that_fit_two_formats_are_an_error_that_names_them(rows, message):
    with pytest.raises(DocumentError, match=rf"^rows: .*{message}.*Set format to the one that is meant\."):
        detect(*rows)


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"instruction": "a", "answer": "b"}, "'instruction', 'answer'"),
        ({}, "none"),
        ({"images": ["a"], "texts": [{"user": "a"}]}, "'images', 'texts'"),
        ({f"f{n}": 1 for n in range(30)}, "'f19', …"),
    ],
)
def test_rows_that_fit_none_are_an_error_that_names_fields_and_formats(row, fields):
    with pytest.raises(DocumentError) as caught:
        detect(row)
    assert str(caught.value).startswith("rows:1: no format fits the fields ")
    assert f"{fields}. Known formats: vlcpt: text, marked or not; segments: " in caught.value.reason


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
    having = "sharegpt, messages, alpaca, query, docmatix"
    with pytest.raises(ValueError, match=rf"does not apply to format caption, only to {having}\. Remove"):
        check_format("caption", chat_template=True)
    assert schema_reader("sharegpt", chat_template=True)(ROWS["sharegpt"][0]).segments[0] == TurnEdge("start")


def test_untagged_reaches_the_one_format_that_has_it():
    assert not schema_reader("vlcpt", untagged="mask")({"text": "a"}).segments[0].trainable


WHOLE = Path(__file__).parents[3] / "docs/data.md"
ODD = [
    *(None, True, 0, -1, 1e300, 10**400, float("nan"), "", "a", "<image>", "\0", "\ud800", "two\nlines"),
    *(
        "x" * 5_000,
        "../a.png",
        "http://a/b",
        b"\xff",
        [],
        {},
        [None],
        [[]],
        [{}],
        ["a.png"] * 3,
        {"path": None},
    ),
    *({"path": "a.png", "fps": 2}, {"type": "image"}, {"type": "text", "text": "t"}, {"url": "a.png"}),
]
NAMES = [
    "images",
    "image",
    "videos",
    "text",
    "weight",
    "loss",
    "loss_scale",
    "id",
    "role",
    "content",
    "system",
    "input",
    "history",
    "chat_template_kwargs",
]


def mutated(row, rng: random.Random):
    """A row with one to three of its values removed, added or replaced by something odd."""
    row = copy.deepcopy(row)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(inside(row))
        if not places:
            break
        holder, key = rng.choice(places)
        how, odd = rng.randrange(4), copy.deepcopy(rng.choice(ODD))
        if how == 0 and isinstance(holder, dict):
            del holder[key]
        elif how == 1 and isinstance(holder, list):
            holder.insert(key, odd)
        elif how == 2 and isinstance(holder, dict):
            holder[rng.choice([*NAMES, 7, "x" * 5_000])] = odd
        else:
            holder[key] = odd
    return row


def inside(value):
    """Every place in a row, as what holds it and its key there."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from inside(value[key])


@pytest.mark.parametrize("format", SCHEMAS)
def test_mutated_rows_raise_nothing_but_document_errors_of_one_short_line(format):
    section = re.search(rf"^## `{format}`\n(.*?)(?=^## |\Z)", WHOLE.read_text("utf-8"), re.M | re.S)[1]
    block = re.search(r"^```json\n(.*?)^```$", section, re.M | re.S)
    rows = [json.loads(line) for line in block[1].splitlines()] if block else [{"text": "a <b>"}]
    rng, read, told = random.Random(0), 0, []
    for _ in range(1000):
        try:
            opened([mutated(rng.choice(rows), rng)], format=format).document(0)
            read += 1
        except DocumentError as error:
            told.append(str(error))
    assert read > 20 and len(told) > 20  # or the fuzz shows nothing
    assert [one for one in told if not one.startswith("rows:1: ") or "\n" in one or len(one) > 1_500] == []


@pytest.mark.parametrize("tag", ["<trainable_text>", "<Trainable-Text>", "<trainble_text>"])
def test_a_row_that_could_be_a_caption_is_not_taken_for_one_where_its_text_has_a_tag(tag):
    row = {"image": "a.png", "text": f"a {tag}b"}
    with pytest.raises(DocumentError, match=r"fit more than one format: vlcpt .*, caption "):
        detect_format(MemoryRows([row], "rows"), "rows")
    assert detect_format(MemoryRows([row | {"text": "a <b>b</b>"}], "rows"), "rows") == "caption"
