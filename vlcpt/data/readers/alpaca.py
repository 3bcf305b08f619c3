"""Rows of ``{"instruction", "input", "output", "system", "history"}``: Alpaca, LLaMA-Factory."""

from __future__ import annotations

from vlcpt.data.documents import Document, DocumentError
from vlcpt.data.readers.fields import Row, list_field, optional_text, required_field, text_field
from vlcpt.data.readers.markers import refuse_unread
from vlcpt.data.readers.turns import Targets, Turn, filled_turns, refuse_preferences


def read_alpaca(row: Row, *, targets: Targets = "assistant", chat_template: bool = False) -> Document:
    """A document of the history, the instruction with its input, and the output.

    The answers of the history are trained like the output, as LLaMA-Factory does by default
    (``mask_history: false``).

    Example:
        >>> read_alpaca({"instruction": "Add.", "input": "1 + 1", "output": "2"}).to_markup()
        'Add.\\n1 + 1\\n<trainable_text>2</trainable_text>'
    """
    refuse_unread(row)
    refuse_preferences(row)
    if "input" not in row:
        required_field(row, "instruction")
    asked = [text for name in ("instruction", "input") if (text := optional_text(row, name))]
    turns = [
        *history_turns(row),
        Turn("instruction", "user", tuple(["\n".join(asked)] if asked else [])),
        answer_turn(row, "output"),
    ]
    return filled_turns(turns, row, "instruction", targets, chat_template=chat_template)


def answer_turn(row: Row, name: str) -> Turn:
    """The answer, which has to be there.

    Example:
        >>> answer_turn({"output": "2"}, "output").role
        'assistant'
    """
    text = text_field(row, name)
    return Turn(name, "assistant", (text,) if text else ())


def history_turns(row: Row) -> list[Turn]:
    """Earlier questions and answers: a list of pairs; in a pair, null is an empty turn.

    Example:
        >>> [turn.role for turn in history_turns({"history": [["Why?", "So."]]})]
        ['user', 'assistant']
    """
    turns = []
    for number, pair in enumerate(list_field(row, "history", "pairs of question and answer")):
        place = f"history[{number}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            found = f"{len(pair)} entries" if isinstance(pair, list | tuple) else type(pair).__name__
            raise DocumentError(
                f"expected a question and its answer as [question, answer], found {found}.",
                kind="row",
                field=place,
            )
        for side, (role, text) in enumerate(zip(("user", "assistant"), pair, strict=True)):
            if text is not None and not isinstance(text, str):
                raise DocumentError(
                    f"expected a string, found {type(text).__name__}.", kind="row", field=f"{place}[{side}]"
                )
            turns.append(Turn(f"{place}[{side}]", role, (text,) if text else ()))
    return turns
