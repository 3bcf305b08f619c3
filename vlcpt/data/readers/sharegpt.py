"""Rows of ``{"conversations": [{"from", "value"}], "images"}``: LLaMA-Factory, LLaVA, 2U1, Qwen."""

from __future__ import annotations

from vlcpt.data.documents import Document, DocumentError
from vlcpt.data.readers.fields import Row, required_list
from vlcpt.data.readers.markers import refuse_unread
from vlcpt.data.readers.spoken import document_of_texts
from vlcpt.data.readers.turns import (
    Targets,
    Turn,
    refuse_preferences,
    turn_entry,
    turn_role,
    turn_weight,
)


def read_row(row: Row, *, targets: Targets = "assistant", chat_template: bool = False) -> Document:
    """A document of all turns. ``<image>`` and ``<video>`` are markers; all else is plain text.

    Where no turn has a marker, all files go before the first turn that is not the system's.

    Example:
        >>> turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}]
        >>> read_row({"conversations": turns, "image": "cat.png"}).to_markup()
        '<image>What?\\n<trainable_text>A cat.</trainable_text>'
    """
    refuse_unread(row)
    refuse_preferences(row)
    said: list[tuple[Turn, str]] = []
    for number, one in enumerate(required_list(row, "conversations", "turns")):
        place = f"conversations[{number}]"
        entry = turn_entry(one, place)
        # Some data sets write OpenAI's keys under ShareGPT's name; Arrow fills missing keys with null.
        role_key, text_key = ("role", "content") if entry.get("role") is not None else ("from", "value")
        role = turn_role(entry, role_key, place)
        text = entry.get(text_key)
        if not isinstance(text, str):
            raise DocumentError(
                f"expected a string, found {type(text).__name__}.", kind="row", field=f"{place}.{text_key}"
            )
        said.append((Turn(place, role, (), turn_weight(entry, place)), text))
    return document_of_texts(row, said, "conversations", targets, chat_template=chat_template)
