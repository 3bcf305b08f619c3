"""Rows of ``{"query" or "instruction", "response", "history", "images", "system"}``: ms-swift before 3."""

from __future__ import annotations

from vlcpt.data.documents import Document, DocumentError
from vlcpt.data.readers.alpaca import answer_turn, history_turns
from vlcpt.data.readers.fields import Row, is_given, optional_text, required_field
from vlcpt.data.readers.markers import refuse_unread
from vlcpt.data.readers.turns import Targets, Turn, filled_turns, refuse_preferences


def read_query(row: Row, *, targets: Targets = "assistant", chat_template: bool = False) -> Document:
    """A document of the history, the query and the response; the history's answers are trained, too.

    Example:
        >>> row = {"query": "<image>What?", "response": "A cat.", "images": ["cat.png"]}
        >>> read_query(row).to_markup()
        '<image>What?\\n<trainable_text>A cat.</trainable_text>'
    """
    refuse_unread(row)
    refuse_preferences(row)
    name = "instruction" if row.get("query") is None and "instruction" in row else "query"
    required_field(row, name)
    if name == "query" and is_given(row.get("instruction")):
        raise DocumentError(
            "'query' and 'instruction' are both given. Keep one.", kind="row", field="instruction"
        )
    asked = optional_text(row, name)
    turns = [
        *history_turns(row),
        Turn(name, "user", (asked,) if asked else ()),
        answer_turn(row, "response"),
    ]
    return filled_turns(turns, row, name, targets, chat_template=chat_template)
