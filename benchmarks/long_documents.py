"""Time of an epoch over one long text, split at 4,096 tokens, against the same text in short documents.

    python benchmarks/long_documents.py                         # 0.25, 0.5 and 1 MB, three pairs each
    python benchmarks/long_documents.py --megabytes 4 --output x.json

An epoch is the planning of a data set and the reading of all of its items, in one process on one core. Both
sides must train equally many tokens, but for the end-of-text of each short document.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from pathlib import Path

from machine import pin

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as vlcpt's commands do

from vlcpt import CPTDataset, load_processor
from vlcpt.demo import base_path

LENGTH = 4096
SHORT = 2000  # characters


def epoch(rows: list[dict[str, str]], processor: object) -> tuple[float, int]:
    """Seconds of CPU, and targets."""
    start = time.process_time()
    dataset = CPTDataset(rows, processor, max_length=LENGTH)  # type: ignore[arg-type]
    targets = sum(
        int((sample.labels >= 0).sum()) for number in range(len(dataset)) for sample in dataset[number]
    )
    return time.process_time() - start, targets


def measure(megabytes: float, pairs: int, processor: object) -> dict[str, float]:
    """Medians of both sides, and of the ratio pair by pair."""
    words = ["valve", "pump", "seal", "pressure", "motor", "gauge", "filter", "shaft", "bearing", "oil"]
    draw = random.Random(0)
    text = ""
    while len(text) < megabytes * 1e6:
        text += " ".join(draw.choice(words) for _ in range(200)) + ". "
    one = [{"text": text}]
    many = [{"text": text[start : start + SHORT]} for start in range(0, len(text), SHORT)]
    long, short = [], []
    for pair in range(pairs):
        for side in ("long", "short") if pair % 2 == 0 else ("short", "long"):
            seconds, targets = epoch(one if side == "long" else many, processor)
            (long if side == "long" else short).append(seconds)
            print(f"{megabytes} MB {side}: {seconds:.2f} s, {targets} targets", flush=True)
    ratios = [a / b for a, b in zip(long, short, strict=True)]
    return {
        "megabytes": megabytes,
        "long_seconds": statistics.median(long),
        "short_seconds": statistics.median(short),
        "ratio": statistics.median(ratios),
    }


def main() -> None:
    """Measure each size, and print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    pin()
    processor = load_processor(base_path())
    found = [measure(size, args.pairs, processor) for size in args.megabytes]
    text = json.dumps(found, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
