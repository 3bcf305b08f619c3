"""Runs on two processes that are interrupted after half of their steps, and go on.

``torchrun --nproc_per_node 2 -m tests.training.resumed_layouts FOLDER``
"""

import shutil
import sys
from pathlib import Path

import torch

from tests.ranks import allow_deepspeed, forget_deepspeed
from tests.training.layouts import FULL, LANGUAGE, Run, train

LORA = {"lora_r": 4, "train_merger": True, "lora_towers": ("language",)}  # the merger in full
SAVES = {"save_strategy": "steps", "save_steps": 3}
STEPS = 6  # two rows each
RUNS = {
    f"{engine} {name}": Run(engine, model, rows=2 * STEPS, settings=SAVES)
    for engine in ("ddp", "zero1", "zero2", "zero3")
    for name, model in (("full", FULL), ("lora", LORA))
}
# DeepSpeed converts the weights when it wraps them: the base is in float32, as a full run leaves it.
CONVERTED = {
    f"{engine} {name}, bf16": Run(
        engine, {**model, "dtype": "float32"}, rows=2 * STEPS, settings={**SAVES, "bf16": True}
    )
    for engine, name, model in (
        *((engine, "lora", LORA) for engine in ("zero1", "zero2", "zero3")),
        *((engine, "full, language alone", LANGUAGE) for engine in ("zero2", "zero3")),
    )
}
# One process saved after step 3, and two go on.
FROM_ONE = {name: run for name, run in RUNS.items() if run.engine == "ddp"}


def interrupt(output: Path) -> None:
    """Take away what was saved at the end, as if the run had been killed before."""
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(output / f"checkpoint-{STEPS}")
    torch.distributed.barrier()


def main(folder: Path) -> None:
    """Each run whole, and then again from its half; then those that one process began."""
    allow_deepspeed()
    rank, base = torch.distributed.get_rank(), str(folder / "base")
    for name, run in (RUNS | CONVERTED).items():
        whole = train(run, folder / name, base=base, processes=2)
        interrupt(folder / name)
        resumed = train(run, folder / name, base=base, processes=2, resume=True)
        torch.save({"whole": whole, "resumed": resumed}, folder / f"{name}.{rank}.pt")
    for name, run in FROM_ONE.items():
        resumed = train(run, folder / f"one {name}", base=base, processes=2, resume=True)
        torch.save(resumed, folder / f"one {name}.{rank}.pt")
    forget_deepspeed()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
