"""Instruction, input and output, with a history."""

import pytest

from vlcpt import DocumentError, Image
from vlcpt.data.documents import TurnEdge
from vlcpt.data.formats.chat import read_alpaca

ROW = {"instruction": "Add.", "input": "1 + 1", "output": "2"}


def test_the_answers_of_the_history_are_trained_like_the_output():
    row = ROW | {"history": [["a", "b"], ["c", None]], "system": "s"}
    assert read_alpaca(row).to_markup() == (
        "s\na\n<trainable_text>b\n</trainable_text>c\nAdd.\n1 + 1\n<trainable_text>2</trainable_text>"
    )
    assert read_alpaca(row, targets="last").to_markup() == (
        "s\na\nb\nc\nAdd.\n1 + 1\n<trainable_text>2</trainable_text>"
    )


@pytest.mark.parametrize("nothing", [{"input": ""}, {"input": None, "history": None, "images": None}])
def test_an_input_that_is_empty_or_null_adds_nothing(nothing):
    assert read_alpaca(ROW | nothing).to_markup() == "Add.\n<trainable_text>2</trainable_text>"


def test_pictures_stand_at_their_markers_or_first():
    assert read_alpaca(ROW | {"images": ["a.png"]}).segments[0] == Image("a.png")
    assert read_alpaca(ROW | {"input": "<image>x", "image": "a.png"}).segments[1] == Image("a.png")


def test_a_chat_template_keeps_the_turns():
    segments = read_alpaca(ROW, chat_template=True).segments
    assert [one.trainable for one in segments if isinstance(one, TurnEdge)] == [False, False, False, True]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output": 2}, "output: expected a string, found int."),
        ({"output": None}, "output: expected a string, found NoneType."),
        ({"instruction": ["a"]}, "instruction: expected a string, found list."),
        ({"input": {}}, "input: expected a string, found dict."),
        ({"history": "a"}, "history: expected a list of pairs of question and answer, found str."),
        (
            {"history": [["a"]]},
            "history[0]: expected a question and its answer as [question, answer]",
        ),
        ({"history": [{"a": "b"}]}, "history[0]: expected a question and its answer as [question, answer]"),
        ({"history": [["a", 7]]}, "history[0][1]: expected a string, found int."),
        ({"images": ["a", "b"], "input": "<image>"}, "instruction: there are 1 <image> marker but the row"),
        ({"kto_tag": False}, "kto_tag: false marks a bad answer (KTO)"),
        ({"chosen": "a", "rejected": "b"}, "chosen: the row is a pair of a better and a worse answer (DPO)"),
        ({"audios": ["a"]}, "audios: audio is not read."),
    ],
)
def test_what_cannot_be_read_is_named(fields, message):
    with pytest.raises(DocumentError) as caught:
        read_alpaca(ROW | fields)
    assert str(caught.value).startswith(message)
