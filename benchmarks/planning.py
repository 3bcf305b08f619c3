"""Time of a planning pass, which counts tokens from headers, against encoding all documents to count them.

    python benchmarks/planning.py                           # five repetitions
    python benchmarks/planning.py --quick --output x.json   # fewer documents, two repetitions
    python benchmarks/planning.py --plot planning.svg       # where matplotlib is installed

    processor    what tools do that know a document's length from encoding it: files decoded, processor called
    vlcpt        `CPTDataset(…)` on the same rows in one process: plan and ledger included

Timed are reference documents: 3 JPEG files of 800×600 and 606 tokens of text. Counted are these and 150
documents with images of other sizes, shapes and modes, PNG files among them: numbers of tokens must be equal
in all of them, or the benchmark stops. One thread on one core, A B B A, CPU time of the process.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from machine import about, options, pin, save_bars
from PIL import Image as PILImage
from pixels import PUBLISHED, by_processor, write_documents

from vlcpt import CPTDataset, load_processor
from vlcpt.demo import base_path

MODES = ("RGB", "L", "RGBA", "P", "CMYK")


def write_shapes(folder: Path, count: int) -> list[dict[str, object]]:
    """Documents with one to three images of random sizes and modes."""
    rng = np.random.default_rng(1)
    rows = []
    for number in range(count):
        names = []
        for place in range(int(rng.integers(1, 4))):
            width, height = np.exp(rng.uniform(np.log(12), np.log(1400), 2)).astype(int).tolist()
            width, height = max(width, height // 100), max(height, width // 100)
            mode = MODES[int(rng.integers(len(MODES)))]
            kind = "jpg" if mode in ("CMYK", "L") else "png"
            names.append(f"shape-{number}-{place}.{kind}")
            PILImage.new(mode, (width, height), 77).save(folder / names[-1])
        digits = "".join(map(str, rng.integers(0, 10, int(rng.integers(5, 60)))))
        rows.append({"text": "<image>" * len(names) + digits, "images": names})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def planned(folder: Path, processor: object) -> list[int]:
    """Tokens of each document, in the order of the rows."""
    dataset = CPTDataset(str(folder / "rows.jsonl"), processor, max_length=65536, packing=False, num_proc=0)
    sizes = dataset.pack_sizes()[:, 0].tolist()
    found = {int(dataset.names(number)[0].rpartition(":")[2]): size for number, size in enumerate(sizes)}
    return [found[line] for line in sorted(found)]


def encoded(folder: Path, rows: Sequence[dict[str, object]], processor: object) -> list[int]:
    """The same from the processor's tokens."""
    load = by_processor(folder, rows, processor)
    return [load(number)["input_ids"].shape[1] for number in range(len(rows))]


def compare(folder: Path, rows: Sequence[dict[str, object]], processor: object) -> int:
    """Equal counts; ends the program where one differs."""
    ours, plain = planned(folder, processor), encoded(folder, rows, processor)
    off = [number for number, pair in enumerate(zip(ours, plain, strict=True)) if pair[0] != pair[1]]
    if off:
        sys.exit(f"document {off[0]}: {ours[off[0]]} tokens planned, {plain[off[0]]} encoded.")
    return len(ours)


def main() -> None:
    arguments = options(
        __doc__, each="both sides once", quick="Eight documents, two repetitions."
    ).parse_args()
    pin()
    files, copies, shapes = (4, 2, 20) if arguments.quick else (8, 15, 150)
    repetitions = 2 if arguments.quick else arguments.repetitions
    processor = load_processor(base_path())
    processor.image_processor.size = PUBLISHED
    times: dict[str, list[float]] = {"processor": [], "vlcpt": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        equal = compare(folder, write_shapes(folder, shapes), processor)
        rows = write_documents(folder, files, 3, (800, 600)) * copies
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        equal += compare(folder, rows, processor)
        sides = {
            "processor": lambda: encoded(folder, rows, processor),
            "vlcpt": lambda: planned(folder, processor),
        }
        for repetition in range(repetitions):
            for side in reversed(sides) if repetition % 2 else sides:
                start = time.process_time()
                sides[side]()
                times[side].append((time.process_time() - start) / len(rows) * 1000)
    ratios = sorted(a / b for a, b in zip(times["processor"], times["vlcpt"], strict=True))
    medians = {side: statistics.median(found) for side, found in times.items()}
    print(
        "| documents with equal counts | processor, CPU a document | vlcpt | ratio |\n|---|---|---|---|\n"
        f"| {equal} of {equal} | {medians['processor']:.1f} ms | {medians['vlcpt']:.2f} ms "
        f"| {statistics.median(ratios):.0f} ({ratios[0]:.0f} to {ratios[-1]:.0f}) |"
    )
    if arguments.output:
        found = {**about(), "equal": equal, "cpu_ms": medians, "ratios": ratios, "times": times}
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.plot:
        bars = {side: [value] for side, value in medians.items()}
        save_bars(arguments.plot, ["a reference document"], bars, "CPU milliseconds")


if __name__ == "__main__":
    main()
