"""Rows of ``{"images", "texts": [{"user", "assistant", "source"}]}``: Docmatix, The Cauldron, FineVision."""

from __future__ import annotations

from dataclasses import replace

from vlcpt.data.documents import Document, DocumentError
from vlcpt.data.readers.fields import Row, required_list
from vlcpt.data.readers.markers import refuse_unread
from vlcpt.data.readers.spoken import document_of_texts
from vlcpt.data.readers.turns import Targets, Turn, refuse_preferences, turn_entry, turn_weight

_SAID = ("user", "assistant")
_SWITCHES = ("loss", "train", "loss_scale", "weight", "loss_weight", "train_detail")


def read_row(row: Row, *, targets: Targets = "assistant", chat_template: bool = False) -> Document:
    """A document of all images, and then of all questions and answers about them.

    Example:
        >>> texts = [{"user": "What?", "assistant": "A form.", "source": "PDFA key: 1"}]
        >>> document = read_row({"images": ["a.png"], "texts": texts})
        >>> document.to_markup(), document.not_read
        ('<image>What?\\n<trainable_text>A form.</trainable_text>', ('texts[].source',))
    """
    refuse_unread(row)
    refuse_preferences(row)
    said: list[tuple[Turn, str]] = []
    not_read: dict[str, None] = {}
    for number, one in enumerate(required_list(row, "texts", "questions and answers")):
        place = f"texts[{number}]"
        entry = turn_entry(one, place)
        weight = turn_weight(entry, place)
        for role in _SAID:
            text = entry.get(role)
            if not isinstance(text, str):
                raise DocumentError(
                    f"expected a string, found {type(text).__name__}.", kind="row", field=f"{place}.{role}"
                )
            said.append((Turn(place, role, (), weight if role == "assistant" else None), text))
        others = [
            key for key, value in entry.items() if value is not None and key not in (*_SAID, *_SWITCHES)
        ]
        not_read |= dict.fromkeys(f"texts[].{key!s:.60}" for key in others)
    document = document_of_texts(row, said, "texts", targets, chat_template=chat_template)
    return replace(document, not_read=(*document.not_read, *not_read)) if not_read else document
