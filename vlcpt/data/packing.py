"""Lengths become packs: integers only."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable
from itertools import accumulate


def plan_packs(lengths: Iterable[int], max_length: int) -> tuple[array[int], array[int]]:
    """Put samples together so that each pack holds at most ``max_length`` tokens.

    Best-fit decreasing: the longest sample first, into the fullest pack that still has room.
    Only lengths are needed, so a plan is cheap to make, to save and to make again.

    Args:
        lengths: Tokens of each sample, media included; N of them.
        max_length: Tokens a pack may hold.

    Returns:
        Sample numbers, pack after pack, every number from 0 to N-1 once; and where each pack ends among them.

    Raises:
        ValueError: If a sample alone is longer than ``max_length``.

    Example:
        >>> numbers, ends = plan_packs([5, 3, 4, 2], max_length=7)
        >>> numbers.tolist(), ends.tolist()
        ([0, 3, 2, 1], [2, 4])
    """
    # Arrays, not lists: of a million samples, each number would be an object.
    by_length: dict[int, array[int]] = {}
    for number, length in enumerate(lengths):
        by_length.setdefault(length, array("i")).append(number)
    placed, pack_of = array("i"), array("i")  # samples in the order in which packs take them, and the packs
    sizes = array("i")  # samples in each pack
    rooms: list[int] = []  # distinct amounts of room, ascending
    by_room: dict[int, array[int]] = {}  # room -> packs with exactly that much
    for length in sorted(by_length, reverse=True):
        numbers = by_length.pop(length)
        if length > max_length:
            raise ValueError(f"sample {numbers[0]} has {length} tokens, more than max_length {max_length}")
        placed += numbers
        # The fullest pack with room for one is also the fullest for the next of the same length, until it has
        # no room left: so each pack takes as many as it can hold at once.
        while len(pack_of) < len(placed):
            place = bisect_left(rooms, length)
            if place == len(rooms):
                pack, room = len(sizes), max_length
                sizes.append(0)
            else:
                room = rooms[place]
                pack = by_room[room].pop()
                if not by_room[room]:
                    del by_room[room], rooms[place]
            taken = min(room // max(length, 1), len(placed) - len(pack_of)) or 1
            pack_of += array("i", [pack]) * taken
            sizes[pack] += taken
            room -= taken * length
            if room not in by_room:
                insort(rooms, room)
                by_room[room] = array("i")
            by_room[room].append(pack)
    ends = array("i", accumulate(sizes))
    following = array("i", (end - size for end, size in zip(ends, sizes, strict=True)))
    found = array("i", bytes(len(placed) * placed.itemsize))
    for number, pack in zip(placed, pack_of, strict=True):
        found[following[pack]] = number
        following[pack] += 1
    return found, ends
