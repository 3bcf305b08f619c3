"""How evenly the ranks of a step are loaded, and how mixed its packs are, with balance_ranks and without.

    python benchmarks/balance.py                               # two minutes; one line of JSON a row

Packs of three mixes are planned, balanced and ordered as in training, for the shapes of the 3B and the 7B,
with LoRA on the language model, and the FLOPs of each rank are added up:

- captions: 10,000 captions with one image (log-normal, median 250 tokens), 10,000 pages of text (median
  1,200) and replay (median 600) up to 20% of all tokens, in packs of 4,096, as in benchmarks/mixing.py;
- text: two sources of text (medians 400 and 900, wide), in packs of 4,096;
- images: documents with 0 to 8 or 0 to 16 images of 16 to 1,200 tokens each, in packs of 8,192.

A row has, of packs in random order (before) and with ``balance_ranks`` (after),

- balance: the mean FLOPs of the ranks over the largest of them, mean of the steps of the epochs;
- together: the same of each micro-batch, for engines whose ranks wait for each other in every forward pass;
- spread_of_random (after): the standard deviation of each source's share of a step over that before;
- fill, correlation and copies: as in benchmarks/mixing.py.

The last row has the CPU seconds of planning, of balancing and of ordering an epoch of a million samples.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from array import array
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from mixing import correlation, mix, tokens

from vlcpt.data.plan.balance import PackCost, even_packs, kinds_of_packs
from vlcpt.data.plan.mix import plan_packs

# Ranks and accumulation, batches of one pack.
LAYOUTS = ((1, 1), (8, 1), (16, 1), (64, 1), (8, 4), (64, 4))


class Samples(NamedTuple):
    """Of each sample: tokens, targets, media tokens, Σ tokens of a frame squared, source."""

    lengths: np.ndarray
    targets: np.ndarray
    media: np.ndarray
    frame_pairs: np.ndarray
    sources: np.ndarray

    def costs(self, cost: PackCost) -> np.ndarray:
        return cost.of(self.lengths, self.targets, self.media, self.frame_pairs)


def captions(rng: np.random.Generator) -> Samples:
    lengths, sources = mix(rng)
    lengths = lengths.astype(np.int64)
    share = rng.uniform(0.5, 0.95, len(lengths))
    media = np.where(sources == 0, np.maximum(1, np.minimum(lengths - 6, lengths * share)), 0).astype(
        np.int64
    )
    # Of pages a part is trained, of the others all that is text.
    part = np.where(sources == 1, rng.uniform(0.3, 1, len(lengths)), 1)
    targets = np.maximum(1, (lengths - media - 3) * part).astype(np.int64)
    return Samples(lengths, targets, media, media.astype(float) ** 2, sources)


def text(rng: np.random.Generator, count: int = 20_000) -> Samples:
    sources = rng.integers(0, 2, count)
    drawn = np.where(sources == 0, rng.normal(np.log(400), 1, count), rng.normal(np.log(900), 0.8, count))
    lengths = np.clip(np.exp(drawn), 8, 4096).astype(np.int64)
    return Samples(lengths, lengths - 1, np.zeros(count, np.int64), np.zeros(count), sources)


def images(rng: np.random.Generator, count: int = 20_000, max_length: int = 8192) -> Samples:
    sources, words = rng.integers(0, 2, count), tokens(rng, 600, count).astype(np.int64)
    rows = []
    for source, length in zip(sources.tolist(), words.tolist(), strict=True):
        sizes = np.clip(rng.lognormal(np.log(200), 0.6, rng.integers(0, 9 + 8 * source)), 16, 1200).astype(
            int
        )
        sizes = sizes[np.cumsum(sizes + 2) < max_length - 32]
        own = min(length, max_length - int(sizes.sum()) - 2 * len(sizes))
        rows.append(
            (own + int(sizes.sum()) + 2 * len(sizes), own - 1, sizes.sum(), (sizes.astype(float) ** 2).sum())
        )
    lengths, targets, media, frame_pairs = (np.array(column) for column in zip(*rows, strict=True))
    return Samples(lengths, targets, media, frame_pairs, sources)


MIXES: dict[str, tuple[Callable[[np.random.Generator], Samples], int]] = {
    "captions": (captions, 4096),
    "text": (text, 4096),
    "images": (images, 8192),
}


def shapes() -> dict[str, PackCost]:
    """What a sample costs at the shapes of the 3B and the 7B, as the trainer would find it."""
    import torch
    from shapes_3b import TEXT, TEXT_7B, VISION, VISION_7B
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from vlcpt.training.cost import cost_of

    found = {}
    for name, text, vision in (("3B", TEXT, VISION), ("7B", TEXT_7B, VISION_7B)):
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        with torch.device("meta"):
            model = Qwen2_5_VLForConditionalGeneration(config).requires_grad_(False)
        # An adapter passes gradients through the language model, as this would.
        found[name] = cost_of(model, recomputes=False)
    return found


def planned(samples: Samples, max_length: int, seed: int) -> tuple[Samples, np.ndarray, np.ndarray]:
    """Samples pack after pack, their numbers, and where each pack ends, as CPTDataset plans them."""
    order = np.random.default_rng(seed).permutation(len(samples.lengths))
    numbers, ends = plan_packs(array("i", samples.lengths[order].astype(np.int32).tobytes()), max_length)
    order = order[np.asarray(numbers)]
    return Samples(*(column[order] for column in samples)), order, np.asarray(ends)


def sums(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    return np.add.reduceat(values, np.append(0, ends[:-1]))


def loads(costs: np.ndarray, order: np.ndarray, ranks: int, accumulation: int) -> tuple[float, float]:
    """Mean over largest of the ranks of a step, and of those of a micro-batch."""
    own = costs[order[: len(order) // (ranks * accumulation) * ranks * accumulation]]
    turns = own.reshape(-1, accumulation, ranks)
    of_ranks = turns.sum(axis=1)
    together = turns.mean(axis=2).sum(axis=1) / turns.max(axis=2).sum(axis=1)
    return float((of_ranks.mean(axis=1) / of_ranks.max(axis=1)).mean()), float(together.mean())


def shares(samples: Samples, ends: np.ndarray, order: np.ndarray, step: int) -> np.ndarray:
    """Each source's share of the tokens of each step."""
    of_pack = np.stack(
        [sums(samples.lengths * (samples.sources == one), ends) for one in range(samples.sources.max() + 1)],
        axis=1,
    )
    steps = of_pack[order[: len(order) // step * step]].reshape(-1, step, of_pack.shape[1]).sum(axis=1)
    return steps / steps.sum(axis=1, keepdims=True)


def fullness(samples: Samples, ends: np.ndarray, max_length: int) -> dict[str, float]:
    pack = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
    fill = float(samples.lengths.sum()) / len(ends) / max_length
    return {"fill": round(fill, 4), "correlation": round(correlation(np.log(samples.lengths), pack), 3)}


def copies(cost: PackCost, seed: int) -> float:
    """The part of 2,000 documents, read three times, that has two copies in one pack that was balanced."""
    rng = np.random.default_rng(seed)
    once = np.concatenate([tokens(rng, 250, 1000), tokens(rng, 1200, 1000)]).astype(np.int64)
    media = np.where(np.arange(2000) < 1000, once // 2, 0)
    three = (
        np.repeat(one, 3) for one in (once, once - media - 1, media, media.astype(float) ** 2, media > 0)
    )
    samples, numbers, ends = planned(Samples(*three), 4096, seed)
    places, ends = even_packs(ends, samples.lengths, samples.costs(cost), 4096, seed)
    pack = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
    found = np.unique((numbers[places] // 3) * len(numbers) + pack) // len(numbers)
    return float((np.bincount(found, minlength=2000) < 3).mean())


def measure(name: str, cost: PackCost, epochs: int, seeds: int) -> Iterator[dict[str, object]]:
    """A row for each layout, the mean of all seeds."""
    from vlcpt.training.order import StepSampler

    found: dict[tuple[int, int], list[tuple[list[float], np.ndarray, np.ndarray]]] = {}
    about: dict[str, object] = {}
    for seed in range(seeds):
        draw, max_length = MIXES[name]
        before, _, ends = planned(draw(np.random.default_rng(seed)), max_length, seed)
        places, new_ends = even_packs(ends, before.lengths, before.costs(cost), max_length, seed)
        after = Samples(*(column[places] for column in before))
        old, new = sums(before.costs(cost), ends), sums(after.costs(cost), new_ends)
        about = {"packs": len(ends), "before": fullness(before, ends, max_length)}
        about["after"] = fullness(after, new_ends, max_length)
        for ranks, accumulation in LAYOUTS:
            kinds = kinds_of_packs(after.sources, after.lengths, new_ends, ranks * accumulation)
            sampler = StepSampler(new, kinds, ranks=ranks, batch=1, accumulation=accumulation, seed=seed)
            numbers, spread = [], ([], [])
            for epoch in range(epochs):
                shuffled = np.random.default_rng([seed, epoch]).permutation(len(old))
                sampler.set_epoch(epoch)
                order = np.array(list(sampler))
                numbers.append(
                    (*loads(old, shuffled, ranks, accumulation), *loads(new, order, ranks, accumulation))
                )
                spread[0].append(shares(before, ends, shuffled, ranks * accumulation))
                spread[1].append(shares(after, new_ends, order, ranks * accumulation))
            sds = [np.concatenate(one).std(axis=0) for one in spread]
            found.setdefault((ranks, accumulation), []).append((np.mean(numbers, axis=0).tolist(), *sds))
    for (ranks, accumulation), rows in found.items():
        means = np.mean([row[0] for row in rows], axis=0).round(4).tolist()
        ratio = np.mean([row[2] for row in rows], axis=0) / np.mean([row[1] for row in rows], axis=0)
        yield {
            "mix": name,
            "ranks": ranks,
            "accumulation": accumulation,
            "balance": [means[0], means[2]],
            "together": [means[1], means[3]],
            "spread_of_random": ratio.round(3).tolist(),
            **about,
        }


def seconds(cost: PackCost) -> dict[str, float]:
    """CPU time for a million samples."""
    from vlcpt.training.order import StepSampler

    rng = np.random.default_rng(0)
    lengths = np.concatenate([tokens(rng, 250, 500_000), tokens(rng, 1200, 500_000)])
    media = np.where(np.arange(1_000_000) < 500_000, lengths // 2, 0)
    samples = Samples(lengths, lengths - media, media, media.astype(float) ** 2, (media > 0).astype(int))
    times = [time.process_time()]
    samples, _, ends = planned(samples, 4096, 0)
    times.append(time.process_time())
    costs = samples.costs(cost)
    places, ends = even_packs(ends, samples.lengths, costs, 4096, 0)
    times.append(time.process_time())
    kinds = kinds_of_packs(samples.sources[places], samples.lengths[places], ends, 64)
    sampler = StepSampler(sums(costs[places], ends), kinds, ranks=64, batch=1, accumulation=1, seed=0)
    next(iter(sampler))
    times.append(time.process_time())
    names = ("planning", "balancing", "ordering")
    return {
        name: round(after - before, 2) for name, before, after in zip(names, times, times[1:], strict=False)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3, help="Plans of which each number is the mean.")
    parser.add_argument("--output", help="A file for the same as JSON.")
    given = parser.parse_args()
    costs, rows = shapes(), list[dict[str, object]]()
    for shape, cost in costs.items():
        for name in MIXES:
            for row in measure(name, cost, given.epochs, given.seeds):
                rows.append({"shape": shape, **row})
                print(json.dumps(rows[-1]), flush=True)
        rows.append({"shape": shape, "copies": float(np.median([copies(cost, one) for one in range(5)]))})
        print(json.dumps(rows[-1]), flush=True)
    rows.append({"seconds": seconds(costs["3B"])})
    print(json.dumps(rows[-1]), flush=True)
    if given.output:
        about = {"python": platform.python_version(), "numpy": np.__version__, "machine": platform.machine()}
        with open(given.output, "w", encoding="utf-8") as file:
            json.dump({**about, **vars(given), "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
