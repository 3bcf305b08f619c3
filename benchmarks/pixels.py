"""CPU time to load and collate documents with images, and bytes of a batch: the processor, and vlcpt.

    python benchmarks/pixels.py                          # the reference document, photos of 12 megapixels
    python benchmarks/pixels.py --quick --output x.json  # fewer documents and repetitions
    python benchmarks/pixels.py --plot pixels.svg        # where matplotlib is installed

The reference document has 3 JPEG files of 800×600 and 606 tokens of text. The photos have 4000×3000 pixels,
with the published pixel budget, which keeps nearly all of them, and with a budget of a million.

    processor    the files decoded by Pillow, then the processor on text and images: float32, frames doubled
    worker       vlcpt: a data set's item, then the collator as the trainer sets it: bytes, frames once
    in all       worker, then `scaled_pixels`, which the trainer calls on its device; here on the CPU as well

Both sides read the same files. Tokens, grids and pixels are compared first, to the bit; where they differ the
benchmark stops. One thread on one core, A B B A, CPU seconds of the process; ratios are taken pair by pair.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from machine import about, options, pin, save_bars

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from PIL import Image as PILImage

from vlcpt import CPTDataCollator, CPTDataset, load_processor
from vlcpt.data.encode.pixels import scaled_pixels
from vlcpt.demo import base_path

TEXT_TOKENS = 606  # a digit is a token
PUBLISHED = {"shortest_edge": 56 * 56, "longest_edge": 12_845_056}
Batch = Mapping[str, object]
Load = Callable[[int], Batch]
# images a document, their size, the pixel budget
CASES = {
    "3 JPEG files of 800×600": (3, (800, 600), PUBLISHED["longest_edge"]),
    "a photo of 12 megapixels": (1, (4000, 3000), PUBLISHED["longest_edge"]),
    "a photo of 12 megapixels, budget 1 million": (1, (4000, 3000), 1_003_520),
}


def photo(rng: np.random.Generator, size: tuple[int, int]) -> PILImage.Image:
    """A picture whose detail falls with its frequency as in photos, so that it decodes as slowly."""
    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    channels = []
    for _ in range(3):
        spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency**1.4
        values = np.fft.irfft2(spectrum, s=(height, width))
        channels.append((values - values.mean()) / values.std())
    grey = channels[0]
    mixed = [grey + 0.15 * one for one in channels]
    return PILImage.fromarray(np.stack([(128 + 48 * one).clip(0, 255) for one in mixed], 2).astype(np.uint8))


def write_documents(folder: Path, count: int, images: int, size: tuple[int, int]) -> list[dict[str, object]]:
    """Rows with their JPEG files: text before and after each image."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        names = []
        for place in range(images):
            names.append(f"{size[0]}-{number}-{place}.jpg")
            photo(rng, size).save(folder / names[-1], quality=85)
        digits = "".join(map(str, rng.integers(0, 10, TEXT_TOKENS - 1)))  # end-of-text is the last
        share = len(digits) // max(images, 1)
        text = "".join(f"<image>{digits[place * share : (place + 1) * share]}" for place in range(images))
        rows.append({"text": text + digits[images * share :], "images": names})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def by_processor(folder: Path, rows: Sequence[Mapping[str, object]], processor: object) -> Load:
    """What a collator does that calls the processor."""
    medium = "<|vision_start|><|image_pad|><|vision_end|>"
    texts = [row["text"].replace("<image>", medium) + "<|endoftext|>" for row in rows]

    def load(number: int) -> Batch:
        images = [PILImage.open(folder / name).convert("RGB") for name in rows[number]["images"]]
        return processor(text=[texts[number]], images=images, padding=True, return_tensors="pt")

    return load


def by_vlcpt(folder: Path, processor: object) -> tuple[Load, Load]:
    """A loader worker's part, and the same with what the trainer does on its device."""
    dataset = CPTDataset(str(folder / "rows.jsonl"), processor, max_length=32768, packing=False, num_proc=0)
    collator = CPTDataCollator(processor)
    dataset.keeps_bytes = collator.keeps_bytes = True
    collator.window_size = 112
    place = {name: number for number in range(len(dataset)) for name in dataset.names(number)}
    order = [place[name] for name in sorted(place, key=lambda one: int(one.rpartition(":")[2]))]

    def load(number: int) -> Batch:
        return collator([dataset[order[number]]])

    def in_all(number: int) -> Batch:
        batch = load(number)
        return {**batch, "pixel_values": scaled_pixels(batch["pixel_values"], collator.scales)}

    return load, in_all


def compare(sides: Mapping[str, Load], count: int) -> None:
    """End the program where tokens, grids or pixels differ."""
    for number in range(count):
        plain, ours = sides["processor"](number), sides["in all"](number)
        for name in ("input_ids", "image_grid_thw", "pixel_values"):
            if plain[name].dtype != ours[name].dtype or not torch.equal(plain[name], ours[name]):
                sys.exit(f"document {number}: {name} is not the processor's; no time is worth reading.")


def measure(sides: Mapping[str, Load], count: int, repetitions: int) -> dict[str, dict[str, list[float]]]:
    """CPU and wall milliseconds a document, of every second repetition in the opposite order."""
    found: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in sides}
    for repetition in range(repetitions):
        for name in reversed(sides) if repetition % 2 else sides:
            wall, cpu = time.perf_counter(), time.process_time()
            for number in range(count):
                sides[name](number)
            found[name]["cpu"].append((time.process_time() - cpu) / count * 1000)
            found[name]["wall"].append((time.perf_counter() - wall) / count * 1000)
    return found


def visual_tokens(batch: Batch) -> int:
    return int(batch["image_grid_thw"].prod(dim=1).sum()) // 4


def bytes_a_token(batch: Batch) -> dict[str, float]:
    """Bytes for each visual token: of the pixels, and of all tensors of the batch."""
    sizes = {name: one.nbytes for name, one in batch.items() if isinstance(one, torch.Tensor)}
    count = visual_tokens(batch)
    return {"pixels": sizes["pixel_values"] / count, "all": sum(sizes.values()) / count}


def run_case(name: str, count: int, repetitions: int) -> dict[str, object]:
    images, size, budget = CASES[name]
    processor = load_processor(base_path())
    processor.image_processor.size = {**PUBLISHED, "longest_edge": budget}
    with tempfile.TemporaryDirectory() as inside:
        folder = Path(inside)
        rows = write_documents(folder, count, images, size)
        kilobytes = sum(one.stat().st_size for one in folder.glob("*.jpg")) / (count * images) / 1000
        worker, in_all = by_vlcpt(folder, processor)
        sides = {"processor": by_processor(folder, rows, processor), "worker": worker, "in all": in_all}
        compare(sides, count)
        sizes = {one: bytes_a_token(sides[one](0)) for one in ("processor", "worker")}
        tokens = visual_tokens(sides["worker"](0))
        times = measure(sides, count, repetitions)
    plain = times["processor"]
    ratios = {
        side: {
            kind: sorted(a / b for a, b in zip(plain[kind], times[side][kind], strict=True))
            for kind in ("cpu", "wall")
        }
        for side in ("worker", "in all")
    }
    medians = {side: statistics.median(found["cpu"]) for side, found in times.items()}
    less = {one: sizes["processor"][one] / sizes["worker"][one] for one in ("pixels", "all")}
    shown = [
        f"{medians[side]:.1f} ms, {statistics.median(own['cpu']):.2f} "
        f"({own['cpu'][0]:.2f} to {own['cpu'][-1]:.2f})"
        for side, own in ratios.items()
    ]
    print(
        f"| {name} | {kilobytes:.0f} kB | {tokens:,} | {medians['processor']:.1f} ms | {' | '.join(shown)} "
        f"| {sizes['processor']['pixels']:,.0f}, {sizes['processor']['all']:,.0f} "
        f"| {sizes['worker']['pixels']:,.0f}, {sizes['worker']['all']:,.0f} "
        f"| {less['pixels']:.2f}, {less['all']:.2f} |",
        flush=True,
    )
    return {
        "case": name,
        "kilobytes": kilobytes,
        "visual_tokens": tokens,
        "cpu_ms": medians,
        "ratios": ratios,
        "bytes_per_visual_token": sizes,
        "times": times,
    }


def main() -> None:
    arguments = options(
        __doc__, each="every side once", quick="Three repetitions, fewer documents.", repetitions=10
    ).parse_args()
    pin()
    print(
        "| document | a file | visual tokens | processor | worker, ratio | in all, ratio "
        "| bytes a visual token, pixels and all: processor | worker | ratio |\n" + "|---" * 9 + "|"
    )
    rows = []
    for name, (images, _, _) in CASES.items():
        count = 1 if arguments.quick or images == 1 else 4
        rows.append(run_case(name, count, 3 if arguments.quick else arguments.repetitions))
    if arguments.output:
        arguments.output.write_text(json.dumps({**about(), "rows": rows}, indent=1) + "\n")
    if arguments.plot:
        bars = {side: [row["cpu_ms"][side] for row in rows] for side in ("processor", "worker", "in all")}
        save_bars(arguments.plot, list(CASES), bars, "CPU milliseconds a document")


if __name__ == "__main__":
    main()
