"""``<image>`` and ``<video>`` in the text of rows that users already have, and the files they stand for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vlcpt.data.documents import (
    DocumentError,
    Image,
    Medium,
    MissingFileError,
    Text,
    Video,
    trailing_backslashes,
)
from vlcpt.data.media.references import is_picture, medium_at
from vlcpt.data.rows.fields import Row, is_given, list_field


@dataclass(frozen=True)
class Slot:
    """Where one of the row's files goes.

    Args:
        kind: What the file is.
        place: Where the slot stands in the row; empty: it is a marker in a text.
        index: Which file it takes, from 0; None: the next one.
        sizes: Has limits for the file, where it has none of its own.
    """

    kind: type[Image] | type[Video]
    place: str = ""
    index: object = None
    sizes: Mapping[str, object] = field(default_factory=dict)


Spoken = str | Text | Medium
"""A part of a turn: text without markers, which may say itself whether it is trained, or a medium."""

Piece = Spoken | Slot
"""The same, or a slot that still needs its file."""

# The fields of a row that list the files of each kind.
_FIELDS: dict[type[Image] | type[Video], tuple[str, str]] = {
    Image: ("images", "image"),
    Video: ("videos", "video"),
}
MEDIA_FIELDS = ("images", "image", "videos", "video")

_MARKERS = {"<image>": Slot(Image), "<video>": Slot(Video)}
_MARKER = re.compile("<image>|<video>")


def split_markers(text: str) -> list[Piece]:
    r"""Text cut at its markers. Backslashes before one are as in markup: an odd number makes it text.

    Example:
        >>> split_markers("a<image>b")[1].kind
        <class 'vlcpt.data.documents.Image'>
        >>> split_markers(r"write \<image> for it")
        ['write <image> for it']
    """
    pieces: list[Piece] = []
    said: list[str] = []
    for cut in cut_at_markers(text):
        if isinstance(cut, slice):
            said.append(text[cut])
            continue
        pieces += ["".join(said), cut] if any(said) else [cut]
        said = []
    return [*pieces, "".join(said)] if any(said) else pieces


def cut_at_markers(text: str) -> Iterator[slice | Slot]:
    r"""Where the characters stand that are kept, perhaps none, and a slot for each marker, in reading order.

    What is left out are the markers and the backslashes that only say what a marker is.

    Example:
        >>> text = r"a\<image>"
        >>> [text[kept] for kept in cut_at_markers(text)]
        ['a', '<image>']
    """
    done = 0
    for match in _MARKER.finditer(text):
        slashes = trailing_backslashes(text, done, match.start())
        yield slice(done, match.start() - slashes + slashes // 2)
        if slashes % 2:
            done = match.start()
        else:
            yield _MARKERS[match.group()]
            done = match.end()
    yield slice(done, len(text))


def place_media(
    turns: Sequence[Sequence[Piece]], row: Row, field: str, *, missing_first: int | None = None
) -> list[list[Spoken]]:
    """Every slot replaced by its file, in reading order.

    Args:
        turns: The pieces of each turn.
        row: Lists the files, under the plural or the singular name, as a list or alone.
        field: Where the turns stand, for messages.
        missing_first: The turn that all files are put before, images first, where no turn has a slot;
            None: such a row is an error.

    Raises:
        DocumentError: If slots and files do not agree in number, or an ``index`` names no file.

    Example:
        >>> place_media([["a"], ["b"]], {"image": "x.png"}, "conversations", missing_first=0)[0]
        [Image(path='x.png', min_pixels=None, max_pixels=None), 'a']
    """
    files: dict[type[Image] | type[Video], list[Medium]] = {
        kind: [medium_at(kind, *named) for named in _references(row, *names)]
        for kind, names in _FIELDS.items()
    }
    slots = [piece for turn in turns for piece in turn if isinstance(piece, Slot)]
    if missing_first is not None and not slots:
        filled: list[list[Spoken]] = [[*turn] for turn in turns]  # type: ignore[list-item]
        filled[missing_first][:0] = [*files[Image], *files[Video]]
        return filled
    of_kind = {
        kind: iter(_in_order([slot for slot in slots if slot.kind is kind], kind, listed, field))
        for kind, listed in files.items()
    }
    return [
        [
            medium_at(piece.kind, next(of_kind[piece.kind]), piece.place, piece.sizes)
            if isinstance(piece, Slot)
            else piece
            for piece in turn
        ]
        for turn in turns
    ]


def _in_order(
    slots: Sequence[Slot], kind: type[Image] | type[Video], files: list[Medium], field: str
) -> list[Medium]:
    """The files in the order in which slots take them; markers in a text take what no index names."""
    name = kind.__name__.lower()
    named: set[object] = set()
    if files and any(slot.index is not None for slot in slots):
        for slot in slots:
            index = slot.index
            is_known = isinstance(index, int) and not isinstance(index, bool) and 0 <= index < len(files)
            if slot.place and (not is_known or index in named):
                raise DocumentError(
                    f"expected the place of {'an' if kind is Image else 'a'} {name} in '{name}s', 0 to "
                    f"{len(files) - 1}, each once; found {index!r:.60}.",
                    field=f"{slot.place}.index",
                )
            named.add(index)
    if len(slots) != len(files):
        raise (DocumentError if files else MissingFileError)(
            f"there are {len(slots)} <{name}> marker{'s' * (len(slots) != 1)} but the row lists {len(files)} "
            f"{name}{'s' * (len(files) != 1)}. Give each marker one file, in order; "
            rf"write \<{name}> for the characters.",
            kind="markers",
            field=field,
        )
    others = iter([file for number, file in enumerate(files) if number not in named])
    return [files[slot.index] if isinstance(slot.index, int) else next(others) for slot in slots]


def refuse_unread(row: Row) -> None:
    """An error where a row has something that would be lost without a word.

    Example:
        >>> refuse_unread({"audios": []})
    """
    audio = "audio is not read. Remove the row, or the field and its <audio> markers."
    boxes = "<ref-object> and <bbox> are not filled in. Write names and boxes into the text."
    for name, reason in (("audios", audio), ("audio", audio), ("objects", boxes)):
        if row.get(name) and is_given(row[name]):
            raise DocumentError(reason, field=name)


def _references(row: Row, plural: str, singular: str) -> list[tuple[object, str]]:
    """Each reference with its place in the row."""
    given = [name for name in (plural, singular) if is_given(row.get(name))]
    if len(given) == 2:
        raise DocumentError(f"{plural!r} and {singular!r} are both given. Keep one.", field=singular)
    if not given:
        return []
    (name,) = given
    value = row[name]
    if isinstance(value, str | bytes | bytearray | Mapping):
        return [(value, name)] if value else []
    if isinstance(value, Image | Video) or is_picture(value):
        return [(value, name)]
    return [(one, f"{name}[{number}]") for number, one in enumerate(list_field(row, name))]
