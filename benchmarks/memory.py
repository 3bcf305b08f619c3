"""Peak memory of real training steps on a CPU against the estimate of ``vlcpt check``.

    python benchmarks/memory.py            # all cases, each in a fresh process
    python benchmarks/memory.py --case N   # one of them, here

The model is random, of middle size, in the proportions of the 3B. Peaks are the kernel's (VmHWM, reset
after imports), less what the process held then. glibc gives freed blocks back at once
(MALLOC_MMAP_THRESHOLD_), as an allocator of a GPU reuses them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

from machine import memory

# tuning, frozen dtype, bf16 autocast, checkpointing, attention, tokens, images, more
CASES = [
    ("lora", "bfloat16", False, False, "sdpa", 1024, 1, {}),
    ("lora", "bfloat16", True, False, "sdpa", 2048, 3, {}),
    ("lora", "bfloat16", True, True, "sdpa", 2048, 3, {}),
    ("lora", "float32", False, True, "sdpa", 2048, 0, {}),
    ("lora", "float32", False, False, "eager", 1024, 1, {}),
    ("lora", "bfloat16", True, True, "sdpa", 4096, 8, {}),
    ("lora", "bfloat16", True, False, "sdpa", 1024, 2, {"train_vision": True, "train_merger": True}),
    ("full", "bfloat16", True, False, "sdpa", 1024, 1, {}),
    ("full", "bfloat16", True, True, "sdpa", 2048, 3, {}),
    ("full", "float32", False, True, "sdpa", 1024, 1, {}),
    ("full", "float32", False, False, "sdpa", 1024, 1, {}),
    ("full", "bfloat16", True, False, "sdpa", 2048, 3, {"train_vision": True, "train_merger": True}),
    ("full", "bfloat16", True, True, "sdpa", 1024, 2, {"train_vision": True, "train_merger": True}),
    ("qlora", "bfloat16", True, True, "sdpa", 2048, 3, {}),
]
GRID = (32, 32)  # patches of an image: 256 tokens


def run_case(number: int) -> dict[str, object]:
    """Train two steps; what was held at most, and what was foreseen."""
    import torch

    from vlcpt.config.schema import ModelConfig
    from vlcpt.model.tuning import apply_tuning, limit_checkpointing, tower_table
    from vlcpt.report.memory import LargestBatch, Setup, estimate_memory, shape_of
    from vlcpt.training.loss import target_losses

    tuning, dtype, autocast, checkpointing, attention, tokens, images, more = CASES[number]
    torch.manual_seed(0)
    torch.set_num_threads(2)
    config = _config(attention)
    batch = _batch(tokens, images)
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))  # libraries settle
    base = memory("VmRSS")
    _reset_peak()
    model = _build(config, getattr(torch, dtype), tuning)
    built = memory("VmHWM")
    model = apply_tuning(model, ModelConfig("base", tuning=tuning, **more))
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        limit_checkpointing(model)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    _reset_peak()
    phases = {}
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = target_losses(model, batch).nll.mean()
        phases["forward"] = memory("VmHWM") - base
        loss.backward()
        phases["backward"] = memory("VmHWM") - base
        optimizer.step()
        phases["step"] = memory("VmHWM") - base
        phases["after"] = memory("VmRSS") - base
        optimizer.zero_grad()
    setup = Setup(
        weight_bytes=2 if dtype == "bfloat16" else 4,
        autocast=autocast,
        checkpointing=checkpointing,
        attention=attention,
    )
    largest = LargestBatch(1, tokens, tokens - images * 258 - 1, images * GRID[0] * GRID[1])
    shape = shape_of(config.text_config, config.vision_config)
    found = estimate_memory(shape, _towers(config, getattr(torch, dtype), tuning, more), largest, setup)
    peak = memory("VmHWM") - base
    return {
        "case": CASES[number],
        "parameters": sum(row.total for row in tower_table(model)),
        "peak": peak,
        "estimate": found.total,
        "off": found.total / peak - 1,
        "moment": found.moment,
        "parts": {key: value for key, value in vars(found).items() if key != "moment"},
        "built": built - base,
        **phases,
    }


def _towers(config: object, dtype: object, tuning: str, more: dict[str, bool]) -> dict[str, object]:
    """Parameters as ``check`` counts them: without the model."""
    import torch
    from transformers import AutoModelForImageTextToText

    from vlcpt.config.schema import ModelConfig
    from vlcpt.model.counting import count_towers

    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return count_towers(empty, ModelConfig("base", tuning=tuning, **more))


def _config(attention: str) -> object:
    from transformers import Qwen2_5_VLConfig

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 32_000,
            "hidden_size": 768,
            "intermediate_size": 4096,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6},
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 12,
            "hidden_size": 480,
            "intermediate_size": 1284,
            "num_heads": 8,
            "out_hidden_size": 768,
            "tokens_per_second": 2,
            "window_size": 112,
            "fullatt_block_indexes": [2, 5, 8, 11],
        },
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
        tie_word_embeddings=False,
    )
    config._attn_implementation = attention
    return config


def _build(config: object, dtype: object, tuning: str) -> object:
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        attention = config._attn_implementation
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=attention)
    finally:
        torch.set_default_dtype(default)
    if tuning != "qlora":
        return model
    from tempfile import TemporaryDirectory

    from vlcpt.model.loading import load_base

    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        gc.collect()  # modules refer to each other
        model = load_base(folder, dtype="bfloat16", in_4_bits=True)
    # The checkpoint's file is mapped, and its pages count as the process's; a GPU has none of that.
    for parameter in model.parameters():
        if getattr(parameter, "quant_state", None) is None:
            parameter.data = parameter.data.clone()
    gc.collect()
    return model


def _batch(tokens: int, images: int) -> dict[str, object]:
    import torch

    ids = torch.randint(10, 32_000, (1, tokens))
    media = GRID[0] * GRID[1] // 4
    place = 0
    for _ in range(images):
        ids[0, place] = 7
        ids[0, place + 1 : place + 1 + media] = 5
        ids[0, place + 1 + media] = 8
        place += media + 2
    labels = ids.clone()
    labels[0, : place + 1] = -100
    positions = torch.arange(tokens)[None, None].repeat(4, 1, 1)
    positions[0, :, tokens - 100 :] -= tokens - 100  # two documents
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions, "use_cache": False}
    if images:
        batch["pixel_values"] = torch.randn(images * GRID[0] * GRID[1], 1176)
        batch["image_grid_thw"] = torch.tensor([[1, *GRID]] * images)
    return batch


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", type=int)
    case = parser.parse_args().case
    if case is not None:
        print(json.dumps(run_case(case)))
        return
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_THRESHOLD_": "65536"}
    print(
        "| tuning | frozen | autocast | checkpointing | attention | tokens | images | also "
        "| peak | foreseen | off |"
    )
    print("|---" * 11 + "|")
    for number in range(len(CASES)):
        run = subprocess.run(
            [sys.executable, __file__, "--case", str(number)], capture_output=True, text=True, env=environment
        )
        if run.returncode:
            sys.exit(run.stderr)
        found = json.loads(run.stdout.splitlines()[-1])
        *cells, more = found["case"]
        print(
            f"| {' | '.join(map(str, cells))} | {', '.join(more)} | {found['peak'] / 2**20:,.0f} MiB "
            f"| {found['estimate'] / 2**20:,.0f} MiB | {found['off']:+.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
