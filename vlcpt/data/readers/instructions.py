"""Rows of one question and its answer, after others: Alpaca's ``instruction``, ms-swift's ``query``."""

from __future__ import annotations

from vlcpt.data.documents import Document, DocumentError
from vlcpt.data.readers.fields import Row, list_field, text_field
from vlcpt.data.readers.markers import refuse_unread
from vlcpt.data.readers.spoken import document_of_texts
from vlcpt.data.readers.turns import Targets, Turn, refuse_preferences


def read_alpaca(row: Row, *, targets: Targets = "assistant", chat_template: bool = False) -> Document:
    """A document of ``history``, ``instruction`` with ``input`` on the next line, and ``output``.

    Every answer is trained, those of ``history`` too, as LLaMA-Factory does unless told otherwise.

    Example:
        >>> row = {"instruction": "Add.", "input": "1, 2", "output": "3", "history": [["Hello.", "Hi!"]]}
        >>> read_alpaca(row).to_markup()
        'Hello.\\n<trainable_text>Hi!\\n</trainable_text>Add.\\n1, 2\\n<trainable_text>3</trainable_text>'
    """
    question = text_field(row, "instruction")
    if row.get("input") is not None:
        given = text_field(row, "input")
        question = "\n".join(part for part in (question, given) if part)
    return _document(row, ("instruction", question), "output", targets, chat_template)


def read_query(row: Row, *, targets: Targets = "assistant", chat_template: bool = False) -> Document:
    """A document of ``history``, ``query`` (or ``instruction``) and ``response``; every answer is trained.

    Example:
        >>> read_query({"query": "<image>What?", "response": "A cat.", "images": ["cat.png"]}).to_markup()
        '<image>What?\\n<trainable_text>A cat.</trainable_text>'
    """
    field = "instruction" if row.get("query") is None and row.get("instruction") is not None else "query"
    return _document(row, (field, text_field(row, field)), "response", targets, chat_template)


def _document(
    row: Row, question: tuple[str, str], answer: str, targets: Targets, chat_template: bool
) -> Document:
    refuse_unread(row)
    refuse_preferences(row)
    asked = [*_history(row), question, (answer, text_field(row, answer))]
    said = [
        (Turn(place, ("user", "assistant")[number % 2], ()), text)
        for number, (place, text) in enumerate(asked)
    ]
    return document_of_texts(row, said, question[0], targets, chat_template=chat_template)


def _history(row: Row) -> list[tuple[str, str]]:
    """Questions and answers in turn, with their places."""
    said = []
    for number, pair in enumerate(list_field(row, "history", "pairs of a question and its answer")):
        place = f"history[{number}]"
        texts = list(pair) if isinstance(pair, list | tuple) else []
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise DocumentError(
                f"expected [question, answer], two strings; found {pair!r:.60}.", kind="row", field=place
            )
        said += [(f"{place}[{part}]", str(text)) for part, text in enumerate(texts)]
    return said
