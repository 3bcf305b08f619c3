"""In which order documents are read, how often, and which share a pack. Integers only."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def passes_for_shares(targets: Sequence[int], shares: Sequence[float | None]) -> list[float]:
    """Passes over each source, at least one, so that each has its share of all targets.

    Sources without a share divide what the others leave, in proportion to their targets.

    Args:
        targets: Targets of one pass over each source.
        shares: The share asked for, 0 to 1; None where none was.

    Returns:
        Passes of each source; a fraction is a part of one pass.

    Raises:
        ValueError: If the shares cannot be met.

    Example:
        >>> passes_for_shares([100, 300], [0.5, None])
        [3.0, 1.0]
    """
    free = sum(count for count, share in zip(targets, shares, strict=True) if share is None)
    asked = sum(share for share in shares if share is not None)
    if any(share is not None for share in shares):
        _check(targets, shares, asked, free)
    wanted = [(count, share) for count, share in zip(targets, shares, strict=True) if share is not None]
    if free and wanted:
        wanted.append((free, 1 - asked))
    # The source that is scarcest for its share is read once; the others follow from its total.
    total = max((count / share for count, share in wanted), default=0.0)
    return [
        max(1.0, total * (share if share is not None else (1 - asked) * count / free) / count)
        if count and wanted
        else 1.0
        for count, share in zip(targets, shares, strict=True)
    ]


def _check(targets: Sequence[int], shares: Sequence[float | None], asked: float, free: int) -> None:
    if asked > 1 + 1e-9 or (free and asked >= 1) or (not free and abs(asked - 1) > 1e-6):
        have = "one source has none" if free else "every source has one"
        raise ValueError(
            f"the shares add up to {asked:g} and {have}. Shares are parts of all targets: let them "
            "add up to 1, or to less with a source without a share to take the rest."
        )
    for count, share in zip(targets, shares, strict=True):
        if share is not None and not count:
            raise ValueError(f"a source with share {share:g} has no targets. Remove its share.")


def repeat_documents(targets: np.ndarray, passes: float, rng: np.random.Generator) -> np.ndarray:
    """How often each document is read: whole passes, and a seeded draw for the rest of one.

    Args:
        targets: Targets of each document of the source.
        passes: At least 1.
        rng: Decides the draw.

    Returns:
        int64, one count a document.

    Example:
        >>> repeat_documents(np.array([5, 5]), 2.0, np.random.default_rng(0)).tolist()
        [2, 2]
    """
    whole = int(passes + 1e-9)
    rest = (passes - whole) * int(targets.sum())
    return whole + draw_documents(targets, rest, rng)


def draw_documents(
    targets: np.ndarray, wanted: float, rng: np.random.Generator, *, at_least_one: bool = False
) -> np.ndarray:
    """How often each document is drawn so that their targets come closest to ``wanted``.

    A document is drawn again only when all have been drawn.

    Args:
        targets: Targets of each document.
        wanted: Targets to draw.
        rng: Decides the order.
        at_least_one: Draw a document even where none would come closer.

    Returns:
        int64, one count a document.

    Example:
        >>> draw_documents(np.array([4, 4, 4]), 8, np.random.default_rng(0)).sum()
        np.int64(2)
    """
    total = int(targets.sum())
    if wanted <= 0 or not total:
        return np.zeros(len(targets), dtype=np.int64)
    counts = np.full(len(targets), int(wanted // total), dtype=np.int64)
    order = rng.permutation(len(targets))
    reached = np.cumsum(targets[order])
    rest = wanted % total
    take = int(np.searchsorted(reached, rest))
    # The document that crosses the line is taken if that lands nearer.
    if take < len(order) and abs(reached[take] - rest) < abs((reached[take - 1] if take else 0) - rest):
        take += 1
    if at_least_one and not counts.any():
        take = max(take, 1)
    counts[order[:take]] += 1
    return counts


# Samples that may close a pack: enough that one nearly always fills it, too few to sort the data by length.
LOOK_AHEAD = 2048
_BITS = 32  # of a sample's number, below its length


def plan_packs(lengths: Sequence[int], max_length: int) -> tuple[array[int], array[int]]:
    """Put samples together so that each pack holds at most ``max_length`` tokens.

    Samples in the order given as long as they fit; then the longest of the next ``LOOK_AHEAD`` that fits,
    until none does. A pack is then nearly as mixed as the order: best fit over all samples fills packs
    no better, and puts equal lengths, hence copies and sources, together.
    Only lengths are needed, so a plan is cheap to make, to save and to make again.

    Args:
        lengths: Tokens of each sample, media included, in shuffled order; N of them.
        max_length: Tokens a pack may hold.

    Returns:
        Sample numbers, pack after pack, every number from 0 to N-1 once; and where each pack ends among them.

    Raises:
        ValueError: If a sample alone is longer than ``max_length``.

    Example:
        >>> numbers, ends = plan_packs([5, 3, 4, 2], max_length=7)
        >>> numbers.tolist(), ends.tolist()
        ([0, 3, 1, 2], [2, 4])
    """
    # Arrays, not lists: of a million samples, each number would be an object.
    found, ends = array("i"), array("i")
    is_packed = bytearray(len(lengths))
    window: list[int] = []  # the next samples that no pack has: their lengths before their numbers, ascending
    first = following = 0  # the next sample of the order, and the next that is not in the window
    room = max_length
    while len(found) < len(lengths):
        while len(window) < LOOK_AHEAD and following < len(lengths):
            if (length := lengths[following]) > max_length:
                raise ValueError(f"sample {following} has {length} tokens, more than max_length {max_length}")
            insort(window, length << _BITS | following)
            following += 1
        while is_packed[first]:
            first += 1
        if lengths[first] <= room:
            place = bisect_left(window, lengths[first] << _BITS | first)
        elif not (place := bisect_left(window, (room + 1) << _BITS)):
            ends.append(len(found))
            room = max_length
            continue
        else:
            place -= 1
        length, number = divmod(window.pop(place), 1 << _BITS)
        is_packed[number] = True
        found.append(number)
        room -= length
    if len(found):
        ends.append(len(found))
    return found, ends
