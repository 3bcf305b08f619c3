"""Conversations: messages, ShareGPT, Alpaca, query and response, Docmatix; turns become one document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from vlcpt.data.documents import (
    MAX_WEIGHT,
    Document,
    DocumentError,
    Image,
    Segment,
    Text,
    TurnEdge,
    Video,
)
from vlcpt.data.formats.markers import (
    Piece,
    Slot,
    cut_at_markers,
    place_media,
    refuse_unread,
    split_markers,
)
from vlcpt.data.media.references import HINTS, SIZES, medium_at
from vlcpt.data.rows.fields import (
    Row,
    field_names,
    is_given,
    list_field,
    optional_text,
    required_field,
    required_list,
    text_at,
    text_field,
)

Targets = Literal["assistant", "last", "all"]
TARGETS = ("assistant", "last", "all")

# Each role by the names that data sets give it, and whether the model is the one who speaks.
ROLES = {
    **dict.fromkeys(("assistant", "gpt", "function_call", "tool_call"), True),
    **dict.fromkeys(("system", "developer", "user", "human"), False),
    **dict.fromkeys(("observation", "tool", "tool_response", "function"), False),
}


# Keys of a turn that turn its loss on or off; others scale it.
_SWITCHES = ("loss", "train")
TURN_WEIGHTS = (*_SWITCHES, "loss_scale", "weight", "loss_weight")
# Fields that say that the text of a row is not one to learn from.
PREFERENCES = ("label", "kto_tag", "chosen", "rejected", "rejected_response", "rejected_messages")

# ms-swift's arguments of its template, which a row may have.
TEMPLATE = "chat_template_kwargs"
TEMPLATE_SIZES = ("min_pixels", "max_pixels")

# What the model's chat template calls a role. For tools it writes more than the turn says.
_IN_CHAT = {
    **dict.fromkeys(("assistant", "gpt"), "assistant"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("system", "developer"), "system"),
}


@dataclass(frozen=True)
class Turn:
    """One turn, its media in place.

    Args:
        place: Where it stands in the row, e.g. ``"messages[2]"``.
        role: One of :data:`ROLES`.
        pieces: Text, media and slots for the row's files, in reading order.
        weight: What the turn itself says: the weight of its loss, 0 for context; None: nothing.
    """

    place: str
    role: str
    pieces: Sequence[Piece]
    weight: float | None = None


def conversation(
    turns: Iterable[Turn],
    row: Row,
    field: str,
    targets: Targets,
    *,
    chat_template: bool,
    files_first: bool = True,
) -> Document:
    """One document of all turns, joined by newlines that belong to the turn before.

    Args:
        turns: In order, read from the row after it is known to be one to learn from; an empty one adds
            nothing, and is counted if it would have been trained.
        row: Has the files for slots, and perhaps a ``system`` text and sizes.
        field: Where the turns stand, for messages.
        targets: ``assistant``: what the model says; ``last``: only its last turn; ``all``: every turn's
            text. A turn that has a weight of its own follows that.
        chat_template: Whether each turn keeps the model's markers instead: context, but for the one that
            ends a trained turn.
        files_first: Where no turn has a slot, all files go before the first turn that is not the system's.

    Example:
        >>> turns = [Turn("query", "user", ["What?"]), Turn("response", "assistant", ["A cat."])]
        >>> conversation(turns, {"image": "a.png"}, "query", "assistant", chat_template=False).to_markup()
        '<image>What?\\n<trainable_text>A cat.</trainable_text>'
    """
    refuse_unread(row)
    refuse_preferences(row)
    turns = [*turns]
    asks = (number for number, turn in enumerate(turns) if turn.role not in ("system", "developer"))
    pieces = [turn.pieces for turn in turns]
    placed = place_media(pieces, row, field, missing_first=next(asks, 0) if files_first else None)
    turns = [replace(turn, pieces=found) for turn, found in zip(turns, placed, strict=True)]
    if system := optional_text(row, "system"):
        turns.insert(0, Turn("system", "system", (system,)))
    spoken = [number for number, turn in enumerate(turns) if ROLES[turn.role]]
    chosen = {"assistant": spoken, "last": spoken[-1:], "all": range(len(turns))}[targets]
    last = max((number for number, turn in enumerate(turns) if turn.pieces), default=0)
    segments: list[Segment] = []
    empty_spans = 0
    for number, turn in enumerate(turns):
        weight = turn.weight if turn.weight is not None else float(number in chosen)
        empty_spans += weight > 0 and not turn.pieces
        if not turn.pieces:
            continue
        joint = () if chat_template or number == last else ("\n",)
        try:
            said = [
                Text(piece, weight > 0, weight or 1.0) if isinstance(piece, str) else piece
                for piece in (*turn.pieces, *joint)
                if not isinstance(piece, Slot)  # each has its file by now
            ]
        except DocumentError as error:
            raise error.at(None, turn.place) from None
        segments += _in_chat(turn, said, weight) if chat_template else said
    return _with_template_sizes(Document(tuple(segments), empty_spans=empty_spans), row)


def _in_chat(turn: Turn, said: Sequence[Segment], weight: float) -> list[Segment]:
    if turn.role not in _IN_CHAT:
        raise DocumentError(
            f"chat_template has no form for the role {turn.role!r}. Roles: {', '.join(_IN_CHAT)}.",
            field=turn.place,
        )
    end = TurnEdge("end", weight > 0, weight or 1.0)
    return [TurnEdge("start"), Text(_IN_CHAT[turn.role] + "\n"), *said, end, Text("\n")]


def entries(row: Row, field: str, of: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Each turn as the row has it, with its place.

    Example:
        >>> [*entries({"messages": [{"role": "user"}]}, "messages", "turns")]
        [('messages[0]', {'role': 'user'})]
    """
    for number, entry in enumerate(required_list(row, field, of)):
        place = f"{field}[{number}]"
        if not isinstance(entry, Mapping):
            raise DocumentError(f"expected a turn in {{}}, found {type(entry).__name__}.", field=place)
        yield place, entry


def turn_role(entry: Mapping[str, object], key: str, place: str) -> str:
    """The role of a turn, by any name that data sets give it.

    Example:
        >>> turn_role({"from": "gpt"}, "from", "conversations[1]")
        'gpt'
    """
    role = entry.get(key)
    if isinstance(role, str) and role in ROLES:
        return role
    found = repr(role)[:60] if key in entry else f"no {key!r} among {field_names(entry)}"
    raise DocumentError(f"expected one of {', '.join(ROLES)}; found {found}.", field=f"{place}.{key}")


def turn_weight(entry: Mapping[str, object], place: str) -> float | None:
    """What a turn says about its loss: ``loss``, ``loss_scale`` (ms-swift), ``weight`` (OpenAI, Mistral),
    ``loss_weight`` (LLaMA-Factory) or ``train`` (axolotl).

    Returns:
        The weight, 0 for context, None where it says nothing.

    Example:
        >>> turn_weight({"loss": False}, "messages[0]"), turn_weight({"loss_scale": 0.5}, "messages[0]")
        (0.0, 0.5)
    """
    weights = {}
    for key in TURN_WEIGHTS:
        value = entry.get(key)
        if value is None:
            continue
        # JSON has booleans, tables often 0 and 1.
        is_switch = key in _SWITCHES
        if (
            not isinstance(value, bool | int | float)
            or not 0 <= value <= MAX_WEIGHT
            or (is_switch and value not in (0, 1))
        ):
            wanted = "true or false" if is_switch else f"a number from 0 to {MAX_WEIGHT:g}"
            raise DocumentError(f"expected {wanted}, found {value!r:.60}.", field=f"{place}.{key}")
        weights[key] = float(value)
    if len({bool(weight) for weight in weights.values()}) > 1:
        found = " and ".join(f"{key} {entry[key]}" for key in weights)
        raise DocumentError(f"{found} contradict each other. Keep one.", field=place)
    # `loss: true` beside a scale only says that there is one.
    scales = [weight for key, weight in weights.items() if key not in _SWITCHES]
    return next(iter(scales or weights.values()), None)


def spoken(text: str, entry: Mapping[str, object], place: str) -> tuple[list[Piece], float | None]:
    """The pieces of a turn that is a string, and its weight; axolotl's ``train_detail`` trains parts of it.

    As there, characters that no entry trains are context, ``train: false`` of the turn wins, and what comes
    after the text is trained if its end is.

    Example:
        >>> detail = [{"begin_offset": 0, "end_offset": 1, "train": True}]
        >>> spoken("So it is.", {"train_detail": detail}, "messages[1]")[0][0]
        Text(text='So', trainable=True, weight=1.0)
    """
    weight = turn_weight(entry, place)
    details = entry.get("train_detail")
    if details is None or weight == 0:
        return split_markers(text), weight
    trained = _trained_characters(details, len(text), f"{place}.train_detail")
    pieces: list[Piece] = []
    # Markers are found in the whole text: an edge inside one, or behind its backslash, makes it no other.
    for cut in cut_at_markers(text):
        if isinstance(cut, Slot):
            pieces.append(cut)
            continue
        start = cut.start
        for is_trained, run in groupby(trained[cut]):
            stop = start + sum(1 for _ in run)
            pieces.append(Text(text[start:stop], is_trained, (is_trained and weight) or 1.0))
            start = stop
    return pieces, (weight or 1.0) if trained and trained[-1] else 0.0


def _trained_characters(details: object, length: int, place: str) -> list[bool]:
    """Whether each character is trained; ``end_offset`` is the last one's."""
    trained = [False] * length
    for number, detail in enumerate(details if isinstance(details, list | tuple) else (details,)):
        found = detail if isinstance(detail, Mapping) else {}
        begin, end, trains = (found.get(key) for key in ("begin_offset", "end_offset", "train"))
        if not (isinstance(begin, int) and isinstance(end, int) and 0 <= begin <= end) or trains not in (
            0,
            1,
        ):
            raise DocumentError(
                'expected {"begin_offset", "end_offset", "train"}: its first and last character, from 0, and '
                f"true or false; found {detail!r:.80}.",
                field=f"{place}[{number}]",
            )
        if trains:
            places = range(length)[begin : end + 1]
            trained[places.start : places.stop] = [True] * len(places)
    return trained


def refuse_preferences(row: Mapping[str, object]) -> None:
    """An error for a conversation that is a bad example (KTO), or has a better and a worse answer (DPO).

    Example:
        >>> refuse_preferences({"label": "physics", "kto_tag": True})
    """
    for name in PREFERENCES:
        value = row.get(name)
        if value is False and name in ("label", "kto_tag"):
            reason = "false marks a bad answer (KTO), which is no text to learn from."
        elif name not in ("label", "kto_tag") and is_given(value):
            reason = "the row is a pair of a better and a worse answer (DPO), no text to learn from."
        else:
            continue
        raise DocumentError(
            f"{reason} Remove the row, or set ignore_fields: [{name}] for the source if the field means "
            "something else.",
            field=name,
        )


def _with_template_sizes(document: Document, row: Row) -> Document:
    """ms-swift's ``min_pixels`` and ``max_pixels``, for media that have none of their own."""
    given = row.get(TEMPLATE)
    if not is_given(given):
        return document
    if not isinstance(given, Mapping):
        raise DocumentError(f"expected a {{}}, found {type(given).__name__}.", field=TEMPLATE)
    sizes = {key: given.get(key) for key in TEMPLATE_SIZES}
    medium_at(Image, "any", TEMPLATE, sizes)  # also where the row has no medium
    segments = tuple(
        medium_at(type(one), one, TEMPLATE, sizes) if isinstance(one, Image | Video) else one
        for one in document.segments
    )
    return replace(document, segments=segments)


# Where a part of each type holds what it is about: the first key that is set.
_MEDIA_KEYS = {
    "image": ("image", "path", "url", "bytes"),
    "image_url": ("image_url",),
    "video": ("video", "path", "url", "bytes"),
    "video_url": ("video_url",),
}
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
            # Arrow fills a struct with the keys that other turns have.
            if value and (is_given(value) or not isinstance(value, Mapping)):
                raise DocumentError(
                    "this part of a turn is not read. Write it into 'content' as the model should see it.",
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
            field=f"{place}.train_detail",
        )


def _parts(content: object, place: str) -> list[Piece]:
    if isinstance(content, Mapping | bytes) or not isinstance(content, Sequence):
        raise DocumentError(
            f"expected a string or a list of parts, found {type(content).__name__}.", field=place
        )
    pieces = (_part(part, f"{place}[{number}]") for number, part in enumerate(content))
    return [piece for piece in pieces if piece != ""]


def _part(part: object, place: str) -> Piece:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise DocumentError(f"expected a part in {{}}, found {type(part).__name__}.", field=place)
    type_ = part.get("type")
    if type_ == "text":
        return text_at(part.get("text"), f"{place}.text")
    if not isinstance(type_, str) or type_ not in _MEDIA_KEYS:
        raise DocumentError(
            f"expected one of text, {', '.join(_MEDIA_KEYS)}; found {type_!r:.60}.", field=f"{place}.type"
        )
    known = {"type", "text", "index", *_MEDIA_KEYS[type_], *SIZES[Video], *HINTS}
    unknown = [key for key, value in part.items() if key not in known and is_given(value)]
    if unknown:
        raise DocumentError(
            f"a part of type {type_!r} has no such key. Known: {', '.join(sorted(known))}.",
            field=f"{place}.{unknown[0]!s:.60}",
        )
    kind = Image if type_.startswith("image") else Video
    key = next((key for key in _MEDIA_KEYS[type_] if is_given(part.get(key))), None)
    if key is not None:
        reference = {"bytes": part[key]} if key == "bytes" else part[key]
        if type_.endswith("_url") and isinstance(reference, Mapping):
            reference = {("path" if name == "url" else name): value for name, value in reference.items()}
        return medium_at(kind, reference, f"{place}.{key}", part)
    if type_.endswith("_url"):
        raise DocumentError(f"expected a reference under {type_!r}, found none.", field=place)
    return Slot(kind, place, part.get("index"), part)


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
                f"expected a question and its answer as [question, answer], found {found}.", field=place
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
        raise DocumentError("'query' and 'instruction' are both given. Keep one.", field="instruction")
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
                raise DocumentError(error.reason, field=f"{place}.{role}") from None
            # What scales an answer says nothing of the question before it; what switches it off, does.
            speaks = role == "assistant" or weight == 0
            yield Turn(f"{place}.{role}", role, said, weight if speaks else None)
