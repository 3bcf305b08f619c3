"""Ranks wait for the slowest of them: packs of nearly one cost, and steps of packs that cost alike.

Integers only, from lengths and grids: the same on every machine, whatever sorts its numbers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Packs among which samples change places: enough to find equal lengths, few enough to keep memory flat.
BLOCK = 8192
ROUNDS = 6  # more would even out what packs are made of as well, and put equal lengths together
_UNIT = 3  # samples that change places together at most
_NEIGHBOURS = 3  # among the units of nearly one length, how far apart two may be
_FULL = 0.95  # of a pack; those with less are the last ones, which cannot cost as much as the others
_TIES = 20  # bits that decide between equal lengths
# Steps that a window orders among themselves, and how many packs that makes at most.
WINDOW_STEPS, WINDOW_PACKS, FEWEST_STEPS = 64, 4096, 4
_SOURCES = 3  # the largest; what a pack has of the others is one
_FEWEST_PARTS = 3  # in which packs are divided by the share of a source
_SHARES = 1024  # steps in which a share is counted


@dataclass(frozen=True)
class PackCost:
    """What a sample costs to train on, in MFLOP: forward, and backward where something trains.

    Args:
        token: The layers of the language model, for each token.
        pair: Its attention, for each two tokens of a sample: its length squared, of which half is masked.
        target: The output layer, for each target.
        media: The vision tower and the merger, for each media token.
        frame_pair: The tower's full attention, for each two media tokens of a frame.

    Example:
        >>> cost = PackCost(token=10, pair=0.1, target=5, media=3, frame_pair=0.2)
        >>> cost.of(np.array([10]), np.array([4]), np.array([2]), np.array([4.0])).tolist()
        [137]
    """

    token: float
    pair: float
    target: float
    media: float
    frame_pair: float

    def of(
        self, lengths: np.ndarray, targets: np.ndarray, media: np.ndarray, frame_pairs: np.ndarray
    ) -> np.ndarray:
        """The cost of each sample: int64 (N,).

        Args:
            lengths, targets, media: Tokens of each sample, and those of them that are targets, and pads.
            frame_pairs: For each sample, the sum over its frames of their tokens squared.
        """
        lengths = lengths.astype(np.float64)
        cost = self.token * lengths + self.pair * lengths**2 + self.target * targets
        cost += self.media * media + self.frame_pair * frame_pairs
        return np.rint(cost).astype(np.int64)


def even_packs(
    ends: np.ndarray, lengths: np.ndarray, costs: np.ndarray, max_length: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Let samples change places until packs cost nearly the same.

    One to three samples of a pack change places with one to three of another that have as many tokens, if
    the two packs come closer to the mean. So there are as many packs, as full; each is a random draw still.
    A sample that fills its pack stays, whatever it costs.

    Args:
        ends: Where each pack ends among the samples.
        lengths, costs: For each sample, pack after pack.
        max_length: Tokens a pack may hold.
        seed: Decides which samples are tried.

    Returns:
        Places of the samples in the order given, pack after pack, every place from 0 to N-1 once; and where
        each pack ends.

    Example:
        >>> ends, lengths = np.array([2, 4]), np.array([2, 2, 2, 2])
        >>> places, ends = even_packs(ends, lengths, np.array([9, 9, 1, 1]), max_length=4, seed=0)
        >>> sorted((places[:2] // 2).tolist()), ends.tolist()
        ([0, 1], [2, 4])
    """
    starts = np.append(0, ends[:-1]).astype(np.int64)
    is_full = np.add.reduceat(lengths, starts, dtype=np.int64) >= _FULL * max_length
    goal = int(np.add.reduceat(costs, starts)[is_full].mean()) if is_full.any() else 0
    rng = np.random.default_rng(seed)
    places, sizes = np.empty(len(lengths), np.int32), np.empty(len(ends), np.int32)
    for first in range(0, len(ends), BLOCK):
        last = min(first + BLOCK, len(ends))
        own = slice(int(starts[first]), int(ends[last - 1]))
        block = _Block(np.diff(ends[first:last], prepend=own.start), lengths[own], costs[own], max_length)
        for _ in range(ROUNDS if is_full.any() else 0):
            block.swap(goal, rng)
        places[own], sizes[first:last] = block.places + own.start, block.sizes
    return places, np.cumsum(sizes, dtype=np.int32)


class _Units(NamedTuple):
    """Runs of samples that may change places.

    Args:
        first, number: The first sample of each run, and how many there are.
        pack, length, cost: Whose they are, and the sums over the run.
    """

    first: np.ndarray
    number: np.ndarray
    pack: np.ndarray
    length: np.ndarray
    cost: np.ndarray


class _Block:
    """Packs among which samples change places.

    Args:
        sizes: Samples of each pack.
        lengths, costs: For each sample, pack after pack.
        max_length: Tokens a pack may hold.
    """

    def __init__(self, sizes: np.ndarray, lengths: np.ndarray, costs: np.ndarray, max_length: int) -> None:
        count = len(sizes)
        self.sizes, self.places = sizes, np.arange(len(lengths), dtype=np.int32)
        self._pack = np.repeat(np.arange(count), sizes)
        self._lengths, self._costs = lengths.astype(np.int64), costs
        starts = np.cumsum(sizes) - sizes
        self._room = max_length - np.add.reduceat(self._lengths, starts)
        self._cost = np.add.reduceat(costs, starts)

    def swap(self, goal: int, rng: np.random.Generator) -> None:
        """Let each pack give some of its samples for those of another, at most once."""
        units = self._units(rng)
        order = np.argsort(
            units.length << _TIES | rng.integers(0, 1 << _TIES, len(units.pack)), kind="stable"
        )
        new_pack = self._pack.copy()
        for distance in range(1, _NEIGHBOURS + 1):
            # One for the other: both of nearly one length.
            one, other = self._better(units, order[:-distance], order[distance:], goal)
            mine, yours = units.pack[one], units.pack[other]
            for inside in range(_UNIT):
                for unit, pack in ((one, yours), (other, mine)):
                    has = units.number[unit] > inside
                    new_pack[units.first[unit[has]] + inside] = pack[has]
            grown, dearer = units.length[other] - units.length[one], units.cost[other] - units.cost[one]
            self._room[mine] -= grown
            self._room[yours] += grown
            self._cost[mine] += dearer
            self._cost[yours] -= dearer
            is_changed = np.zeros(len(self.sizes), dtype=bool)
            is_changed[mine] = is_changed[yours] = True
            order = order[~is_changed[units.pack[order]]]
        again = np.argsort(new_pack, kind="stable")
        self._pack, self.places = new_pack[again], self.places[again]
        self._lengths, self._costs = self._lengths[again], self._costs[again]
        self.sizes = np.bincount(self._pack, minlength=len(self.sizes))

    def _units(self, rng: np.random.Generator) -> _Units:
        """For each pack one run of neighbours of each number."""
        starts = np.cumsum(self.sizes) - self.sizes
        firsts, numbers = [], []
        for size in range(1, _UNIT + 1):
            has = np.flatnonzero(self.sizes >= size)
            firsts.append(starts[has] + rng.integers(0, self.sizes[has] - size + 1))
            numbers.append(np.full(len(has), size))
        first, number = np.concatenate(firsts), np.concatenate(numbers)
        lengths, costs = (np.append(0, np.cumsum(of)) for of in (self._lengths, self._costs))
        length, cost = (of[first + number] - of[first] for of in (lengths, costs))
        return _Units(first, number, self._pack[first], length, cost)

    def _better(
        self, units: _Units, one: np.ndarray, other: np.ndarray, goal: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Those of the pairs that bring two packs closest to the goal, each pack in one pair."""
        mine, yours = units.pack[one], units.pack[other]
        grown, dearer = units.length[other] - units.length[one], units.cost[other] - units.cost[one]
        # How much less the squared distances of the two packs from the goal are afterwards, halved.
        gain = -dearer * (self._cost[mine] - self._cost[yours] + dearer)
        fits = (mine != yours) & (grown <= self._room[mine]) & (-grown <= self._room[yours]) & (gain > 0)
        found = np.flatnonzero(fits)
        found = found[np.argsort(-gain[found], kind="stable")]
        rank, best = np.arange(len(found)), np.full(len(self.sizes), len(found))
        np.minimum.at(best, mine[found], rank)
        np.minimum.at(best, yours[found], rank)
        found = found[(best[mine[found]] == rank) & (best[yours[found]] == rank)]
        return one[found], other[found]


def kinds_of_packs(sources: np.ndarray, lengths: np.ndarray, ends: np.ndarray, step: int) -> np.ndarray:
    """What each pack is made of, as a number: whether it has little or much of each large source.

    For each source packs are divided into parts with equally many of them, by its share of their tokens. So
    packs of one source alone, which a long sample fills, are of one kind with many others, and change places
    with them. The more packs a step has, the less chance moves what it is made of: then there are more parts.

    Args:
        sources, lengths: For each sample, pack after pack.
        ends: Where each pack ends among the samples.
        step: Packs of an optimizer step, on all ranks.

    Returns:
        int64 (packs,); equal numbers are packs of one kind.

    Example:
        >>> kinds_of_packs(np.array([0, 0, 1, 1]), np.array([5, 5, 5, 5]), np.array([1, 2, 4]), 8).tolist()
        [2, 2, 0]
    """
    tokens = np.bincount(sources, weights=lengths)
    # The last one has what the others leave.
    counted = np.argsort(-tokens, kind="stable")[: min(max(len(tokens) - 1, 1), _SOURCES)]
    starts = np.append(0, ends[:-1])
    all_tokens = np.add.reduceat(lengths, starts, dtype=np.int64)
    kinds = np.zeros(len(ends), dtype=np.int64)
    parts = next(parts for parts in itertools.count(_FEWEST_PARTS) if parts**3 >= step)
    for source in counted:
        own = np.add.reduceat(np.where(sources == source, lengths, 0), starts, dtype=np.int64)
        share = own * _SHARES // np.maximum(all_tokens, 1)
        packs = np.bincount(share, minlength=_SHARES + 1)
        # Packs of one share have the middle of the ranks that they take together.
        twice_rank = 2 * np.cumsum(packs) - packs
        kinds = kinds * parts + (twice_rank * parts // (2 * len(ends)))[share]
    return kinds


def order_of_steps(costs: np.ndarray, kinds: np.ndarray, step: int, rng: np.random.Generator) -> np.ndarray:
    """Packs in random order, those of one step of nearly one cost, and each step as mixed as at random.

    The packs are shuffled, which gives each step so many of each kind. Among the steps of a window, packs of
    one kind change places: the dearest of all kinds get into the same steps. So no step has more of a source
    than chance gave it.

    Args:
        costs, kinds: For each pack.
        step: Packs of an optimizer step, on all ranks.
        rng: Decides the order.

    Returns:
        Numbers of packs, step after step, every one from 0 to N-1 once. What makes no full step comes last.

    Example:
        >>> costs = np.array([1, 9, 1, 9])
        >>> order = order_of_steps(costs, np.zeros(4, np.int64), 2, np.random.default_rng(0))
        >>> sorted(costs[order].reshape(2, 2).tolist())
        [[1, 1], [9, 9]]
    """
    order = rng.permutation(len(costs))
    steps = len(order) // step
    if step == 1 or not steps:
        return order
    size = max(FEWEST_STEPS, min(WINDOW_STEPS, WINDOW_PACKS // step))
    for window in np.array_split(np.arange(steps), max(1, round(steps / size))):
        here = slice(int(window[0]) * step, (int(window[-1]) + 1) * step)
        packs = order[here]
        # The step that chance made dearest gets the dearest of each kind; chance decides between equal ones.
        number = np.repeat(np.arange(len(window)), step)
        expected = _expected(costs[packs], kinds[packs]).reshape(-1, step).sum(axis=1)
        rank = np.empty(len(window), dtype=np.int64)
        rank[np.lexsort((rng.permutation(len(window)), -expected))] = np.arange(len(window))
        places = np.lexsort((rank[number], kinds[packs]))
        dearest = np.lexsort((-costs[packs], kinds[packs]))
        order[here][places] = packs[dearest]
    return order


def _expected(costs: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """The mean cost of each pack's kind."""
    _, kind = np.unique(kinds, return_inverse=True)
    return (np.bincount(kind, weights=costs) / np.bincount(kind))[kind].astype(np.int64)


def share_among_ranks(costs: np.ndarray, ranks: int, batch: int) -> np.ndarray:
    """In which order a step reads its packs, so that ranks have equally much to do in it.

    Batch number k of the step is of rank k modulo ``ranks``. Batches that ranks do at the same time are of
    packs next in cost; who has had least so far gets the dearest of them.

    Args:
        costs: Those of the packs of each step: (steps, packs).
        ranks: How many there are.
        batch: Packs of a batch.

    Returns:
        Places of the packs in their step: (steps, packs).

    Example:
        >>> share_among_ranks(np.array([[1, 2, 3, 4]]), ranks=2, batch=1).tolist()
        [[3, 2, 0, 1]]
    """
    steps, packs = costs.shape
    falling = np.argsort(-costs, axis=1, kind="stable")
    done = np.zeros((steps, ranks), dtype=np.int64)
    shared = np.empty((steps, packs // ranks // batch, batch, ranks), dtype=np.int64)
    for turn, cut in enumerate(np.split(falling, packs // ranks, axis=1)):
        least = np.argsort(done, axis=1, kind="stable")
        np.put_along_axis(shared[:, turn // batch, turn % batch], least, cut, axis=1)
        done += np.take_along_axis(costs, shared[:, turn // batch, turn % batch], axis=1)
    return shared.swapaxes(2, 3).reshape(steps, packs)
