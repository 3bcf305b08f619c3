"""Turns whose text has markers become one document; all formats of conversations end here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlcpt.data.documents import Document, DocumentError, Image, Medium, Segment, Text, Video
from vlcpt.data.readers.fields import Row
from vlcpt.data.readers.markers import place_media, split_markers
from vlcpt.data.readers.turns import Targets, Turn, document_of_turns, system_turn
from vlcpt.data.references import size_of

_SIZES = {Image: ("min_pixels", "max_pixels"), Video: ("min_pixels", "max_pixels", "fps", "max_frames")}


def document_of_texts(
    row: Row,
    said: Sequence[tuple[Turn, str]],
    field: str,
    targets: Targets,
    *,
    chat_template: bool,
) -> Document:
    """A document of turns and their texts, in which ``<image>`` and ``<video>`` are markers.

    Where no turn has a marker, all files go before the first turn that is not the system's.

    Example:
        >>> said = [(Turn("a", "user", ()), "What?"), (Turn("b", "assistant", ()), "A cat.")]
        >>> document_of_texts({"image": "cat.png"}, said, "a", "assistant", chat_template=False).to_markup()
        '<image>What?\\n<trainable_text>A cat.</trainable_text>'
    """
    asks = [number for number, (turn, _) in enumerate(said) if turn.role not in ("system", "developer")]
    placed = place_media(
        [split_markers(text) for _, text in said], row, field, missing_first=asks[0] if asks else 0
    )
    turns = [replace(turn, pieces=tuple(pieces)) for (turn, _), pieces in zip(said, placed, strict=True)]
    turns = [*system_turn(row), *turns]
    return with_row_sizes(document_of_turns(turns, targets, chat_template=chat_template), row)


def with_row_sizes(document: Document, row: Row) -> Document:
    """The document with the sizes that ``chat_template_kwargs`` (ms-swift) gives all media of the row.

    What a medium says itself wins. Other settings are named as not read.

    Example:
        >>> row = {"chat_template_kwargs": {"max_pixels": 50176, "enable_thinking": False}}
        >>> document = with_row_sizes(Document((Image("a.png"),)), row)
        >>> document.segments[0].max_pixels, document.not_read
        (50176, ('chat_template_kwargs.enable_thinking',))
    """
    field = "chat_template_kwargs"
    settings = row.get(field)
    if settings is None:
        return document
    if not isinstance(settings, Mapping):
        raise DocumentError(
            f"expected settings in {{}}, found {type(settings).__name__}.", kind="row", field=field
        )
    given = {str(key): value for key, value in settings.items() if value is not None}
    sizes: dict[str, int | float] = {}
    for key in _SIZES[Video]:
        if key in given:
            try:
                sizes[key] = size_of(key, given.pop(key))
            except DocumentError as error:
                raise error.at(None, field) from None
    segments = [
        segment if not sizes or isinstance(segment, Text) else _sized(segment, sizes, field)
        for segment in document.segments
    ]
    not_read = tuple(f"{field}.{key}" for key in given)
    return replace(document, segments=tuple(segments), not_read=(*document.not_read, *not_read))


def _sized(segment: Segment, sizes: Mapping[str, int | float], field: str) -> Segment:
    if not isinstance(segment, Medium):
        return segment
    new = {key: sizes[key] for key in _SIZES[type(segment)] if key in sizes and getattr(segment, key) is None}
    sized: Image | Video = replace(segment, **new)  # type: ignore[arg-type]
    if sized.min_pixels is not None and sized.max_pixels is not None and sized.min_pixels > sized.max_pixels:
        raise DocumentError(
            f"'min_pixels' {sized.min_pixels} is above 'max_pixels' {sized.max_pixels}. Swap or remove one.",
            kind="row",
            field=field,
        )
    return sized
