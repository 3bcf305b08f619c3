"""Print the table of docs/scale.md and docs/scale.zh.md: memory per device of each published size.

Run: python docs/make_memory_table.py. No weight is loaded: parameters are counted on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

from vlcpt.config.schema import ModelConfig
from vlcpt.model.counting import count_towers
from vlcpt.report.memory import LargestBatch, Setup, estimate_memory, shape_of

# hidden, intermediate, layers, heads, key heads, vocabulary, tied, the vision tower's intermediate
SIZES = {
    "3B": (2048, 11008, 36, 16, 2, 151_936, True, 3420),
    "7B": (3584, 18944, 28, 28, 4, 152_064, False, 3420),
    "32B": (5120, 27648, 64, 40, 8, 152_064, False, 3456),
    "72B": (8192, 29568, 80, 64, 8, 152_064, False, 3456),
}
BATCH = LargestBatch(rows=1, tokens=4096, targets=1500, patches=8192)
ZERO = {"narrow": True}
STAGES: dict[str, dict[str, object]] = {
    "none": {"autocast": True},
    "zero1": {"stage": 1, "overlaps": False, **ZERO},
    "zero2": {"stage": 2, **ZERO},
    "zero2_offload": {"stage": 2, "offload_optimizer": True, **ZERO},
    "zero3": {"stage": 3, **ZERO},
    "zero3_offload": {"stage": 3, "offload_optimizer": True, "offload_weights": True, **ZERO},
}
# Four bits and ZeRO-3 have not been run together.
WAYS = {"qlora": ("none", "zero1", "zero2"), "lora": tuple(STAGES), "full": tuple(STAGES)}
DEVICES = (1, 8, 64)


def published(size: str) -> Qwen2_5_VLConfig:
    """The shape of a published model; what does not change memory is left at its default."""
    hidden, intermediate, layers, heads, key_heads, vocabulary, tied, vision = SIZES[size]
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "vocab_size": vocabulary,
            "tie_word_embeddings": tied,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": vision,
            "num_heads": 16,
            "out_hidden_size": hidden,
        },
        tie_word_embeddings=tied,
    )


def heading() -> list[str]:
    """The first two lines of the table."""
    gpus = " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in DEVICES)
    return [f"| size | tuning | DeepSpeed | {gpus} | host |", "|---|---|---|" + "---:|" * (len(DEVICES) + 1)]


def lines(size: str) -> Iterator[str]:
    """The lines of one size."""
    config = published(size)
    shape = shape_of(config.text_config, config.vision_config)
    for tuning, names in WAYS.items():
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        towers = count_towers(model, ModelConfig("base", tuning=tuning))
        for name in names:
            setups = [Setup(devices=devices, **STAGES[name]) for devices in DEVICES]
            found = [estimate_memory(shape, towers, BATCH, setup) for setup in setups]
            cells = [f"{one.total / 2**30:,.1f}" for one in found]
            host = " / ".join(f"{one.host / 2**30:,.0f}" for one in found) if found[0].host else ""
            yield f"| {size} | {tuning} | {name} | {' | '.join(cells)} | {host} |"


def main() -> None:
    print(*heading(), sep="\n")
    for size in SIZES:
        print(*lines(size), sep="\n")


if __name__ == "__main__":
    main()
