"""Peak memory of ``vlcpt merge`` against the size of the model.

    python benchmarks/merge_memory.py                  # random weights of the 3B's shapes, in bfloat16
    python benchmarks/merge_memory.py --layers 2       # with fewer layers in the language tower

Each merge runs in a process of its own, and its peak is the kernel's (VmHWM). Pages of the base's mapped file
are in it, although the kernel can drop them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from machine import memory

# What trains, and how.
WAYS: dict[str, dict[str, bool]] = {
    "lora": {},
    "lora on all towers, dora": {"train_vision": True, "train_merger": True, "use_dora": True},
    "lora and embeddings": {"train_embeddings": True},
}


def make(folder: Path, layers: int, ways: int) -> int:
    """Write a base and an adapter of each way; gives the base's bytes."""
    import torch
    from shapes_3b import write_base

    from vlcpt.config.schema import ModelConfig
    from vlcpt.model.loading import load_base
    from vlcpt.model.tuning import apply_tuning

    base = folder / "base"
    size = write_base(base, layers=layers)
    for number, way in enumerate(list(WAYS.values())[:ways]):
        tuned = apply_tuning(load_base(str(base)), ModelConfig("base", **way))
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.01)
        tuned.save_pretrained(folder / f"adapter-{number}")
    return size


def merge(folder: Path, number: int) -> None:
    """One merge in this process."""
    from vlcpt.model.merge import merge_adapter

    before = memory()
    start = time.monotonic()
    done = merge_adapter(folder / f"adapter-{number}", folder / "merged", max_shard_size="5GB")
    seconds = time.monotonic() - start
    print(json.dumps({"libraries": before, "peak": memory(), "seconds": seconds, "effect": done.effect}))


def measure(layers: int) -> list[dict[str, object]]:
    """Each way in a fresh process: bytes of the model, of libraries and at the peak, seconds."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    with TemporaryDirectory() as name:
        command = [sys.executable, __file__, "--folder", name, "--layers", str(layers)]
        made = subprocess.run(
            [*command, "--make", str(len(WAYS))], capture_output=True, text=True, env=environment
        )
        if made.returncode:
            raise RuntimeError(made.stderr)
        size = int(made.stdout.split()[-1])
        rows = []
        for number, way in enumerate(WAYS):
            done = subprocess.run(
                [*command, "--merge", str(number)], capture_output=True, text=True, env=environment
            )
            if done.returncode:
                raise RuntimeError(done.stderr)
            rows.append({"way": way, "model": size, **json.loads(done.stdout.splitlines()[-1])})
            for file in Path(name, "merged").iterdir():
                file.unlink()
        return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--folder", type=Path, help="for --make and --merge")
    parser.add_argument(
        "--make", type=int, metavar="WAYS", help="write the base, and adapters of so many ways"
    )
    parser.add_argument("--merge", type=int, help="merge the adapter of this number")
    arguments = parser.parse_args()
    if arguments.make:
        print(make(arguments.folder, arguments.layers, arguments.make))
        return
    if arguments.merge is not None:
        merge(arguments.folder, arguments.merge)
        return
    print("| adapter | model | libraries | peak | peak without libraries / model | time |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in measure(arguments.layers):
        model, libraries, peak = (int(str(row[key])) for key in ("model", "libraries", "peak"))
        print(
            f"| {row['way']} | {model / 2**30:.2f} GiB | {libraries / 2**30:.2f} GiB "
            f"| {peak / 2**30:.2f} GiB | {(peak - libraries) / model:.2f} | {row['seconds']:.0f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
