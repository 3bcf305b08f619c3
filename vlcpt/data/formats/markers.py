"""``<image>`` and ``<video>`` in the text of rows that users already have, and the files they stand for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from vlcpt.data.documents import DocumentError, Image, Medium, Text, Video, trailing_backslashes
from vlcpt.data.media.references import image_from, is_picture, video_from
from vlcpt.data.rows.fields import Row, is_given, list_field

Marker = type[Image] | type[Video]
"""The class stands for "the next file of this kind"."""

Spoken = str | Text | Medium
"""A part of a turn: text without markers, which may say itself whether it is trained, or a medium."""

Piece = Spoken | Marker
"""The same, or a marker that still needs its file."""

MEDIA_FIELDS = ("images", "image", "videos", "video")

M = TypeVar("M", Image, Video)

_MARKERS: dict[str, Marker] = {"<image>": Image, "<video>": Video}
_MARKER = re.compile("<image>|<video>")


def split_markers(text: str) -> list[Piece]:
    r"""Text cut at its markers. Backslashes before one are as in markup: an odd number makes it text.

    Example:
        >>> split_markers("a<image>b")
        ['a', <class 'vlcpt.data.documents.Image'>, 'b']
        >>> split_markers(r"write \<image> for it")
        ['write <image> for it']
    """
    pieces: list[Piece] = []
    said, done = "", 0
    for match in _MARKER.finditer(text):
        slashes = trailing_backslashes(text, done, match.start())
        said += text[done : match.start() - slashes] + "\\" * (slashes // 2)
        done = match.end()
        if slashes % 2:
            said += match.group()
            continue
        pieces += [said, _MARKERS[match.group()]] if said else [_MARKERS[match.group()]]
        said = ""
    said += text[done:]
    return [*pieces, said] if said else pieces


def media_files(row: Row) -> tuple[list[Image], list[Video]]:
    """The images and videos that a row lists, under the plural or the singular name, as list or alone.

    Example:
        >>> media_files({"image": "a.png"})[0]
        [Image(path='a.png', min_pixels=None, max_pixels=None)]
    """
    images = [_read(image_from, *named) for named in _references(row, "images", "image")]
    videos = [_read(video_from, *named) for named in _references(row, "videos", "video")]
    return images, videos


def place_media(
    turns: Sequence[Sequence[Piece]], row: Row, field: str, *, missing_first: int | None = None
) -> list[list[Spoken]]:
    """Every marker replaced by its file, in reading order.

    Args:
        turns: The pieces of each turn.
        row: Lists the files.
        field: Where the turns stand, for messages.
        missing_first: The turn that all files are put before, images first, where no turn has a marker;
            None: such a row is an error.

    Raises:
        DocumentError: If markers and files do not agree in number.

    Example:
        >>> place_media([["a"], ["b"]], {"image": "x.png"}, "conversations", missing_first=0)[0]
        [Image(path='x.png', min_pixels=None, max_pixels=None), 'a']
    """
    images, videos = media_files(row)
    pieces = [piece for turn in turns for piece in turn]
    turns = [list(turn) for turn in turns]
    if missing_first is not None and not any(isinstance(piece, type) for piece in pieces):
        turns[missing_first] = [*images, *videos, *turns[missing_first]]
        return turns  # type: ignore[return-value]
    for marker, kind, files in (("<image>", Image, images), ("<video>", Video, videos)):
        markers = pieces.count(kind)
        if markers != len(files):
            raise DocumentError(
                f"there are {markers} {marker} marker{'s' * (markers != 1)} but the row lists {len(files)} "
                f"{kind.__name__.lower()}{'s' * (len(files) != 1)}. Give each marker one file, in order; "
                rf"write \{marker} for the characters.",
                kind="markers",
                field=field,
            )
    of_kind = {Image: iter(images), Video: iter(videos)}
    return [[next(of_kind[piece]) if isinstance(piece, type) else piece for piece in turn] for turn in turns]  # type: ignore[misc]


def refuse_unread(row: Row) -> None:
    """An error where a row has something that would be lost without a word.

    Example:
        >>> refuse_unread({"audios": []})
    """
    for name, reason in (
        ("audios", "audio is not read. Remove the row, or the field and its <audio> markers."),
        ("audio", "audio is not read. Remove the row, or the field and its <audio> markers."),
        ("objects", "<ref-object> and <bbox> are not filled in. Write names and boxes into the text."),
    ):
        if row.get(name) and is_given(row[name]):
            raise DocumentError(reason, kind="row", field=name)


def _references(row: Row, plural: str, singular: str) -> list[tuple[object, str]]:
    """Each reference with its place in the row."""
    given = [name for name in (plural, singular) if is_given(row.get(name))]
    if len(given) == 2:
        raise DocumentError(
            f"{plural!r} and {singular!r} are both given. Keep one.", kind="row", field=singular
        )
    if not given:
        return []
    (name,) = given
    value = row[name]
    if isinstance(value, str | bytes | bytearray | Mapping):
        return [(value, name)] if value else []
    if isinstance(value, Image | Video) or is_picture(value):
        return [(value, name)]
    return [(one, f"{name}[{number}]") for number, one in enumerate(list_field(row, name))]


def _read(read: Callable[[object], M], reference: object, place: str) -> M:
    try:
        return read(reference)
    except DocumentError as error:
        raise error.at(None, place) from None
