"""Formats of conversations: messages, ShareGPT, Alpaca, query and response, Docmatix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from vlcpt.data.documents import Document, DocumentError, Image, Medium, Video
from vlcpt.data.formats.markers import Piece, Spoken, media_files, place_media, refuse_unread, split_markers
from vlcpt.data.formats.turns import (
    TURN_WEIGHTS,
    Targets,
    Turn,
    document_of_turns,
    filled_turns,
    refuse_preferences,
    spoken,
    system_turn,
    turn_entry,
    turn_role,
    turn_weight,
    with_template_sizes,
)
from vlcpt.data.media.references import HINTS, image_from, video_from, with_keys
from vlcpt.data.rows.fields import (
    Row,
    is_given,
    list_field,
    optional_text,
    required_field,
    required_list,
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
    refuse_unread(row)
    refuse_preferences(row)
    turns: list[Turn] = []
    pieces: list[list[Piece]] = []
    for number, one in enumerate(required_list(row, "messages", "turns")):
        place = f"messages[{number}]"
        entry = turn_entry(one, place)
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
        said, weight = _said(entry, place)
        turns.append(Turn(place, role, (), weight))
        pieces.append(said)
    row = _ordered(row, row["messages"])  # type: ignore[arg-type]
    placed = place_media(pieces, row, "messages")
    filled = [
        replace(turn, pieces=tuple(_sized(one, found, turn.place)))
        for turn, one, found in zip(turns, row["messages"], placed, strict=True)  # type: ignore[call-overload]
    ]
    document = document_of_turns([*system_turn(row), *filled], targets, chat_template=chat_template)
    return with_template_sizes(document, row)


def _sized(turn: Mapping[str, object], pieces: Sequence[Spoken], place: str) -> list[Spoken]:
    """The pieces of a turn, with the sizes of parts that took a file of the row."""
    content = turn.get("content")
    if isinstance(content, str):
        return list(pieces)
    assert isinstance(content, Sequence)
    parts: list[tuple[Mapping[str, object], str]] = [
        (part, f"{place}.content[{number}]")
        for number, part in enumerate(content)
        if isinstance(part, Mapping) and part.get("type") in _MEDIA_KEYS
    ]
    of_media = iter(parts)  # each of them is a medium by now
    found: list[Spoken] = []
    for piece in pieces:
        if isinstance(piece, Image | Video):
            part, part_place = next(of_media)
            try:
                piece = _with_sizes(piece, part)
            except DocumentError as error:
                raise error.at(None, part_place) from None
        found.append(piece)
    return found


def _with_sizes(medium: Medium, part: Mapping[str, object]) -> Medium:
    used = _SIZES[:2] if isinstance(medium, Image) else _SIZES
    sizes = {name: part[name] for name in used if part.get(name) is not None}
    if not sizes:
        return medium
    wanted = with_keys(medium, sizes)
    return image_from(wanted) if isinstance(medium, Image) else video_from(wanted)


def _slots(messages: Sequence[object], kind: str) -> Iterator[tuple[object, str]]:
    """What takes a file of the row, in order: a part's ``index`` and its place, or of a marker nothing."""
    marker = Image if kind == "image" else Video
    for number, entry in enumerate(messages):
        content = entry.get("content") if isinstance(entry, Mapping) else None
        if isinstance(content, str):
            yield from ((None, "") for piece in split_markers(content) if piece is marker)
        for place, part in enumerate(content if isinstance(content, list | tuple) else ()):
            if not isinstance(part, Mapping) or part.get("type") != kind:
                continue
            if not any(is_given(part.get(key)) for key in _MEDIA_KEYS[kind]):
                yield part.get("index"), f"messages[{number}].content[{place}]"


def _ordered(row: Row, messages: Sequence[object]) -> Row:
    """The row with its files in the order in which parts take them, where they say which by ``index``."""
    for kind, field in (("image", "images"), ("video", "videos")):
        slots = [*_slots(messages, kind)]
        if all(index is None for index, _ in slots):
            continue
        images, videos = media_files(row)
        files: Sequence[Medium] = images if kind == "image" else videos
        if files:  # or an error about markers without files says more
            row = {**row, field: _by_index(slots, files, field), kind: None}
    return row


def _by_index(slots: Sequence[tuple[object, str]], files: Sequence[Medium], field: str) -> list[Medium]:
    """The files in the order in which slots take them; markers in strings take what no index names."""
    named: set[int] = set()
    for index, place in slots:
        is_known = isinstance(index, int) and not isinstance(index, bool) and 0 <= index < len(files)
        if place and (not is_known or index in named):
            raise DocumentError(
                f"expected the place of {'an image' if field == 'images' else 'a video'} in {field!r}, 0 to "
                f"{len(files) - 1}, each once; found {index!r:.60}.",
                kind="row",
                field=f"{place}.index",
            )
        named |= {index} if isinstance(index, int) else set()
    others = [file for number, file in enumerate(files) if number not in named]
    chosen = [
        files[index] if isinstance(index, int) else others.pop(0)
        for index, _ in slots
        if isinstance(index, int) or others
    ]
    return [*chosen, *others]


def _said(entry: Mapping[str, object], place: str) -> tuple[list[Piece], float | None]:
    """The pieces of a turn and its weight."""
    content = entry.get("content")
    if isinstance(content, str):
        return spoken(content, entry, place)
    if is_given(entry.get("train_detail")):
        raise DocumentError(
            "it counts the characters of a content that is a string, and this one is none. Write the row as "
            "format segments, where each text says whether it is trained.",
            kind="row",
            field=f"{place}.train_detail",
        )
    return _content(content, f"{place}.content"), turn_weight(entry, place)


def _content(content: object, place: str) -> list[Piece]:
    if isinstance(content, Mapping) or not isinstance(content, Sequence) or isinstance(content, bytes):
        raise DocumentError(
            f"expected a string or a list of parts, found {type(content).__name__}.", kind="row", field=place
        )
    pieces: list[Piece] = []
    for number, part in enumerate(content):
        piece = _part(part, f"{place}[{number}]")
        if piece != "":
            pieces.append(piece)
    return pieces


def _part(part: object, place: str) -> Piece:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise DocumentError(f"expected a part in {{}}, found {type(part).__name__}.", kind="row", field=place)
    kind = part.get("type")
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise DocumentError(
                f"expected a string, found {type(text).__name__}.", kind="row", field=f"{place}.text"
            )
        return text
    if not isinstance(kind, str) or kind not in _MEDIA_KEYS:
        raise DocumentError(
            f"expected one of text, {', '.join(_MEDIA_KEYS)}; found {kind!r:.60}.",
            kind="row",
            field=f"{place}.type",
        )
    known = {"type", "text", "index", *_MEDIA_KEYS[kind], *_SIZES, *HINTS}
    unknown = [key for key, value in part.items() if key not in known and is_given(value)]
    if unknown:
        raise DocumentError(
            f"a part of type {kind!r} has no such key. Known: {', '.join(sorted(known))}.",
            kind="row",
            field=f"{place}.{unknown[0]!s:.60}",
        )
    is_image = kind.startswith("image")
    key = next((key for key in _MEDIA_KEYS[kind] if is_given(part.get(key))), None)
    used = _SIZES[:2] if is_image else _SIZES  # Qwen's tools write fps into parts of images, too
    sizes = {name: part[name] for name in used if part.get(name) is not None}
    if key is None:
        if kind.endswith("_url"):
            raise DocumentError(
                f"expected a reference under {_MEDIA_KEYS[kind][0]!r}, found none.", kind="row", field=place
            )
        return Image if is_image else Video
    reference = part[key]
    if kind.endswith("_url") and isinstance(reference, Mapping):
        reference = {("path" if name == "url" else name): value for name, value in reference.items()}
    if key == "bytes":
        reference = {"bytes": reference}
    reference = with_keys(reference, sizes)
    try:
        return image_from(reference) if is_image else video_from(reference)
    except DocumentError as error:
        raise error.at(None, f"{place}.{key}") from None


def read_sharegpt(row: Row, *, targets: Targets = "assistant", chat_template: bool = False) -> Document:
    """A document of all turns. ``<image>`` and ``<video>`` are markers; all else is plain text.

    Where no turn has a marker, all files go before the first turn that is not the system's.

    Example:
        >>> turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}]
        >>> read_sharegpt({"conversations": turns, "image": "cat.png"}).to_markup()
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


def read_alpaca(row: Row, *, targets: Targets = "assistant", chat_template: bool = False) -> Document:
    """A document of the history, the instruction with its input, and the output.

    The answers of the history are trained like the output, as LLaMA-Factory does by default
    (``mask_history: false``).

    Example:
        >>> read_alpaca({"instruction": "Add.", "input": "1 + 1", "output": "2"}).to_markup()
        'Add.\\n1 + 1\\n<trainable_text>2</trainable_text>'
    """
    refuse_unread(row)
    refuse_preferences(row)
    if "input" not in row:
        required_field(row, "instruction")
    asked = [text for name in ("instruction", "input") if (text := optional_text(row, name))]
    turns = [
        *history_turns(row),
        Turn("instruction", "user", tuple(["\n".join(asked)] if asked else [])),
        answer_turn(row, "output"),
    ]
    return filled_turns(turns, row, "instruction", targets, chat_template=chat_template)


def answer_turn(row: Row, name: str) -> Turn:
    """The answer, which has to be there.

    Example:
        >>> answer_turn({"output": "2"}, "output").role
        'assistant'
    """
    text = text_field(row, name)
    return Turn(name, "assistant", (text,) if text else ())


def history_turns(row: Row) -> list[Turn]:
    """Earlier questions and answers: a list of pairs; in a pair, null is an empty turn.

    Example:
        >>> [turn.role for turn in history_turns({"history": [["Why?", "So."]]})]
        ['user', 'assistant']
    """
    turns = []
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
            if text is not None and not isinstance(text, str):
                raise DocumentError(
                    f"expected a string, found {type(text).__name__}.", kind="row", field=f"{place}[{side}]"
                )
            turns.append(Turn(f"{place}[{side}]", role, (text,) if text else ()))
    return turns


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


_READ = ("user", "assistant", *TURN_WEIGHTS, "train_detail")


def read_docmatix(row: Row, *, targets: Targets = "assistant", chat_template: bool = False) -> Document:
    """A document of all images, and after them every question and its answer.

    Example:
        >>> texts = [{"user": "What?", "assistant": "A cat.", "source": "web"}]
        >>> read_docmatix({"images": ["cat.png"], "texts": texts}).to_markup()
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
