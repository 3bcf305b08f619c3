"""A document and its parts: what every format makes and everything else works on."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Literal


@dataclass(frozen=True)
class TurnEdge:
    """Where a turn begins or ends, by the model's own marker.

    Readers make it, never a user's text; ``data/encode/encoder.py`` puts its token in by id.

    Args:
        kind: Which edge.
        trainable: Whether its token is a target: the end of a turn that is trained.
        weight: Scales the loss of a target.

    Example:
        >>> TurnEdge("start").trainable
        False
    """

    kind: Literal["start", "end"]
    trainable: bool = False
    weight: float = 1.0


def _misspelt(name: str) -> str:
    """A pattern for what begins like ``name`` but for case, gaps, and one letter that is other, more or
    less, or in its neighbour's place. Each step has few ways on, so a match takes bounded time."""
    gap, other = r"[\s_-]{0,4}", r"[^\s_<>\\-]"
    rest = [gap.join(name[start:]) for start in range(len(name) + 1)]
    pattern = ""  # of what follows once all letters are right: built from the end
    for at in reversed(range(len(name))):
        wrong = [other + gap + rest[at], rest[at + 1]]
        if at + 1 < len(name):
            wrong += [other + gap + rest[at + 1], name[at + 1] + gap + gap.join((name[at], *name[at + 2 :]))]
        else:
            wrong = [""]
        right = name[at] + (gap + pattern if pattern else "")
        pattern = f"(?:{'|'.join((right, *wrong))})"
    return rf"[\s_-]{{0,4}}(?:/[\s_-]{{0,4}})?(?i:{pattern})"


# Where a tag or a media marker may begin. A bare `<trainable_text` counts: whatever begins like
# the tag, or nearly so, has to be one, or be escaped. [0-9], not \d, which also takes other scripts'
# digits. No `<` but the first: what stands in one text is then the same beside any other tag. Most names
# in HTML are shorter than twelve characters, and are passed over by that.
TAG_START = re.compile(
    r"</?trainable_text|<image>|<video>|<(?:IMG|VID)[0-9]{1,9}>|<(?=[^<>]{12})(?P<misspelt>"
    + _misspelt("trainabletext")
    + ")"
)

MAX_WEIGHT = 100.0


@dataclass(frozen=True)
class Source:
    """Where a document came from, as messages name it.

    Args:
        path: The file, as the user wrote it.
        line: 1-based line, row or file number.
        id: The row's own id, where it has one.

    Example:
        >>> str(Source("train.jsonl", 17))
        'train.jsonl:17'
    """

    path: str
    line: int
    id: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


class DocumentError(ValueError):
    """A document that cannot be used: where, what was found, what to do.

    Args:
        reason: What was found and what to do about it.
        kind: One word for the ledger's table of reasons, e.g. ``"markup"``.
        source: The document's file and line, when known.
        field: The field of the row, e.g. ``"text"`` or ``"images[2]"``.
        offset: 0-based character offset inside the field.
        id: The document's own id, where it has no source.

    Example:
        >>> print(DocumentError("not closed", source=Source("a.jsonl", 3, "pump"), field="text", offset=8))
        a.jsonl:3: id pump: text, character 8: not closed
    """

    def __init__(
        self,
        reason: str,
        *,
        kind: str = "row",
        source: Source | None = None,
        field: str | None = None,
        offset: int | None = None,
        id: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.id = id
        self.kind = kind
        self.source = source
        self.field = field
        self.offset = offset

    @property
    def detail(self) -> str:
        """What was found, with the field, for where file and line stand beside it."""
        place = (self.field or "") + ("" if self.offset is None else f", character {self.offset}")
        return ": ".join(filter(None, (place, self.reason)))

    def __str__(self) -> str:
        called = self.source.id if self.source else self.id
        name = f"id {' '.join(called.split())[:100]}" if called else ""
        return ": ".join(filter(None, (str(self.source or ""), name, self.detail)))

    def at(self, source: Source | None, field: str | None = None) -> DocumentError:
        """The same error with its place filled in where it was not known yet."""
        return DocumentError(
            self.reason,
            kind=self.kind,
            source=self.source or source,
            field=self.field or field,
            offset=self.offset,
        )

    def __reduce__(self) -> tuple[object, ...]:  # keyword arguments survive a worker's pickle
        place = {name: getattr(self, name) for name in ("kind", "source", "field", "offset", "id")}
        return (partial(DocumentError, **place), (self.reason,))


class MissingFileError(DocumentError):
    """A marker, or a caption, for which the row lists no file at all."""


@dataclass(frozen=True)
class Text:
    """A run of text that is either trained or context.

    Args:
        text: The characters, never empty in a parsed document.
        trainable: Whether its tokens are targets.
        weight: Scales the loss of its targets; 0 < weight ≤ 100. Meaningless for context, and then 1.

    Raises:
        DocumentError: If the weight is out of range or the text cannot be written as UTF-8.

    Example:
        >>> Text("the valve", trainable=True).weight
        1.0
    """

    text: str
    trainable: bool = False
    weight: float = 1.0

    def __post_init__(self) -> None:
        # A plain float also of NumPy's: `to_markup` writes its repr.
        if self.weight != 1.0 or type(self.weight) is not float:
            object.__setattr__(self, "weight", float(self.weight) if self.trainable else 1.0)
        if not 0 < self.weight <= MAX_WEIGHT:
            raise DocumentError(
                f"the weight {self.weight} is out of range. Use a number above 0, up to 100.", kind="markup"
            )
        try:
            _ = self.text.isascii() or self.text.encode()
        except UnicodeEncodeError as error:
            raise DocumentError(
                f"half of a surrogate pair ({self.text[error.start]!r}) is not a character. "
                "Write the file as UTF-8 without \\ud800 to \\udfff escapes standing alone.",
                kind="markup",
            ) from None


@dataclass(frozen=True)
class Image:
    """A reference to an image: a path, or the file's bytes, and its own pixel limits.

    Example:
        >>> Image("figures/a.png", max_pixels=200_000).path
        'figures/a.png'
    """

    path: str | None = None
    data: bytes | None = field(default=None, repr=False)
    min_pixels: int | None = None
    max_pixels: int | None = None

    def __str__(self) -> str:
        return self.path or "image given as bytes"


@dataclass(frozen=True)
class Video:
    """A reference to a video: a path, or the file's bytes, its own pixel limits and sampling.

    Args:
        fps: Frames to take per second of video.
        max_frames: Frames to take at most.

    Example:
        >>> Video("clips/a.mp4", fps=1.0).fps
        1.0
    """

    path: str | None = None
    data: bytes | None = field(default=None, repr=False)
    min_pixels: int | None = None
    max_pixels: int | None = None
    fps: float | None = None
    max_frames: int | None = None

    def __str__(self) -> str:
        return self.path or "video given as bytes"


Medium = Image | Video
Segment = Text | Image | Video | TurnEdge


Modality = Literal["image", "video"]


def modality_of(medium: Medium) -> Modality:
    """The kind of a medium; its plural is the field of a row that lists it.

    Example:
        >>> modality_of(Video("a.mp4"))
        'video'
    """
    return "image" if isinstance(medium, Image) else "video"


@dataclass(frozen=True)
class Document:
    """One row of the user's data: text, images and video in reading order.

    Two documents are equal when their segments are. Neighbouring texts with the same treatment
    are merged and empty ones dropped, so that equal content has one form.

    Args:
        segments: In reading order.
        id: The row's own id; messages fall back to the source.
        source: File and line.
        media_root: The folder that its media paths start from and may not leave; None: as trusted.
        tagged: Whether the row marked its spans itself (False: ``untagged`` decided).
        empty_spans: Spans without a character, counted for the ledger.
        not_read: Fields of its row that its format does not read.

    Example:
        >>> Document((Text("a"), Text("b"), Text("", trainable=True))).segments
        (Text(text='ab', trainable=False, weight=1.0),)
    """

    segments: tuple[Segment, ...]
    id: str | None = field(default=None, compare=False)
    source: Source | None = field(default=None, compare=False)
    media_root: str | None = field(default=None, compare=False)
    tagged: bool = field(default=True, compare=False)
    empty_spans: int = field(default=0, compare=False)
    not_read: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        merged: list[Segment] = []
        filled = (segment for segment in self.segments if not isinstance(segment, Text) or segment.text)
        for key, run in groupby(filled, key=_treatment):
            parts = [*run]
            if key is not None and len(parts) > 1:
                parts = [Text("".join(part.text for part in parts if isinstance(part, Text)), *key)]
            merged += parts
        object.__setattr__(self, "segments", tuple(merged))

    @property
    def name(self) -> str:
        """What messages call this document."""
        return self.id or str(self.source or "document")

    @property
    def images(self) -> tuple[Image, ...]:
        """The images, in reading order."""
        return tuple(segment for segment in self.segments if isinstance(segment, Image))

    @property
    def videos(self) -> tuple[Video, ...]:
        """The videos, in reading order."""
        return tuple(segment for segment in self.segments if isinstance(segment, Video))

    def to_markup(self) -> str:
        r"""Markup that parses to an equal document, given :attr:`images` and :attr:`videos`.

        Example:
            >>> Document((Image("a.png"), Text("2 <image> tags", trainable=True))).to_markup()
            '<image><trainable_text>2 \\<image> tags</trainable_text>'
        """
        parts: list[str] = []
        has_span = False
        for number, segment in enumerate(self.segments):
            if isinstance(segment, Image):
                parts.append("<image>")
            elif isinstance(segment, Video):
                parts.append("<video>")
            elif isinstance(segment, TurnEdge):
                raise DocumentError("a chat turn's edges have no markup. Read it without chat_template.")
            else:
                before_tag = segment.trainable or number + 1 < len(self.segments)
                text = _escape(segment.text, before_tag=before_tag)
                if segment.trainable:
                    has_span = True
                    weight = "" if segment.weight == 1 else f' weight="{segment.weight!r}"'
                    text = f"<trainable_text{weight}>{text}</trainable_text>"
                parts.append(text)
        if not has_span and any(isinstance(segment, Text) for segment in self.segments):
            # An empty span says "tagged": without it `untagged: train` would train everything.
            parts.insert(0, "<trainable_text></trainable_text>")
        return "".join(parts)


def _treatment(segment: Segment) -> tuple[bool, float] | None:
    return (segment.trainable, segment.weight) if isinstance(segment, Text) else None


def _escape(text: str, *, before_tag: bool) -> str:
    """Backslashes so that nothing in ``text`` reads as a tag, and its own backslashes stay."""
    parts: list[str] = []
    done = 0
    for match in TAG_START.finditer(text):
        slashes = trailing_backslashes(text, done, match.start())
        parts += [text[done : match.start()], "\\" * (slashes + 1), match.group()]
        done = match.end()
    parts.append(text[done:])
    if before_tag:
        parts.append("\\" * trailing_backslashes(text, done, len(text)))
    return "".join(parts)


def trailing_backslashes(text: str, start: int, end: int) -> int:
    r"""Backslashes directly before ``end``, not looking before ``start``.

    Example:
        >>> trailing_backslashes("a" + "\\" * 3, 0, 4)
        3
    """
    count = 0
    while end - count > start and text[end - count - 1] == "\\":
        count += 1
    return count
