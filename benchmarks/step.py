"""Targets a second of whole LoRA steps, loading included: plain Trainer and vlcpt, on a small model.

    python benchmarks/step.py                          # five repetitions
    python benchmarks/step.py --quick --output x.json  # small images, two repetitions
    python benchmarks/step.py --plot step.svg          # where matplotlib is installed

A step is four documents of 3, 2, 1 and 0 images of 800×600 (609 tokens each); the largest has 606 tokens of
text, 400 of them targets, the others have text in proportion. The sides:

    batch 1        Trainer, the processor in the collator, four batches of one document
    batch 4        the same, one padded batch
    grouped        the same, two batches of like lengths, checkpointing off in the frozen vision tower
    TRL            SFTTrainer, four batches of one document, its loss in chunks; where trl is installed
    vlcpt          packs of 4,096, as `vlcpt train` makes them
    vision cache   the same, features of the images read from the folder that an earlier step filled

All sides have the same weights, LoRA on the language model, documents, pixel budget and optimizer, and
activation checkpointing, as models of that size need it on a GPU (--keep_activations: none has it). Images
are JPEG files, decoded in the process, without workers, so that their time counts. It runs from the begin of
training to the end of its only step: what a run does once is left out. Targets and losses of that step are
compared first, which also runs everything but the backward pass once; a difference stops the benchmark. One
thread on one core; every other repetition runs the sides in the opposite order. Where others use the machine,
read CPU time.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from machine import about, options, pin, save_bars
from PIL import Image as PILImage
from rich.console import Console
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from vlcpt import CPTConfig, CPTDataset, CPTTrainer, ModelConfig, load_model, load_processor
from vlcpt.data.encode.encoder import IGNORE_INDEX
from vlcpt.data.encode.pixels import pixel_scales
from vlcpt.demo import base_path
from vlcpt.model.tuning import limit_checkpointing
from vlcpt.training.loss import target_losses
from vlcpt.training.step import sent

try:
    from trl import SFTConfig, SFTTrainer
except ImportError:  # its own extra here: it is one side of several
    SFTTrainer = None

# Multiply-adds of the linear layers for the largest document, forward, in 10⁹ (2,439 tokens, 1,827 of them
# of images, 7,308 patches; the head at every token, as Trainer runs it):
#
#                    3B                                       here
#   vision tower     7308 · 32 · 19.7M + 1827 · 36.7M = 4674  7308 · 5 · 308k + 1827 · 573k = 12.3  (38%)
#   language model   2439 · 36 · 77.1M                = 6769  2439 · 6 · 1.25M              = 18.3  (56%)
#   head             2439 · 311M                      =  759  2439 · 811k                   =  2.0   (6%)
#
# Attention itself grows with the width and linear layers with its square, so that it weighs about eight times
# as much here as in the 3B, which favours whatever makes it cheaper. The head has no more entries than that
# takes: the demo's tokens are the first thousand.
TEXT = {
    "vocab_size": 3168,
    "hidden_size": 256,
    "intermediate_size": 1376,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    "tie_word_embeddings": True,
}
VISION = {
    "depth": 5,
    "hidden_size": 160,
    "intermediate_size": 428,
    "num_heads": 2,
    "out_hidden_size": 256,
    "tokens_per_second": 2,
    "window_size": 112,
    "fullatt_block_indexes": [4],
}
IMAGES = (3, 2, 1, 0)  # of the four documents; the one without has the text of one image
CONTEXT, TARGETS = 206, 400  # text tokens of the largest document
TOLERANCE = 1e-5  # of the loss, relative: float32 in another order
PACK = 4096


# --- model and documents ---


def write_base(folder: Path) -> None:
    """The small model with random weights, and the demo's processor with the published pixel budget."""
    processor = load_processor(base_path())
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 12_845_056}
    ids = processor.tokenizer.convert_tokens_to_ids
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=TEXT,
        vision_config=VISION,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


@dataclass(frozen=True)
class Row:
    """A document as parts: digits, which are a token each, and whether they are targets."""

    parts: tuple[tuple[str, bool], ...]  # context, target, context, target …
    images: tuple[Path, ...]  # one between each context and its target, or none

    def joined(self, image: str, opening: str, closing: str) -> str:
        """The text with a marker for images, and one before and after each target."""
        media = image if self.images else ""
        return "".join(
            f"{opening}{text}{closing}" if trained else f"{text}{media}" for text, trained in self.parts
        )

    def paths(self) -> list[str]:
        return [str(path) for path in self.images]

    def flags(self) -> list[bool]:
        """Whether each text token is a target, end-of-text included."""
        return [*(trained for text, trained in self.parts for _ in text), True]


def write_documents(folder: Path, size: tuple[int, int], scale: int) -> list[Row]:
    """Seeded documents with their JPEG files, and ``rows.jsonl`` with the markup of vlcpt."""
    rng = np.random.default_rng(0)
    rows = []
    for number, images in enumerate(IMAGES):
        paths = []
        for place in range(images):
            coarse = rng.integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
            paths.append(folder / f"{number}-{place}.jpg")
            PILImage.fromarray(coarse).resize(size, PILImage.Resampling.BICUBIC).save(paths[-1], quality=90)
        runs = max(images, 1)
        parts = []
        for place in range(runs):
            for total, trained in ((CONTEXT, False), (TARGETS, True)):
                total = round(total * runs / max(IMAGES) / scale)
                count = total * (place + 1) // runs - total * place // runs
                count -= trained and place == runs - 1  # end-of-text is the last target
                parts.append(("".join(map(str, rng.integers(0, 10, count))), trained))
        rows.append(Row(tuple(parts), tuple(paths)))
    lines = [
        {
            "text": row.joined("<image>", "<trainable_text>", "</trainable_text>"),
            "images": [path.name for path in row.images],
        }
        for row in rows
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return rows


def plain_dataset(rows: Sequence[Row]) -> datasets.Dataset:
    """Rows by number, with what Trainer groups by, and TRL knows images by."""
    return datasets.Dataset.from_list(
        [
            {"number": number, "length": len(row.flags()) + 611 * len(row.images), "images": row.paths()}
            for number, row in enumerate(rows)
        ]
    )


def plain_collator(
    processor: object, known: Sequence[Row]
) -> Callable[[Sequence[Mapping[str, int]]], Mapping[str, torch.Tensor]]:
    """What one writes for Trainer: the processor on text and images, labels -100 outside the targets."""
    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
    vision = torch.tensor(processor.tokenizer.convert_tokens_to_ids(list(names)))

    def collate(items: Sequence[Mapping[str, int]]) -> Mapping[str, torch.Tensor]:
        rows = [known[item["number"]] for item in items]
        medium = "<|vision_start|><|image_pad|><|vision_end|>"
        images = [PILImage.open(path).convert("RGB") for row in rows for path in row.images]
        batch = processor(
            text=[row.joined(medium, "", "") + "<|endoftext|>" for row in rows],
            images=images or None,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        ids = batch["input_ids"]
        is_text = batch["attention_mask"].bool() & ~torch.isin(ids, vision)
        labels = torch.full_like(ids, IGNORE_INDEX)
        is_target = torch.tensor([flag for row in rows for flag in row.flags()])
        labels[is_text] = torch.where(is_target, ids[is_text], IGNORE_INDEX)
        return {**batch, "labels": labels}

    return collate


# --- the sides ---


class Clock(TrainerCallback):
    """CPU and wall seconds from the begin of training to the end of its step."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.cpu, self.wall = time.process_time() - self.cpu, time.perf_counter() - self.wall


@dataclass
class Side:
    """One way to train a step: makes a trainer of its own for each."""

    name: str
    make: Callable[[], Trainer]

    def step(self) -> dict[str, float]:
        """Seconds of one step."""
        trainer, clock = self.make(), Clock()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)  # the last one: it begins after all others have
        gc.collect()
        trainer.train()
        assert trainer.state.global_step == 1
        return {"cpu": clock.cpu, "wall": clock.wall}

    def first_loss(self) -> tuple[list[tuple[int, ...]], float, int]:
        """Target ids of each document, Σ nll / targets, and places of the batches, padding included."""
        trainer = self.make()
        documents: list[tuple[int, ...]] = []
        nll, places = 0.0, 0
        for batch in trainer.get_train_dataloader():
            batch.pop("documents", None)
            labels = batch["labels"]
            places += labels.numel()
            lengths = batch.get("document_lengths", [labels.shape[1]] * len(labels))
            for part in labels.flatten().split(lengths):
                ids = part[part != IGNORE_INDEX]
                documents += [tuple(ids.tolist())] if len(ids) else []
            with torch.no_grad():
                if isinstance(trainer, CPTTrainer):
                    batch = sent(batch, labels.device, pixel_scales(trainer.processing_class))
                    nll += float(target_losses(trainer.model, batch).nll.double().sum())
                else:
                    nll += float(trainer.model(**batch).loss.double()) * int((labels != IGNORE_INDEX).sum())
        return sorted(documents), nll / sum(map(len, documents)), places


SHARED = {
    "max_steps": 1,
    "learning_rate": 1e-4,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_num_workers": 0,
    "logging_strategy": "no",
}


def make_sides(folder: Path, rows: list[Row], *, checkpointing: bool) -> list[Side]:
    """All sides that can run here; each keeps its model from step to step."""
    processor = load_processor(str(folder))
    plain_rows, collate = plain_dataset(rows), plain_collator(processor, rows)
    shared = {**SHARED, "output_dir": str(folder / "out"), "activation_checkpointing": checkpointing}

    def model(attention: str) -> torch.nn.Module:
        torch.manual_seed(0)  # the adapters
        return load_model(ModelConfig(str(folder), dtype="float32", attn_implementation=attention))

    def arguments(size: int) -> dict[str, object]:
        return {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": len(rows) // size,
            "remove_unused_columns": False,
            **shared,
        }

    def plain(name: str, size: int) -> Side:
        own, args = model("sdpa"), TrainingArguments(**arguments(size))
        return Side(name, lambda: Trainer(own, args, collate, train_dataset=plain_rows))

    def grouped() -> Side:
        own = model("sdpa")
        if checkpointing:
            own.activation_checkpointing_enable({"use_reentrant": False})
            limit_checkpointing(own)
        # Trainer would turn it on for the tower again.
        given = {
            **arguments(2),
            "activation_checkpointing": False,
            "train_sampling_strategy": "group_by_length",
        }
        args = TrainingArguments(**given)
        return Side("grouped", lambda: Trainer(own, args, collate, train_dataset=plain_rows))

    def by_trl() -> Side:
        own = model("sdpa")
        given = arguments(1)
        # Its configuration has the older name, which is on by default.
        given["gradient_checkpointing"] = given.pop("activation_checkpointing")
        args = SFTConfig(**given, max_length=None, bf16=False)
        return Side(
            "TRL",
            lambda: SFTTrainer(
                own, args, collate, train_dataset=plain_rows, processing_class=load_processor(str(folder))
            ),
        )

    def packed(name: str, **more: str) -> Side:
        own = model("auto")
        dataset = CPTDataset(str(folder / "rows.jsonl"), processor, max_length=PACK)
        args = CPTConfig(
            per_device_train_batch_size=1,
            gradient_accumulation_steps=len(dataset),
            max_length=PACK,
            **shared,
            **more,
        )
        quiet = Console(quiet=True)
        return Side(
            name,
            lambda: CPTTrainer(own, args, train_dataset=dataset, processing_class=processor, console=quiet),
        )

    sides = [plain("batch 1", 1), plain("batch 4", 4), grouped()]
    if SFTTrainer is None:
        print("TRL is left out: trl is not installed.", file=sys.stderr)
    else:
        sides.append(by_trl())
    return [*sides, packed("vlcpt"), packed("vision cache", vision_cache=str(folder / "features"))]


def compare(sides: Sequence[Side]) -> tuple[int, dict[str, object]]:
    """Targets of a step, and what was compared; ends the program where sides differ."""
    found = {side.name: side.first_loss() for side in sides}
    documents, loss, _ = found[sides[0].name]
    for name, (others, other, _) in found.items():
        if others != documents:
            sys.exit(f"{name}: the targets are not those of {sides[0].name}; no speed is worth reading.")
        if not abs(other - loss) <= TOLERANCE * loss:
            sys.exit(f"{name}: the loss is {other:.7f}, not {loss:.7f}; no speed is worth reading.")
    report = {name: {"loss": one[1], "places": one[2]} for name, one in found.items()}
    return sum(map(len, documents)), report


def print_table(
    times: Mapping[str, list[dict[str, float]]], targets: int, compared: dict[str, object]
) -> None:
    """A row a side: its cost over that of vlcpt without and with the cache, pair by pair."""
    print(
        "| side | loss of the first step | places | CPU of a step | targets per CPU second "
        "| CPU, over vlcpt | over vision cache | wall, over vlcpt |\n" + "|---" * 8 + "|"
    )
    for name, found in times.items():
        cpu = statistics.median(one["cpu"] for one in found)

        def over(other: str, kind: str, mine: list[dict[str, float]] = found) -> str:
            ratios = sorted(a[kind] / b[kind] for a, b in zip(mine, times[other], strict=True))
            return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"

        print(
            f"| {name} | {compared[name]['loss']:.7f} | {compared[name]['places']:,} | {cpu:.2f} s "
            f"| {targets / cpu:.1f} | {over('vlcpt', 'cpu')} | {over('vision cache', 'cpu')} "
            f"| {over('vlcpt', 'wall')} |"
        )


def main() -> None:
    parser = options(__doc__, each="every side once", quick="Images of 224×168, two repetitions.")
    parser.add_argument("--keep_activations", action="store_true", help="No activation checkpointing.")
    arguments = parser.parse_args()
    size, scale = ((224, 168), 4) if arguments.quick else ((800, 600), 1)
    repetitions = 2 if arguments.quick else arguments.repetitions
    pin()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_base(folder)
        rows = write_documents(folder, size, scale)
        sides = make_sides(folder, rows, checkpointing=not arguments.keep_activations)
        targets, compared = compare(sides)
        print(f"{targets} targets a step\n", flush=True)
        times: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
        found = {**about(), "targets": targets, "compared": compared, "times": times}
        for number in range(repetitions):
            for side in reversed(sides) if number % 2 else sides:
                times[side.name].append(side.step())
            if arguments.output:
                arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    print_table(times, targets, compared)
    if arguments.plot:
        medians = [statistics.median(one["cpu"] for one in own) for own in times.values()]
        save_bars(arguments.plot, list(times), {"CPU seconds of a step": medians}, "seconds")


if __name__ == "__main__":
    main()
