"""Turns of a conversation become one document: all of them, in order, as plain text or as a chat."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from vlcpt.data.documents import Document, DocumentError, Image, Segment, Text, TurnEdge, Video
from vlcpt.data.formats.markers import Piece, Slot, place_media, refuse_unread, split_markers
from vlcpt.data.media.references import medium_at, with_keys
from vlcpt.data.rows.fields import Row, field_names, is_given, optional_text, required_list

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
# Fields that say of a whole row that its text is not one to learn from.
PREFERENCES = ("label", "kto_tag", "chosen", "rejected", "rejected_response", "rejected_messages")

# ms-swift's arguments of its template, which a row may have.
_TEMPLATE = "chat_template_kwargs"

# What the model's chat template calls a role. Of tools it writes more than the turn says.
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
            kind="row",
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
            raise DocumentError(
                f"expected a turn in {{}}, found {type(entry).__name__}.", kind="row", field=place
            )
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
    raise DocumentError(
        f"expected one of {', '.join(ROLES)}; found {found}.", kind="row", field=f"{place}.{key}"
    )


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
        if not isinstance(value, bool | int | float) or (key in _SWITCHES and value not in (0, 1)):
            wanted = "true or false" if key in _SWITCHES else "a number from 0 to 100"
            raise DocumentError(
                f"expected {wanted}, found {value!r:.60}.", kind="row", field=f"{place}.{key}"
            )
        if not 0 <= value <= 100:
            raise DocumentError(
                f"expected a number from 0 to 100, found {value!r:.60}.", kind="row", field=f"{place}.{key}"
            )
        weights[key] = float(value)
    if len({bool(weight) for weight in weights.values()}) > 1:
        found = " and ".join(f"{key} {entry[key]}" for key in weights)
        raise DocumentError(f"{found} contradict each other. Keep one.", kind="row", field=place)
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
    start = 0
    for is_trained, run in groupby(trained):
        stop = start + sum(1 for _ in run)
        for piece in split_markers(text[start:stop]):
            if isinstance(piece, str):
                piece = Text(piece, is_trained, (is_trained and weight) or 1.0)
            pieces.append(piece)
        start = stop
    return pieces, (weight or 1.0) if trained and trained[-1] else 0.0


def _trained_characters(details: object, length: int, place: str) -> list[bool]:
    """Of each character whether it is trained; ``end_offset`` is the last one's."""
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
                kind="row",
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
            kind="row",
            field=name,
        )


def _with_template_sizes(document: Document, row: Row) -> Document:
    """ms-swift's ``min_pixels`` and ``max_pixels``, for media that have none of their own."""
    given = row.get(_TEMPLATE)
    if not is_given(given):
        return document
    if not isinstance(given, Mapping):
        raise DocumentError(f"expected a {{}}, found {type(given).__name__}.", kind="row", field=_TEMPLATE)
    sizes = {key: given[key] for key in ("min_pixels", "max_pixels") if given.get(key) is not None}
    medium_at(Image, {"path": "any", **sizes}, _TEMPLATE)  # also where the row has no medium
    segments = tuple(
        medium_at(type(one), with_keys(one, sizes), _TEMPLATE) if isinstance(one, Image | Video) else one
        for one in document.segments
    )
    others = tuple(
        f"{_TEMPLATE}.{key}"[:60] for key, value in given.items() if key not in sizes and is_given(value)
    )
    return replace(document, segments=segments, not_read=(*document.not_read, *others))
