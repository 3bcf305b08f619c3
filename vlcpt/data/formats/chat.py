"""Formats of conversations: messages, ShareGPT, Alpaca, query and response, Docmatix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from vlcpt.data.documents import Document, DocumentError, Image, Video
from vlcpt.data.formats.markers import Piece, Slot, split_markers
from vlcpt.data.formats.turns import Targets, Turn, conversation, entries, spoken, turn_role, turn_weight
from vlcpt.data.media.references import HINTS, medium_at, with_keys
from vlcpt.data.rows.fields import (
    Row,
    is_given,
    list_field,
    optional_text,
    required_field,
    text_at,
    text_field,
)

# Where a part of each type holds what it is about: the first key that is set.
_MEDIA_KEYS = {
    "image": ("image", "path", "url", "bytes"),
    "image_url": ("image_url",),
    "video": ("video", "path", "url", "bytes"),
    "video_url": ("video_url",),
}
_SIZES = ("min_pixels", "max_pixels", "fps", "max_frames")
# Words of a turn that are not in its content: without them something of the turn would be lost.
_UNREAD = ("tool_calls", "function_call", "reasoning_content")


def read_messages(row: Row, *, targets: Targets = "assistant", chat_template: bool = False) -> Document:
    """A document of all turns.

    In a content that is a string, ``<image>`` and ``<video>`` are markers of the row's files. In one
    that is a list of parts, media have parts of their own and text is plain; a part
    ``{"type": "image"}`` without a reference takes the row's next file.

    Example:
        >>> part = {"type": "image_url", "image_url": {"url": "cat.png"}}
        >>> row = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]}
        >>> read_messages(row, targets="all").to_markup()
        '<image><trainable_text>What?</trainable_text>'
    """
    turns = _messages(row)
    return conversation(turns, row, "messages", targets, chat_template=chat_template, files_first=False)


def _messages(row: Row) -> Iterator[Turn]:
    for place, entry in entries(row, "messages", "turns"):
        role = turn_role(entry, "role", place)
        for key in _UNREAD:
            value = entry.get(key)
            # Of a struct, Arrow fills in the keys that other turns have.
            if value and (is_given(value) or not isinstance(value, Mapping)):
                raise DocumentError(
                    "this part of a turn is not read. Write it into 'content' as the model should see it.",
                    kind="row",
                    field=f"{place}.{key}",
                )
        content = entry.get("content")
        if isinstance(content, str):
            yield Turn(place, role, *spoken(content, entry, place))
        else:
            _refuse_detail(
                entry, place, "it counts the characters of a content that is a string, and this one is none."
            )
            yield Turn(place, role, _parts(content, f"{place}.content"), turn_weight(entry, place))


def _refuse_detail(entry: Mapping[str, object], place: str, reason: str) -> None:
    if is_given(entry.get("train_detail")):
        raise DocumentError(
            f"{reason} Write the row as format segments, where each text says whether it is trained.",
            kind="row",
            field=f"{place}.train_detail",
        )


def _parts(content: object, place: str) -> list[Piece]:
    if isinstance(content, Mapping | bytes) or not isinstance(content, Sequence):
        raise DocumentError(
            f"expected a string or a list of parts, found {type(content).__name__}.", kind="row", field=place
        )
    pieces = (_part(part, f"{place}[{number}]") for number, part in enumerate(content))
    return [piece for piece in pieces if piece != ""]


def _part(part: object, place: str) -> Piece:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise DocumentError(f"expected a part in {{}}, found {type(part).__name__}.", kind="row", field=place)
    type_ = part.get("type")
    if type_ == "text":
        return text_at(part.get("text"), f"{place}.text")
    if not isinstance(type_, str) or type_ not in _MEDIA_KEYS:
        raise DocumentError(
            f"expected one of text, {', '.join(_MEDIA_KEYS)}; found {type_!r:.60}.",
            kind="row",
            field=f"{place}.type",
        )
    known = {"type", "text", "index", *_MEDIA_KEYS[type_], *_SIZES, *HINTS}
    unknown = [key for key, value in part.items() if key not in known and is_given(value)]
    if unknown:
        raise DocumentError(
            f"a part of type {type_!r} has no such key. Known: {', '.join(sorted(known))}.",
            kind="row",
            field=f"{place}.{unknown[0]!s:.60}",
        )
    kind = Image if type_.startswith("image") else Video
    used = _SIZES[:2] if kind is Image else _SIZES  # Qwen's tools write fps into parts of images, too
    sizes = {name: part[name] for name in used if part.get(name) is not None}
    key = next((key for key in _MEDIA_KEYS[type_] if is_given(part.get(key))), None)
    if key is not None:
        reference = {"bytes": part[key]} if key == "bytes" else part[key]
        if type_.endswith("_url") and isinstance(reference, Mapping):
            reference = {("path" if name == "url" else name): value for name, value in reference.items()}
        return medium_at(kind, with_keys(reference, sizes), f"{place}.{key}")
    if type_.endswith("_url"):
        raise DocumentError(f"expected a reference under {type_!r}, found none.", kind="row", field=place)
    return Slot(kind, place, part.get("index"), sizes)


def read_sharegpt(row: Row, *, targets: Targets = "assistant", chat_template: bool = False) -> Document:
    """A document of all turns. ``<image>`` and ``<video>`` are markers; all else is plain text.

    Where no turn has a marker, all files go before the first turn that is not the system's.

    Example:
        >>> turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}]
        >>> read_sharegpt({"conversations": turns, "image": "cat.png"}).to_markup()
        '<image>What?\\n<trainable_text>A cat.</trainable_text>'
    """
    return conversation(_sharegpt(row), row, "conversations", targets, chat_template=chat_template)


def _sharegpt(row: Row) -> Iterator[Turn]:
    for place, entry in entries(row, "conversations", "turns"):
        # Some data sets write OpenAI's keys under ShareGPT's name.
        role_key, text_key = ("role", "content") if entry.get("role") is not None else ("from", "value")
        role = turn_role(entry, role_key, place)
        text = text_at(entry.get(text_key), f"{place}.{text_key}")
        yield Turn(place, role, *spoken(text, entry, place))


def read_alpaca(row: Row, *, targets: Targets = "assistant", chat_template: bool = False) -> Document:
    """A document of the history, the instruction with its input, and the output.

    The answers of the history are trained like the output, as LLaMA-Factory does by default
    (``mask_history: false``).

    Example:
        >>> read_alpaca({"instruction": "Add.", "input": "1 + 1", "output": "2"}).to_markup()
        'Add.\\n1 + 1\\n<trainable_text>2</trainable_text>'
    """
    return conversation(_alpaca(row), row, "instruction", targets, chat_template=chat_template)


def _alpaca(row: Row) -> Iterator[Turn]:
    if "input" not in row:
        required_field(row, "instruction")
    asked = "\n".join(filter(None, (optional_text(row, name) for name in ("instruction", "input"))))
    yield from _history(row)
    yield Turn("instruction", "user", split_markers(asked))
    yield Turn("output", "assistant", split_markers(text_field(row, "output")))


def _history(row: Row) -> Iterator[Turn]:
    """Earlier questions and answers: a list of pairs; in a pair, null is an empty turn."""
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
            said = "" if text is None else text_at(text, f"{place}[{side}]")
            yield Turn(f"{place}[{side}]", role, split_markers(said))


def read_query(row: Row, *, targets: Targets = "assistant", chat_template: bool = False) -> Document:
    """A document of the history, the query and the response; the history's answers are trained, too.

    Example:
        >>> row = {"query": "<image>What?", "response": "A cat.", "images": ["cat.png"]}
        >>> read_query(row).to_markup()
        '<image>What?\\n<trainable_text>A cat.</trainable_text>'
    """
    name = "instruction" if row.get("query") is None and "instruction" in row else "query"
    return conversation(_query(row, name), row, name, targets, chat_template=chat_template)


def _query(row: Row, name: str) -> Iterator[Turn]:
    required_field(row, name)
    if name == "query" and is_given(row.get("instruction")):
        raise DocumentError(
            "'query' and 'instruction' are both given. Keep one.", kind="row", field="instruction"
        )
    yield from _history(row)
    yield Turn(name, "user", split_markers(optional_text(row, name)))
    yield Turn("response", "assistant", split_markers(text_field(row, "response")))


def read_docmatix(row: Row, *, targets: Targets = "assistant", chat_template: bool = False) -> Document:
    """A document of all images, and after them every question and its answer.

    Example:
        >>> texts = [{"user": "What?", "assistant": "A cat.", "source": "web"}]
        >>> read_docmatix({"images": ["cat.png"], "texts": texts}).to_markup()
        '<image>What?\\n<trainable_text>A cat.</trainable_text>'
    """
    return conversation(_docmatix(row), row, "texts", targets, chat_template=chat_template)


def _docmatix(row: Row) -> Iterator[Turn]:
    for place, entry in entries(row, "texts", "questions and answers"):
        weight = turn_weight(entry, place)
        _refuse_detail(entry, place, "spans of characters are not read here.")
        for role in ("user", "assistant"):
            try:
                required_field(entry, role)
                said = split_markers(optional_text(entry, role))
            except DocumentError as error:
                raise DocumentError(error.reason, kind="row", field=f"{place}.{role}") from None
            # What scales an answer says nothing of the question before it; what switches it off, does.
            speaks = role == "assistant" or weight == 0
            yield Turn(f"{place}.{role}", role, said, weight if speaks else None)
