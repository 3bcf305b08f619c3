"""Lengths become packs: integers only."""

from __future__ import annotations

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
    packs: list[list[int]] = []
    rooms: list[int] = []  # distinct amounts of room, ascending
    by_room: dict[int, list[int]] = {}  # room -> packs with exactly that much

    def put_back(pack: int, room: int) -> None:
        if room not in by_room:
            insort(rooms, room)
            by_room[room] = []
        by_room[room].append(pack)

    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[number]
        if length > max_length:
            raise ValueError(f"sample {number} has {length} tokens, more than max_length {max_length}")
        place = bisect_left(rooms, length)
        if place == len(rooms):
            packs.append([number])
            put_back(len(packs) - 1, max_length - length)
            continue
        room = rooms[place]
        pack = by_room[room].pop()
        if not by_room[room]:
            del by_room[room], rooms[place]
        packs[pack].append(number)
        put_back(pack, room - length)
    return packs
