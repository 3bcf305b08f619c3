"""How mixed packs are, and how full: as they are planned, by best fit over all samples, and at random.

    python benchmarks/mixing.py                                # some seconds; one line of JSON a row
    python benchmarks/mixing.py --max_length 8192              # in larger packs

10,000 captions (log-normal, median 250 tokens), 10,000 pages (median 1,200) and replay (median 600) up to 20%
of all tokens, in packs of 4,096 and steps of 16 packs. A row has

- fill: the share of tokens that is no padding;
- correlation: the intraclass correlation of log length in a pack, 0 of a random draw, 1 where all are alike;
- copies: of 2,000 documents read three times, the part with two copies in one pack;
- spread: the standard deviation of each source's share of a step, and that divided by the one at random;
- seconds: CPU time of planning a million samples.

``at random`` cuts the shuffled order every 4,096 tokens, as if a sample could stand over a pack's edge: it is
no plan, but what a random draw of as many tokens looks like.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from array import array
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

import numpy as np

from vlcpt.data.plan.mix import draw_documents, plan_packs

MAX_LENGTH = 4096
STEP = 16  # packs
Planner = Callable[[Sequence[int], int], tuple[Sequence[int], Sequence[int]]]


def best_fit(lengths: Sequence[int], max_length: int) -> tuple[Sequence[int], Sequence[int]]:
    """The longest first, each into the fullest pack that still has room."""
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # room and pack, ascending
    for number in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        place = bisect_left(rooms, (lengths[number], 0))
        room, pack = rooms.pop(place) if place < len(rooms) else (max_length, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(number)
        insort(rooms, (room - lengths[number], pack))
    return np.concatenate(packs).tolist(), np.cumsum([len(pack) for pack in packs]).tolist()


def at_random(lengths: Sequence[int], max_length: int) -> tuple[Sequence[int], Sequence[int]]:
    packs = (np.cumsum(lengths) - 1) // max_length
    return range(len(lengths)), np.cumsum(np.unique(packs, return_counts=True)[1]).tolist()


PLANNERS: dict[str, Planner] = {"planned": plan_packs, "best fit": best_fit, "at random": at_random}


def tokens(rng: np.random.Generator, median: int, count: int) -> np.ndarray:
    return np.clip(rng.lognormal(np.log(median), 0.6, count), 8, MAX_LENGTH).astype(np.int32)


def mix(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of all samples of a pass, and their sources."""
    captions, pages, old = tokens(rng, 250, 10_000), tokens(rng, 1200, 10_000), tokens(rng, 600, 50_000)
    wanted = 0.2 / 0.8 * (int(captions.sum()) + int(pages.sum()))
    replay = np.repeat(old, draw_documents(old, wanted, rng))
    found = [captions, pages, replay]
    return np.concatenate(found), np.repeat(np.arange(3), [len(one) for one in found])


def planned(lengths: np.ndarray, planner: Planner, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample numbers, pack after pack, and the pack of each, of shuffled samples as in ``CPTDataset``."""
    order = np.arange(len(lengths), dtype=np.int32)
    np.random.default_rng(seed).shuffle(order)
    numbers, ends = planner(array("i", lengths[order].tobytes()), MAX_LENGTH)
    sizes = np.diff(np.asarray(ends), prepend=0)
    return order[np.asarray(numbers)], np.repeat(np.arange(len(sizes)), sizes)


def correlation(values: np.ndarray, pack: np.ndarray) -> float:
    """The intraclass correlation of one-way groups of unequal sizes."""
    sizes = np.bincount(pack)
    means = np.bincount(pack, values) / sizes
    between = float((sizes * (means - values.mean()) ** 2).sum()) / (len(sizes) - 1)
    within = float(((values - means[pack]) ** 2).sum()) / (len(values) - len(sizes))
    size = (len(values) - float((sizes**2).sum()) / len(values)) / (len(sizes) - 1)
    return (between - within) / (between + (size - 1) * within)


def copies_together(rng: np.random.Generator, planner: Planner, seed: int) -> float:
    """The part of 2,000 documents, read three times, that has two copies in one pack."""
    lengths = np.concatenate([tokens(rng, 250, 1000), tokens(rng, 1200, 1000)])
    numbers, pack = planned(np.repeat(lengths, 3), planner, seed)
    places = np.unique((numbers // 3) * len(numbers) + pack) // len(numbers)
    return float((np.bincount(places, minlength=2000) < 3).mean())


def spread(
    rng: np.random.Generator, lengths: np.ndarray, sources: np.ndarray, pack: np.ndarray
) -> list[float]:
    """The standard deviation of each source's share of a step, over ten epochs of shuffled packs."""
    of_pack = np.stack([np.bincount(pack, lengths * (sources == one)) for one in range(3)], axis=1)
    shares = []
    for _ in range(10):
        steps = rng.permutation(len(of_pack))[: len(of_pack) // STEP * STEP].reshape(-1, STEP)
        found = of_pack[steps].sum(axis=1)
        shares.append(found / found.sum(axis=1, keepdims=True))
    return np.concatenate(shares).std(axis=0).tolist()


def measure(planner: Planner, seed: int) -> dict[str, float | list[float]]:
    rng = np.random.default_rng(seed)
    lengths, sources = mix(rng)
    numbers, pack = planned(lengths, planner, seed)
    lengths, sources = lengths[numbers], sources[numbers]
    return {
        "fill": float(lengths.sum()) / ((int(pack[-1]) + 1) * MAX_LENGTH),
        "correlation": correlation(np.log(lengths), pack),
        "copies": copies_together(rng, planner, seed),
        "spread": spread(rng, lengths, sources, pack),
    }


def seconds(planner: Planner) -> float:
    """CPU time of a million samples."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate([tokens(rng, 250, 500_000), tokens(rng, 1200, 500_000)])
    rng.shuffle(lengths)
    given = array("i", lengths.tobytes())
    before = time.process_time()
    planner(given, MAX_LENGTH)
    return time.process_time() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="Plans of which each number is the median.")
    parser.add_argument("--output", help="A file for the same as JSON.")
    parser.add_argument("--max_length", type=int, default=MAX_LENGTH, help="Tokens of a pack.")
    given = parser.parse_args()
    globals()["MAX_LENGTH"] = given.max_length
    found: dict[str, dict[str, object]] = {}
    random_spread = np.ones(3)
    for name in ("at random", "planned", "best fit"):
        runs = [measure(PLANNERS[name], seed) for seed in range(given.seeds)]
        median = {key: np.median([run[key] for run in runs], axis=0) for key in runs[0]}
        if name == "at random":
            random_spread = median["spread"]
        found[name] = {key: round(float(median[key]), 4) for key in ("fill", "correlation", "copies")}
        found[name]["spread"] = [round(float(one), 4) for one in median["spread"]]
        found[name]["spread_of_random"] = [round(float(one), 3) for one in median["spread"] / random_spread]
        found[name]["seconds"] = round(seconds(PLANNERS[name]), 2)
        print(json.dumps({"packs": name, **found[name]}), flush=True)
    if given.output:
        about = {"python": platform.python_version(), "numpy": np.__version__, "machine": platform.machine()}
        with open(given.output, "w", encoding="utf-8") as file:
            json.dump({**about, "seeds": given.seeds, "rows": found}, file, indent=2)


if __name__ == "__main__":
    main()
