"""A question and its answer in fields of their own: Alpaca's rows and ms-swift's older ones."""

import pytest

from vlcpt import DocumentError, Image, Text
from vlcpt.data.readers.instructions import read_alpaca, read_query

# As LLaMA-Factory documents its alpaca format.
ALPACA = {
    "system": "Be brief.",
    "instruction": "Name the part.",
    "input": "It closes a pipe.",
    "output": "A valve.",
    "history": [["Hello.", "Hi!"], ["Ready?", "Yes."]],
}
# As ms-swift documented its own before it had messages.
QUERY = {"query": "55555", "response": "66666", "history": [["11111", "22222"], ["33333", "44444"]]}


def test_every_turn_is_in_the_document_and_every_answer_is_trained():
    assert read_alpaca(ALPACA).segments == (
        Text("Be brief.\nHello.\n"),
        Text("Hi!\n", trainable=True),
        Text("Ready?\n"),
        Text("Yes.\n", trainable=True),
        Text("Name the part.\nIt closes a pipe.\n"),
        Text("A valve.", trainable=True),
    )
    assert read_query(QUERY).to_markup() == (
        "11111\n<trainable_text>22222\n</trainable_text>33333\n<trainable_text>44444\n</trainable_text>"
        "55555\n<trainable_text>66666</trainable_text>"
    )


@pytest.mark.parametrize(("read", "row"), [(read_alpaca, ALPACA), (read_query, QUERY)])
def test_the_last_answer_alone_is_trained_on_request(read, row):
    trained = [
        one.text for one in read(row, targets="last").segments if isinstance(one, Text) and one.trainable
    ]
    assert trained == [row.get("output") or row.get("response")]


@pytest.mark.parametrize("nothing", [{}, {"input": ""}, {"input": None, "history": None, "system": None}])
def test_an_input_that_is_empty_adds_no_line(nothing):
    row = {"instruction": "Why?", "output": "So.", **nothing}
    assert read_alpaca(row).to_markup() == "Why?\n<trainable_text>So.</trainable_text>"


def test_files_stand_at_their_markers_or_before_the_first_question():
    row = {"query": "And <image>this?", "response": "Yes.", "images": ["a.png"], "system": "Be brief."}
    assert read_query(row).segments[:3] == (Text("Be brief.\nAnd "), Image("a.png"), Text("this?\n"))

    row["query"] = "And this?"
    assert read_query(row).segments[:3] == (Text("Be brief.\n"), Image("a.png"), Text("And this?\n"))


def test_a_query_may_be_called_instruction():
    assert read_query({"instruction": "a", "query": None, "response": "b"}) == read_query(
        {"query": "a", "response": "b"}
    )


def test_tags_are_plain_text():
    text = "a <trainable_text>b"
    assert read_query({"query": text, "response": "c"}).segments[0] == Text(f"{text}\n")


def test_turn_markers_are_kept_on_request():
    document = read_alpaca({"instruction": "a", "output": "b"}, chat_template=True)
    assert [one.text for one in document.segments if isinstance(one, Text)] == [
        *("user\na", "\nassistant\n"[:1]),
        *("assistant\n", "b", "\n"),
    ]


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"output": None}, "output", "expected a string, found NoneType"),
        ({"output": ["a", "b"]}, "output", "expected a string, found list"),
        ({"instruction": 7}, "instruction", "expected a string, found int"),
        ({"input": 7}, "input", "expected a string, found int"),
        ({"history": [["a"]]}, "history[0]", "expected [question, answer], two strings; found ['a']"),
        ({"history": ["ab"]}, "history[0]", "expected [question, answer], two strings; found 'ab'"),
        ({"history": [["a", "b"], ["c", None]]}, "history[1]", "two strings; found ['c', None]"),
        ({"history": "ab"}, "history", "expected a list of pairs of a question and its answer, found str"),
        ({"images": ["a.png", "b.png"], "input": "<image>"}, "instruction", "1 <image> marker but the row"),
        ({"audio": "a.wav"}, "audio", "audio is not read"),
        ({"label": False}, "label", "false marks a bad answer (KTO)"),
        ({"rejected": "c"}, "rejected", "a better and a worse answer (DPO)"),
        ({"rejected_response": "c"}, "rejected_response", "a better and a worse answer (DPO)"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_names_the_field(change, field, message):
    with pytest.raises(DocumentError) as caught:
        read_alpaca({"instruction": "a", "output": "b"} | change)
    assert caught.value.field == field
    assert message in caught.value.reason
