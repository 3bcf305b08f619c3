"""Turns of a conversation become one document: all of them, in order, as plain text or as a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from vlcpt.data.documents import Document, DocumentError, Image, Medium, Segment, Text, TurnEdge, Video
from vlcpt.data.formats.markers import Piece, Spoken, place_media, split_markers
from vlcpt.data.media.references import image_from, video_from
from vlcpt.data.rows.fields import Row, field_names, is_given, optional_text

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
        pieces: Text and media in reading order.
        weight: What the turn itself says: the weight of its loss, 0 for context; None: nothing.
    """

    place: str
    role: str
    pieces: tuple[Spoken, ...]
    weight: float | None = None


def document_of_turns(
    turns: Sequence[Turn], targets: Targets = "assistant", *, chat_template: bool = False
) -> Document:
    """One document of all turns, joined by newlines that belong to the turn before.

    Args:
        turns: In order; an empty one adds nothing, and is counted if it would have been trained.
        targets: ``assistant``: what the model says; ``last``: only its last turn; ``all``: every turn's
            text. A turn that has a weight of its own follows that.
        chat_template: Whether each turn keeps the model's markers instead: context, but for the one that
            ends a trained turn.

    Example:
        >>> turns = [Turn("messages[0]", "user", ("Why?",)), Turn("messages[1]", "assistant", ("So.",))]
        >>> document_of_turns(turns).to_markup()
        'Why?\\n<trainable_text>So.</trainable_text>'
    """
    spoken = [number for number, turn in enumerate(turns) if ROLES[turn.role]]
    chosen = {"assistant": spoken, "last": spoken[-1:], "all": range(len(turns))}[targets]
    filled = [number for number, turn in enumerate(turns) if turn.pieces]
    segments: list[Segment] = []
    empty_spans = 0
    for number, turn in enumerate(turns):
        weight = turn.weight if turn.weight is not None else float(number in chosen)
        empty_spans += weight > 0 and not turn.pieces
        if not turn.pieces:
            continue
        joint = () if chat_template or number == filled[-1] else ("\n",)
        try:
            said = [
                Text(piece, weight > 0, weight or 1.0) if isinstance(piece, str) else piece
                for piece in (*turn.pieces, *joint)
            ]
        except DocumentError as error:
            raise error.at(None, turn.place) from None
        segments += _in_chat(turn, said, weight) if chat_template else said
    return Document(tuple(segments), empty_spans=empty_spans)


def _in_chat(turn: Turn, said: Sequence[Segment], weight: float) -> list[Segment]:
    if turn.role not in _IN_CHAT:
        raise DocumentError(
            f"chat_template has no form for the role {turn.role!r}. Roles: {', '.join(_IN_CHAT)}.",
            kind="row",
            field=turn.place,
        )
    end = TurnEdge("end", weight > 0, weight or 1.0)
    return [TurnEdge("start"), Text(_IN_CHAT[turn.role] + "\n"), *said, end, Text("\n")]


def turn_entry(entry: object, place: str) -> Mapping[str, object]:
    """A turn as the row has it, or an error that says what stands there instead.

    Example:
        >>> turn_entry({"role": "user"}, "messages[0]")
        {'role': 'user'}
    """
    if isinstance(entry, Mapping):
        return entry
    raise DocumentError(f"expected a turn in {{}}, found {type(entry).__name__}.", kind="row", field=place)


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
            is_text = isinstance(piece, str)
            pieces.append(Text(piece, is_trained, (is_trained and weight) or 1.0) if is_text else piece)  # type: ignore[arg-type]
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


def system_turn(row: Mapping[str, object]) -> list[Turn]:
    """The row's own ``system`` text as a turn before all others, where it has one.

    Example:
        >>> system_turn({"system": "Be brief."})[0].pieces
        ('Be brief.',)
    """
    system = optional_text(row, "system")
    return [Turn("system", "system", (system,))] if system else []


def filled_turns(
    turns: Sequence[Turn], row: Row, field: str, targets: Targets, *, chat_template: bool
) -> Document:
    """The document of turns whose text may have markers, with the row's system text and files.

    Args:
        turns: As the row has them; their texts are still whole.
        row: Lists the files.
        field: Where the turns stand, for messages.
        targets: As in :func:`document_of_turns`.
        chat_template: As there.

    Example:
        >>> turns = [Turn("query", "user", ("What?",)), Turn("response", "assistant", ("A cat.",))]
        >>> filled_turns(turns, {"image": "cat.png"}, "query", "assistant", chat_template=False).to_markup()
        '<image>What?\\n<trainable_text>A cat.</trainable_text>'
    """
    pieces = [
        [part for piece in turn.pieces if isinstance(piece, str) for part in split_markers(piece)]
        for turn in turns
    ]
    asks = [number for number, turn in enumerate(turns) if turn.role not in ("system", "developer")]
    placed = place_media(pieces, row, field, missing_first=asks[0] if asks else 0)
    filled = [replace(turn, pieces=tuple(found)) for turn, found in zip(turns, placed, strict=True)]
    document = document_of_turns([*system_turn(row), *filled], targets, chat_template=chat_template)
    return with_template_sizes(document, row)


def with_template_sizes(document: Document, row: Row) -> Document:
    """The document with ms-swift's ``min_pixels`` and ``max_pixels`` for media that have none of their own.

    Raises:
        DocumentError: If ``chat_template_kwargs`` is no mapping, or one of the two is no number above 0.

    Example:
        >>> row = {"chat_template_kwargs": {"max_pixels": 50176, "enable_thinking": False}}
        >>> found = with_template_sizes(Document((Image("a.png"),)), row)
        >>> found.images[0].max_pixels, found.not_read
        (50176, ('chat_template_kwargs.enable_thinking',))
    """
    given = row.get(_TEMPLATE)
    if not is_given(given):
        return document
    if not isinstance(given, Mapping):
        raise DocumentError(f"expected a {{}}, found {type(given).__name__}.", kind="row", field=_TEMPLATE)
    sizes = {key: given[key] for key in ("min_pixels", "max_pixels") if given.get(key) is not None}
    try:
        checked = image_from({"path": "any", **sizes})
        segments = tuple(
            _sized(one, checked) if isinstance(one, Image | Video) else one for one in document.segments
        )
    except DocumentError as error:
        raise error.at(None, _TEMPLATE) from None
    others = tuple(
        f"{_TEMPLATE}.{key}"[:60] for key, value in given.items() if key not in sizes and is_given(value)
    )
    return replace(document, segments=segments, not_read=(*document.not_read, *others))


def _sized(medium: Medium, sizes: Image) -> Medium:
    """The medium with these limits where it has none; together they are checked like any other's."""
    low = sizes.min_pixels if medium.min_pixels is None else medium.min_pixels
    high = sizes.max_pixels if medium.max_pixels is None else medium.max_pixels
    read = image_from if isinstance(medium, Image) else video_from
    read({"path": "any", "min_pixels": low, "max_pixels": high})
    return replace(medium, min_pixels=low, max_pixels=high)
