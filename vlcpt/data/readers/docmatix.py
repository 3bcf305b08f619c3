"""Rows of ``{"images", "texts": [{"user", "assistant", "source"}]}``: Docmatix, The Cauldron, FineVision."""

from __future__ import annotations

from dataclasses import replace

from vlcpt.data.documents import Document, DocumentError
from vlcpt.data.readers.fields import Row, is_given, optional_text, required_field, required_list
from vlcpt.data.readers.markers import refuse_unread
from vlcpt.data.readers.turns import (
    TURN_WEIGHTS,
    Targets,
    Turn,
    filled_turns,
    refuse_preferences,
    turn_entry,
    turn_weight,
)

_READ = ("user", "assistant", *TURN_WEIGHTS, "train_detail")


def read_row(row: Row, *, targets: Targets = "assistant", chat_template: bool = False) -> Document:
    """A document of all images, and after them every question and its answer.

    Example:
        >>> texts = [{"user": "What?", "assistant": "A cat.", "source": "web"}]
        >>> read_row({"images": ["cat.png"], "texts": texts}).to_markup()
        '<image>What?\\n<trainable_text>A cat.</trainable_text>'
    """
    refuse_unread(row)
    refuse_preferences(row)
    turns: list[Turn] = []
    others: dict[str, None] = {}
    for number, one in enumerate(required_list(row, "texts", "questions and answers")):
        place = f"texts[{number}]"
        entry = turn_entry(one, place)
        weight = turn_weight(entry, place)
        if is_given(entry.get("train_detail")):
            raise DocumentError(
                "spans of characters are not read here. Write the row as format segments, where each text "
                "says whether it is trained.",
                kind="row",
                field=f"{place}.train_detail",
            )
        for name, speaks in (("user", weight == 0), ("assistant", True)):
            try:
                required_field(entry, name)
                text = optional_text(entry, name)
            except DocumentError as error:
                raise DocumentError(error.reason, kind="row", field=f"{place}.{name}") from None
            # What scales an answer says nothing of the question before it; what switches it off, does.
            turns.append(Turn(f"{place}.{name}", name, (text,) if text else (), weight if speaks else None))
        others |= {
            f"texts[].{key}"[:60]: None
            for key, value in entry.items()
            if key not in _READ and is_given(value)
        }
    document = filled_turns(turns, row, "texts", targets, chat_template=chat_template)
    return replace(document, not_read=(*others, *document.not_read)) if others else document
