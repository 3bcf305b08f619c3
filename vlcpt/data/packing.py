"""Lengths become packs: integers only."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Sequence


def plan_packs(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Put samples together so that each pack holds at most ``max_length`` tokens.

    Best-fit decreasing: the longest sample first, into the fullest pack that still has room.
    Only lengths are needed, so a plan is cheap to make, to save and to make again.

    Args:
        lengths: Tokens of each sample, media included; length N.
        max_length: Tokens a pack may hold.

    Returns:
        Sample numbers, one list a pack; every number from 0 to N-1 is in exactly one.

    Raises:
        ValueError: If a sample alone is longer than ``max_length``.

    Example:
        >>> plan_packs([5, 3, 4, 2], max_length=7)
        [[0, 3], [2, 1]]
    """
    by_length: dict[int, array[int]] = {}
    for number, length in enumerate(lengths):
        by_length.setdefault(length, array("q")).append(number)
    packs: list[list[int]] = []
    rooms: list[int] = []  # distinct amounts of room, ascending
    by_room: dict[int, list[int]] = {}  # room -> packs with exactly that much
    for length in sorted(by_length, reverse=True):
        numbers = by_length[length]
        if length > max_length:
            raise ValueError(f"sample {numbers[0]} has {length} tokens, more than max_length {max_length}")
        # The fullest pack with room for one is also the fullest for the next of the same length, until it has
        # no room left: so each pack takes as many as it can hold at once.
        done = 0
        while done < len(numbers):
            place = bisect_left(rooms, length)
            if place == len(rooms):
                pack, room = len(packs), max_length
                packs.append([])
            else:
                room = rooms[place]
                pack = by_room[room].pop()
                if not by_room[room]:
                    del by_room[room], rooms[place]
            taken = min(room // max(length, 1), len(numbers) - done) or 1
            packs[pack] += numbers[done : done + taken]
            done += taken
            room -= taken * length
            if room not in by_room:
                insort(rooms, room)
                by_room[room] = []
            by_room[room].append(pack)
    return packs
