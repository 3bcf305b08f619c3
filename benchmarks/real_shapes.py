"""One LoRA and one QLoRA step of the 3B's shapes on a CPU, against the memory that ``vlcpt check`` foresees.

    python benchmarks/real_shapes.py                                  # 16 GiB of memory, 8 GB of disk
    python benchmarks/real_shapes.py --layers 1 --blocks 2 --tuning lora

The weights are random, the configuration is the published one: 36 layers, 32 vision blocks, 151,936 tokens.
Model, data, trainer and estimate are those of ``vlcpt train`` and ``vlcpt check``. Each step has a process of
its own; its peak is the kernel's (VmHWM), reset when the step begins, less what the process held before the
model was loaded. glibc gives freed blocks back at once (MALLOC_MMAP_THRESHOLD_), as a GPU's allocator reuses
them. In float32, because few CPUs multiply bfloat16 backward in useful time; --dtype bfloat16 is for those.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from machine import memory

CONFIG = """
model_name_or_path: base
tuning: {tuning}
train_data: train.jsonl
output_dir: out-{tuning}
max_length: {tokens}
max_steps: 1
learning_rate: 1e-4
dtype: {dtype}
bf16: {bf16}
use_cpu: true
activation_checkpointing: true
dataloader_num_workers: 0
save_strategy: "no"
report_to: none
"""


def write_data(folder: Path, tokens: int) -> None:
    """One document that fills a pack: an image of 16 tokens, then text."""
    from PIL import Image

    Image.new("RGB", (112, 112), "teal").save(folder / "image.png")
    # Digits are tokens of their own; besides: the image's start and end, and the end of the text.
    text = ("0123456789" * tokens)[: tokens - 16 - 2 - 1]
    row = {"text": f"<image><trainable_text>{text}</trainable_text>", "images": ["image.png"]}
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")


def run_step(folder: Path, tuning: str, tokens: int, dtype: str) -> dict[str, object]:
    """Train a step as ``vlcpt train`` does; what was held at most, and what was foreseen."""
    import torch
    from transformers import TrainerCallback

    from vlcpt import CPTTrainer, load_model, load_processor
    from vlcpt.config.yaml import load_config
    from vlcpt.model.counting import count_towers, empty_model
    from vlcpt.runs.data import RunData
    from vlcpt.runs.memory import foresee

    config = folder / f"{tuning}.yaml"
    config.write_text(
        CONFIG.format(tuning=tuning, tokens=tokens, dtype=dtype, bf16=str(dtype == "bfloat16").lower())
    )
    configs = load_config(config)
    processor = load_processor(configs.model.model_name_or_path)
    dataset = RunData(configs, processor).train()
    merge = processor.image_processor.merge_size**2
    packs = dataset.pack_sizes()
    empty = empty_model(configs.model)
    towers = count_towers(empty, configs.model)
    found = foresee(configs, empty, towers, packs, devices=1, merge=merge)["as configured"]
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))  # libraries settle
    gc.collect()
    held = memory("VmRSS")
    model = load_model(configs.model)
    # The checkpoint's files are mapped, and their pages count as the process's; a GPU has none of that.
    for parameter in model.parameters():
        if getattr(parameter, "quant_state", None) is None:
            parameter.data = parameter.data.clone()
    gc.collect()
    loaded = memory("VmRSS") - held
    peaks: list[int] = []

    class Peak(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")

        def on_step_end(self, *_: object, **__: object) -> None:
            peaks.append(memory("VmHWM") - held)

    trainer = CPTTrainer(
        model, configs.training, train_dataset=dataset, processing_class=processor, callbacks=[Peak()]
    )
    start = time.monotonic()
    loss = trainer.train().training_loss
    return {
        "tuning": tuning,
        "tokens": int(packs[0, 0]),
        "targets": int(packs[0, 1]),
        "parameters": sum(p.numel() for p in empty_model(configs.model).parameters()),
        "loaded": loaded,
        "peak": peaks[0],
        "estimate": found.total,
        "off": found.total / peaks[0] - 1,
        "parts": {key: value for key, value in vars(found).items() if key != "moment"},
        "moment": found.moment,
        "loss": loss,
        "seconds": time.monotonic() - start,
    }


def measure(tuning: str, folder: Path, *options: str) -> dict[str, object]:
    """A step in a fresh process; the base is written first if it is not there."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--folder", str(folder), *options]
    made = (folder / "base" / "config.json").is_file()
    for step in [["--step", tuning]] if made else [["--make"], ["--step", tuning]]:
        done = subprocess.run([*command, *step], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tuning", choices=("lora", "qlora"))
    parser.add_argument("--folder", type=Path, help="where the base is kept; default: a temporary folder")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        from shapes_3b import write_base

        write_base(arguments.folder / "base", layers=arguments.layers, blocks=arguments.blocks)
        write_data(arguments.folder, arguments.tokens)
        return
    if arguments.step:
        print(json.dumps(run_step(arguments.folder, arguments.step, arguments.tokens, arguments.dtype)))
        return
    print("| tuning | parameters | tokens | targets | peak | foreseen | off | moment | time of the step |")
    print("|---|---:|---:|---:|---:|---:|---:|---|---:|")
    with TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        for tuning in [arguments.tuning] if arguments.tuning else ["lora", "qlora"]:
            options = (
                f"--{name}={getattr(arguments, name)}" for name in ("layers", "blocks", "tokens", "dtype")
            )
            found = measure(tuning, folder, *options)
            print(
                f"| {tuning} | {found['parameters']:,} | {found['tokens']} | {found['targets']} "
                f"| {found['peak'] / 2**20:,.0f} MiB | {found['estimate'] / 2**20:,.0f} MiB "
                f"| {found['off']:+.1%} | {found['moment']} | {found['seconds']:.0f} s |",
                flush=True,
            )
            print(json.dumps(found), file=sys.stderr)


if __name__ == "__main__":
    main()
