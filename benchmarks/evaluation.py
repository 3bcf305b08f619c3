"""What `vlcpt eval` of an adapter costs: a pass a loss, as before, and each batch once for all of them.

    python benchmarks/evaluation.py                          # five repetitions of A B B A
    python benchmarks/evaluation.py --quick --output x.json  # small images, two repetitions

The model and the documents are those of `step.py`: FLOPs that split between tower, language model and head as
in the 3B, and four documents of 3, 2, 1 and 0 images of 800×600, JPEG files that are decoded in the process.
Both sides measure right images, the base, another document's images and blank ones. Before, each of the four
read its batches by itself and ran the vision tower. After, a batch is read once for right images and for the
base, which share their features as the tower is frozen. All losses are compared to the bit first; another one
stops the benchmark. One thread on one core.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from machine import memory, options, pin
from step import PACK, write_base, write_documents
from torch.utils.data import DataLoader

from vlcpt import CPTDataCollator, CPTDataset, ModelConfig, load_model, load_processor
from vlcpt.training.evaluate import evaluate_sets
from vlcpt.training.loss import target_losses
from vlcpt.training.step import sent

LOSSES = {"loss": "document", "shuffled_images_loss": "next_document", "blank_images_loss": "blank"}


def one_pass(model: torch.nn.Module, dataset: CPTDataset, processor: object) -> float:
    """Nats per target of a set, read and scored by itself."""
    collator = CPTDataCollator(processor)
    collator.keeps_bytes = True
    collator.window_size = model.get_base_model().config.vision_config.window_size
    nll, targets = 0.0, 0
    with torch.no_grad():
        for batch in DataLoader(dataset, 1, collate_fn=collator):
            found = target_losses(model, sent(batch, torch.device("cpu"), collator.scales)).nll
            nll, targets = nll + float(found.double().sum()), targets + len(found)
    return nll / targets


def before(model: torch.nn.Module, dataset: CPTDataset, processor: object) -> dict[str, float]:
    """Four passes."""
    found = {
        name: one_pass(model, dataset.with_pixels_of(pixels), processor) for name, pixels in LOSSES.items()
    }
    with model.disable_adapter():
        return {**found, "base_loss": one_pass(model, dataset, processor)}


def after(model: torch.nn.Module, dataset: CPTDataset, processor: object) -> dict[str, float]:
    """What `vlcpt eval` runs."""
    found: Mapping[str, object] = evaluate_sets(model, {"set": dataset}, processor)["set"]
    return {name: float(str(found[name])) for name in (*LOSSES, "base_loss")}


def adapter(folder: Path) -> torch.nn.Module:
    """The base with an adapter on its language model that changes the loss."""
    model = load_model(ModelConfig(str(folder), lora_r=8)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def tower_calls(model: torch.nn.Module, run: Callable[[], object]) -> int:
    """How often a side runs the vision tower."""
    calls: list[None] = []
    hook = model.get_base_model().model.visual.register_forward_hook(lambda *_: calls.append(None))
    run()
    hook.remove()
    return len(calls)


def main() -> None:
    """Compare, measure, print."""
    arguments = options(
        __doc__, each="every side twice", quick="Images of 224×168, two repetitions.", plots=False
    ).parse_args()
    size, scale = ((224, 168), 4) if arguments.quick else ((800, 600), 1)
    pin()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_base(folder)
        write_documents(folder, size, scale)
        processor, model = load_processor(str(folder)), adapter(folder)
        dataset = CPTDataset(folder / "rows.jsonl", processor, max_length=PACK, packing=False)
        sides = {one.__name__: lambda one=one: one(model, dataset, processor) for one in (before, after)}
        losses = {side: run() for side, run in sides.items()}
        if losses["before"] != losses["after"] or len(set(losses["after"].values())) < len(losses["after"]):
            sys.exit(f"the losses differ, or none does: {losses}; no time is worth reading.")
        calls = {side: tower_calls(model, run) for side, run in sides.items()}
        times: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(2 if arguments.quick else arguments.repetitions):
            for side in ("before", "after", "after", "before"):
                wall, cpu = time.perf_counter(), time.process_time()
                sides[side]()
                spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
                times[side].append(spent)
    found = {"torch": torch.__version__, "losses": losses["after"], "tower calls": calls, "times": times}
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"losses, equal to the bit: {losses['after']}\ncalls of the vision tower: {calls}")
    for kind in ("cpu", "wall"):
        pairs = [one[kind] / other[kind] for one, other in zip(times["before"], times["after"], strict=True)]
        seconds = {side: statistics.median(one[kind] for one in times[side]) for side in times}
        print(
            f"{kind}: before {seconds['before']:.2f} s, after {seconds['after']:.2f} s, ratio "
            f"{statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})"
        )
    print(f"peak memory of the process: {memory() / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
