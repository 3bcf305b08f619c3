"""Lengths become packs: integers only."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Sequence

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
