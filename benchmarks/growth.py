"""How cost grows with documents, with the length of packs and with images a document, as exponents.

    python benchmarks/growth.py                           # some minutes
    python benchmarks/growth.py --full                    # a million documents, packs of 32,768
    python benchmarks/growth.py --quick --output x.json   # 10,000 documents, packs of 4,096, 4 images
    python benchmarks/growth.py --plot growth.svg         # where matplotlib is installed

    documents       planning of 10³ to 10⁵ texts of 230 characters with a span, in one process
    packs           forward, backward and optimizer of the small model of benchmarks/step.py on packs of 1,024
                    to 16,384 tokens in documents of 1,024, LoRA on the language model, every sixth a target
    one document    the same where one document fills the pack, to 8,192
    images          loading of a document with 0 to 16 images of 800×600: item and collator, as in a worker

CPU seconds of the process, one thread on one core; the least of the repetitions, and fewer of these where one
takes long. An exponent is the slope of log cost over log size by least squares: over all sizes, and over the
two largest, where what a run does once weighs least. Of images, the cost without any is taken off first.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from machine import about, pin, save_lines
from pixels import PUBLISHED, by_vlcpt, write_documents
from step import write_base

from vlcpt import CPTDataCollator, CPTDataset, ModelConfig, load_model, load_processor
from vlcpt.demo import base_path
from vlcpt.training.loss import target_losses
from vlcpt.training.step import sent

LONG = 8.0  # CPU seconds from which a measurement is not repeated
DOCUMENT = 1024


def least(measured: Callable[[], object], repetitions: int) -> float:
    """CPU seconds of the fastest run."""
    found: list[float] = []
    while len(found) < repetitions and sum(found) < LONG:
        start = time.process_time()
        measured()
        found.append(time.process_time() - start)
    return min(found)


def documents(counts: Sequence[int], repetitions: int) -> dict[int, float]:
    """Planning of so many texts."""
    draw, processor = random.Random(0), load_processor(base_path())
    words = ["valve", "pump", "seal", "pressure", "motor", "gauge", "filter", "shaft", "bearing", "oil"]
    found = {}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "rows.jsonl"
        for count in counts:
            with path.open("w") as file:
                for _ in range(count):
                    context, target = (" ".join(draw.choices(words, k=length)) for length in (14, 19))
                    text = f"{context} <trainable_text>{target}</trainable_text>"
                    file.write(json.dumps({"text": text}) + "\n")
            found[count] = least(
                lambda: CPTDataset(str(path), processor, max_length=4096, num_proc=0), repetitions
            )
    return found


def packs(sizes: Sequence[int], repetitions: int, *, one_document: bool) -> dict[int, float]:
    """A step on a pack of so many tokens."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_base(folder)
        processor = load_processor(str(folder))
        model = load_model(ModelConfig(str(folder), dtype="float32")).train()
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])
        for size in sizes:
            length = size if one_document else DOCUMENT
            # A digit is a token; the end of the text is one more, and a target.
            digits = "7" * (length - 1 - length // 6)
            row = {"text": f"{digits}<trainable_text>{'3' * (length // 6)}</trainable_text>"}
            dataset = CPTDataset([row] * (size // length), processor, max_length=size)
            assert len(dataset) == 1 and dataset.pack_sizes()[0, 0] == size
            batch = sent(CPTDataCollator(processor)([dataset[0]]), torch.device("cpu"))

            def step(inputs: Mapping[str, object] = batch) -> None:
                target_losses(model, inputs).nll.mean().backward()
                optimizer.step()
                optimizer.zero_grad()

            if size == sizes[0]:
                step()
            found[size] = least(step, repetitions)
    return found


def images(counts: Sequence[int], repetitions: int) -> dict[int, float]:
    """Loading of a document with so many images."""
    processor = load_processor(base_path())
    processor.image_processor.size = PUBLISHED
    found = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            write_documents(Path(name), 1, count, (800, 600))
            load, _ = by_vlcpt(Path(name), processor)
            load(0)
            found[count] = least(lambda load=load: load(0), repetitions)
    return found


def slope(points: Sequence[tuple[float, float]]) -> float:
    """By least squares, of logarithms.

    >>> round(slope([(1, 3), (2, 12), (4, 48)]), 6)
    2.0
    """
    places, values = ([math.log(one[part]) for one in points] for part in (0, 1))
    centre = sum(places) / len(places)
    spread = sum((one - centre) ** 2 for one in places)
    return sum((one - centre) * value for one, value in zip(places, values, strict=True)) / spread


def exponents(found: Mapping[int, float]) -> tuple[float, float]:
    """Over all sizes, and over the two largest; a cost at size 0 is taken off."""
    points = [(size, cost - found.get(0, 0)) for size, cost in found.items() if size]
    return slope(points), slope(points[-2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="Smaller sizes, one repetition.")
    parser.add_argument("--full", action="store_true", help="Ten times the documents, twice the pack.")
    parser.add_argument("--output", type=Path, help="JSON with every time.")
    parser.add_argument("--plot", type=Path, help="A picture of the growth; needs matplotlib.")
    arguments = parser.parse_args()
    pin()
    quick, repetitions = arguments.quick, 1 if arguments.quick else arguments.repetitions
    more = int(arguments.full)
    powers = [2**power * 1024 for power in range(6)]
    costs = {
        "images": lambda: images([0, 1, 2, 4] if quick else [0, 1, 2, 4, 8, 16], repetitions * 3),
        "packs": lambda: packs(powers[: 3 if quick else 5 + more], repetitions, one_document=False),
        "one document": lambda: packs(powers[: 2 if quick else 4], repetitions, one_document=True),
        "documents": lambda: documents([10**one for one in range(3, 5 if quick else 6 + more)], repetitions),
    }
    print("| what grows | CPU seconds at each size | exponent | of the two largest |\n|---|---|---|---|")
    rows = {}
    for name, measured in costs.items():
        found = measured()
        over_all, last = exponents(found)
        rows[name] = {"seconds": found, "exponent": over_all, "of_the_two_largest": last}
        sizes = ", ".join(f"{size:,}: {cost:.3g}" for size, cost in found.items())
        print(f"| {name} | {sizes} | {over_all:.2f} | {last:.2f} |", flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps({**about(), "rows": rows}, indent=1) + "\n")
    if arguments.plot:
        lines = {
            name: {size: cost for size, cost in row["seconds"].items() if size} for name, row in rows.items()
        }
        save_lines(arguments.plot, lines, ("documents, tokens of a pack, or images", "CPU seconds"))


if __name__ == "__main__":
    main()
