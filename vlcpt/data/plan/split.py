"""A document becomes parts that fit, media whole, every target trained once."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from vlcpt.data.documents import DocumentError, Source
from vlcpt.data.encode.encoder import TokenStream
from vlcpt.data.encode.vision import PlacedMedium

OnOverlong = Literal["split", "drop", "error"]


class Part(NamedTuple):
    """Tokens ``start:stop`` of a document; one sample.

    Args:
        repeated: The token at ``start`` is the one before the part, as context.
        targets: Targets inside, the repeated token not counted.
        media: Pad tokens inside; four patches stand behind each.
        frame_pairs: The sum over the frames inside of their pad tokens squared: what attention costs there.
    """

    start: int
    stop: int
    repeated: bool
    targets: int
    media: int = 0
    frame_pairs: int = 0

    @property
    def length(self) -> int:
        """Tokens of the sample."""
        return self.stop - self.start


def split_stream(
    stream: TokenStream,
    max_length: int,
    *,
    on_overlong: OnOverlong = "split",
    source: Source | None = None,
) -> list[Part]:
    """The parts of a document that are trained.

    What follows a part's last target cannot reach the loss and is dropped; so is a part without
    targets. A later part opens with the one text token before it, so that its first target has the
    context it would have had, at least in part.

    Args:
        stream: The document's tokens.
        max_length: Tokens a part may hold, media and the repeated token included.
        on_overlong: Split a longer document, or refuse it.
        source: Named in errors.

    Returns:
        The parts in order; none for a document without targets.

    Raises:
        DocumentError: If a medium cannot fit, or a longer document is not to be split.

    Example:
        >>> import numpy as np
        >>> labels = np.array([-100, 1, 2, 3, 4, -100])
        >>> stream = TokenStream(np.arange(6), labels, (labels > 0) * 1.0, (), 0, 0)
        >>> [(part.start, part.stop) for part in split_stream(stream, 3)]
        [(0, 3), (2, 5)]
    """
    targets = np.flatnonzero(stream.labels >= 0)
    if not len(targets):
        return []
    length = int(targets[-1]) + 1
    if length <= max_length:
        return [Part(0, length, False, len(targets), *_media(stream, 0, length))]
    if on_overlong != "split":
        raise DocumentError(
            f"{length} tokens up to the last target, more than max_length {max_length}. "
            f"Raise max_length, {'lower max_pixels, ' if stream.media else ''}or set on_overlong: split.",
            kind="overlong",
            source=source,
        )
    # last_cut[i]: the last place up to i where a cut may fall, which is directly after a text token.
    is_text = np.ones(length, dtype=bool)
    for placed in stream.media:
        is_text[placed.start : placed.stop] = False
    places = np.arange(length + 1)
    last_cut = np.maximum.accumulate(np.where(np.append(False, is_text), places, 0))
    parts: list[Part] = []
    done = 0
    while done < length:
        start = max(done - 1, 0)
        stop = length if start + max_length >= length else int(last_cut[start + max_length])
        if stop <= done:
            raise _too_large(stream.media, done, max_length, source)
        inside = targets[np.searchsorted(targets, done) : np.searchsorted(targets, stop)]
        if len(inside):
            end = int(inside[-1]) + 1
            parts.append(Part(start, end, start < done, len(inside), *_media(stream, start, end)))
        done = stop
    return parts


def _media(stream: TokenStream, start: int, stop: int) -> tuple[int, int]:
    """Pad tokens between two places, and their pairs in a frame."""
    inside = [one for one in stream.media if start <= one.start and one.stop <= stop]
    return sum(one.tokens for one in inside), sum(one.frame_pairs for one in inside)


def _too_large(
    media: tuple[PlacedMedium, ...], done: int, max_length: int, source: Source | None
) -> DocumentError:
    """The error for neighbouring media that no part can hold, with the limit that would fit."""
    group: list[PlacedMedium] = []
    for placed in media:
        if placed.start == (group[-1].stop if group else done):
            group.append(placed)
    largest = max(group, key=lambda placed: placed.tokens)
    # A part must hold the text token before the media, all of them, and one text token after.
    room = max_length - 2 - 2 * len(group)
    limit = _limit_that_fits(group, room)
    what = f"{largest.medium} takes {largest.tokens} tokens"
    if len(group) > 1:
        what += f" and stands with {len(group) - 1} more media without text between"
    todo = (
        f"{_lower(group, limit)}, or raise max_length."
        if limit
        else f"Raise max_length to {sum(placed.tokens + 2 for placed in group) + 2} or more."
    )
    return DocumentError(
        f"{what}, which does not fit max_length {max_length}. {todo}", kind="medium_too_large", source=source
    )


def _lower(group: list[PlacedMedium], limit: int) -> str:
    """What to write where, for what a row says of a medium wins over the configuration."""
    in_rows = [placed.medium.max_pixels is not None for placed in group]
    where = " in the row" if all(in_rows) else " in the row and in the configuration" if any(in_rows) else ""
    todo = f"Set max_pixels{where} to {limit} or less"
    if any(placed.min_pixels > limit for placed in group):
        todo += ", and min_pixels, wherever it is set, to no more"
    return todo


def _limit_that_fits(group: list[PlacedMedium], room: int) -> int | None:
    """The ``max_pixels``, to 1%, with which all media together take ``room`` tokens or fewer; None: no such.

    Tried from above, for a lower limit can give a thin image more tokens. A row of a thousand images must
    not take seconds: the largest come first, so that most tries end after a few of them.
    """
    largest_first = sorted(group, key=lambda placed: -placed.tokens)
    tokens = room
    while tokens > 0:
        limit, left = tokens * largest_first[0].pixels_per_token, room
        for placed in largest_first:
            left -= placed.tokens_at(limit)
            if left < 0:
                break
        else:
            return limit
        tokens = min(tokens - 1, tokens * 99 // 100)
    return None
