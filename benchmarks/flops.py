"""FLOPs of a LoRA step at the shapes of the 3B and the 7B, and what a frozen vision tower costs backward.

    python benchmarks/flops.py                   # both shapes; no weights, a minute
    python benchmarks/flops.py --quick           # the 3B alone
    python benchmarks/flops.py --output x.json --plot flops.svg

A step is the reference document: 3 images of 800×600 (609 tokens each) and 606 tokens of text, of which 400
are targets; LoRA on the language model, activation checkpointing, eager attention on all sides, because torch
counts its products. The models are on the meta device: their own forward passes run, and nothing is computed.

    plain           transformers: logits at all places, checkpointing as transformers turns it on, everywhere
    vlcpt           the loss at the targets, checkpointing off in the frozen tower
    vision cache    the same, features of the images given

All are counted in float32: the type does not change the counts, and 16 bits halve what is saved. Saved bytes
are those that autograd keeps while tower and merger run; backward of the tower is that of the step, less that
of a step on given features. The benchmark stops where the tower's forward pass is not the same on both sides.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from machine import about, save_bars
from shapes_3b import TEXT, TEXT_7B, VISION, VISION_7B
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from vlcpt import ModelConfig
from vlcpt.model.tuning import apply_tuning, base_model, limit_checkpointing
from vlcpt.training.loss import Targets, target_losses

SHAPES = {"3B": (TEXT, VISION), "7B": (TEXT_7B, VISION_7B)}
GRID, IMAGES = (1, 42, 58), 3  # 800×600: 21 × 29 = 609 tokens
TEXT_TOKENS, TARGETS = 606, 400
IMAGE_TOKENS = GRID[0] * GRID[1] * GRID[2] // 4
TOKENS = IMAGES * (IMAGE_TOKENS + 2) + TEXT_TOKENS
REACH = {"3B": {"vision cache": 0.62, "vlcpt": 0.75}, "7B": {"vision cache": 0.77, "vlcpt": 0.84}}


def build(shape: str) -> nn.Module:
    """A model without weights, with adapters, in training, with checkpointing."""
    text, vision = SHAPES[shape]
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=text["tie_word_embeddings"]
    )
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="eager")
        model = apply_tuning(model, ModelConfig("base")).to("meta").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    # Placeholders are found by looking at the ids, which are nothing here.
    inner = base_model(model).model
    inner.get_placeholder_mask = lambda ids, *_, **__: (ids.bool()[..., None],) * 2
    return model


def batch() -> dict[str, object]:
    """The reference document without values; where the tower's windows begin is given, as by the collator."""
    grids = torch.tensor([GRID] * IMAGES)
    index, windows = get_vision_window_index(grids, spatial_merge_size=2, window_size=112, patch_size=14)
    with torch.device("meta"):
        ids = torch.empty(1, TOKENS, dtype=torch.long)
        return {
            "input_ids": ids,
            "position_ids": torch.empty(3, 1, TOKENS, dtype=torch.long),
            "pixel_values": torch.empty(IMAGES * IMAGE_TOKENS * 4, 3 * 2 * 14 * 14),
            "image_grid_thw": grids,
            "image_position_ids": get_vision_position_ids(grids, 2).to("meta"),
            "image_cu_seqlens": get_vision_cu_seqlens(grids),
            "image_window_index": index.to("meta"),
            "image_cu_window_seqlens": windows,
            "use_cache": False,
        }


def without_images(inputs: dict[str, object], width: int) -> dict[str, object]:
    """The same with features in place of pixels."""
    features = tuple(torch.empty(IMAGE_TOKENS, width, device="meta") for _ in range(IMAGES))
    rest = {name: one for name, one in inputs.items() if name not in ("pixel_values", "image_grid_thw")}
    rest = {name: one for name, one in rest.items() if not name.startswith("image_")}
    return {**rest, "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}}


def plain_loss(model: nn.Module, inputs: dict[str, object]) -> torch.Tensor:
    """As Trainer has it of transformers: logits of all places."""
    return model(**inputs, labels=torch.empty(1, TOKENS, dtype=torch.long, device="meta")).loss


def our_loss(model: nn.Module, inputs: dict[str, object]) -> torch.Tensor:
    """As the trainer of vlcpt has it: of the targets alone."""
    with torch.device("meta"):
        numbers = (torch.empty(TARGETS, dtype=torch.long) for _ in range(3))
        places, ids, rows = numbers
        targets = Targets(places, ids, torch.empty(TARGETS), rows)
    # torch has no autocast for this device, and says so even where it is to be off.
    with patch.multiple(
        "torch", is_autocast_enabled=lambda *_: False, autocast=lambda *_, **__: nullcontext()
    ):
        found = target_losses(model, {**inputs, "targets": targets})
    return (found.nll * found.weights).sum()


@contextmanager
def saved_by_tower(model: nn.Module) -> Iterator[list[int]]:
    """Bytes of each tensor that autograd keeps meanwhile for the tower and the merger."""
    kept: list[int] = []
    hooks: list[saved_tensors_hooks] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.nbytes)
        return tensor

    def begin(*_: object) -> None:
        hooks.append(saved_tensors_hooks(note, lambda one: one))
        hooks[-1].__enter__()

    def end(*_: object) -> None:
        hooks.pop().__exit__(None, None, None)

    visual = base_model(model).model.visual
    handles = [visual.register_forward_pre_hook(begin), visual.register_forward_hook(end)]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


Loss = Callable[[nn.Module, dict[str, object]], torch.Tensor]


def count(model: nn.Module, loss_of: Loss, inputs: dict[str, object]) -> dict[str, float]:
    """FLOPs forward and backward, those of the tower forward, and bytes saved for it."""
    model.zero_grad()
    with FlopCounterMode(display=False) as forward, saved_by_tower(model) as kept:
        loss = loss_of(model, inputs)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    by_module = forward.get_flop_counts()
    tower = next((sum(one.values()) for name, one in by_module.items() if name.endswith(".visual")), 0)
    return {
        "forward": forward.get_total_flops(),
        "backward": backward.get_total_flops(),
        "tower_forward": tower,
        "saved_bytes": sum(kept),
    }


def measure(shape: str) -> dict[str, dict[str, float]]:
    """Counts of each side."""
    inputs = batch()
    given = without_images(inputs, SHAPES[shape][0]["hidden_size"])
    model = build(shape)
    found = {"plain": count(model, plain_loss, inputs)}
    found["plain"]["tower_backward"] = (
        found["plain"]["backward"] - count(model, plain_loss, given)["backward"]
    )
    limit_checkpointing(model)
    found["vlcpt"] = count(model, our_loss, inputs)
    found["vision cache"] = count(model, our_loss, given)
    found["vlcpt"]["tower_backward"] = found["vlcpt"]["backward"] - found["vision cache"]["backward"]
    found["vision cache"]["tower_backward"] = 0
    if found["plain"]["tower_forward"] != found["vlcpt"]["tower_forward"]:
        sys.exit(
            f"{shape}: the tower's forward pass is another one on both sides; no count is worth reading."
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="The shapes of the 3B alone.")
    parser.add_argument("--output", type=Path, help="JSON with every count.")
    parser.add_argument("--plot", type=Path, help="A picture of the counts; needs matplotlib.")
    arguments = parser.parse_args()
    assert IMAGE_TOKENS == 609
    print(
        "| shape | side | step, TFLOP | of plain | reach | tower forward | tower backward | over its forward "
        "| saved for it |\n" + "|---" * 9 + "|"
    )
    rows = {}
    for shape in ["3B"] if arguments.quick else SHAPES:
        rows[shape] = measure(shape)
        plain = rows[shape]["plain"]["forward"] + rows[shape]["plain"]["backward"]
        reach = REACH[shape]
        for side, one in rows[shape].items():
            total = one["forward"] + one["backward"]
            back, ahead = one["tower_backward"] / 1e12, one["tower_forward"] / 1e12
            print(
                f"| {shape} | {side} | {total / 1e12:.1f} | {total / plain:.3f} | {reach.get(side, '')} "
                f"| {ahead:.2f} | {back:.2f} | {back / ahead if ahead else 0:.2f} "
                f"| {one['saved_bytes'] / 2**20:,.0f} MiB |",
                flush=True,
            )
    if arguments.output:
        arguments.output.write_text(json.dumps({**about(), "tokens": TOKENS, "rows": rows}, indent=1) + "\n")
    if arguments.plot:
        sides = ("plain", "vlcpt", "vision cache")
        bars = {
            side: [(one[side]["forward"] + one[side]["backward"]) / 1e12 for one in rows.values()]
            for side in sides
        }
        save_bars(arguments.plot, list(rows), bars, "TFLOP of a step")


if __name__ == "__main__":
    main()
