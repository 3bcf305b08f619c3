"""Rows of ``{"conversations": [{"from", "value"}], "images"}``: LLaMA-Factory, LLaVA, 2U1, Qwen."""

from __future__ import annotations

from dataclasses import replace

from vlcpt.data.documents import Document, DocumentError
from vlcpt.data.readers.fields import Row, required_list
from vlcpt.data.readers.markers import Piece, place_media, refuse_unread
from vlcpt.data.readers.turns import (
    Targets,
    Turn,
    document_of_turns,
    refuse_preferences,
    spoken,
    system_turn,
    turn_entry,
    turn_role,
    with_template_sizes,
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
    turns: list[Turn] = []
    pieces: list[list[Piece]] = []
    for number, one in enumerate(required_list(row, "conversations", "turns")):
        place = f"conversations[{number}]"
        entry = turn_entry(one, place)
        # Some data sets write OpenAI's keys under ShareGPT's name.
        role_key, text_key = ("role", "content") if entry.get("role") is not None else ("from", "value")
        role = turn_role(entry, role_key, place)
        text = entry.get(text_key)
        if not isinstance(text, str):
            raise DocumentError(
                f"expected a string, found {type(text).__name__}.", kind="row", field=f"{place}.{text_key}"
            )
        said, weight = spoken(text, entry, place)
        turns.append(Turn(place, role, (), weight))
        pieces.append(said)
    asks = [number for number, turn in enumerate(turns) if turn.role not in ("system", "developer")]
    placed = place_media(pieces, row, "conversations", missing_first=asks[0] if asks else 0)
    filled = [replace(turn, pieces=tuple(found)) for turn, found in zip(turns, placed, strict=True)]
    document = document_of_turns([*system_turn(row), *filled], targets, chat_template=chat_template)
    return with_template_sizes(document, row)
