"""Runs with ``vision_cache`` on two processes: ``torchrun --nproc_per_node 2 -m tests.training.cached_layouts
FOLDER NAME…``."""

import sys
from pathlib import Path

import torch

from tests.ranks import allow_deepspeed, forget_deepspeed
from tests.training.layouts import Run, mixed_rows, train
from vlcpt import CPTConfig, CPTDataCollator, CPTDataset, ModelConfig, load_model, load_processor
from vlcpt.errors import ConfigError
from vlcpt.model.vision_cache import with_features
from vlcpt.training.features import run_store
from vlcpt.training.step import sent

ROWS = 12


def fill(folder: Path, base: str) -> list[Path]:
    """Features of all media of the runs, computed by this process alone."""
    args = CPTConfig(output_dir=str(folder / "fill"), use_cpu=True, vision_cache=str(folder))
    model, processor = load_model(ModelConfig(base, lora_r=4)), load_processor(base)
    dataset = CPTDataset(mixed_rows(), processor, max_length=128, packing=False)
    dataset.use_features(run_store(model, args))
    collator = CPTDataCollator(processor)
    for item in dataset:
        with_features(model, sent(collator([item]), torch.device("cpu")), must_keep=True)
    return sorted(folder.rglob("*.safetensors"))


def main(folder: Path, names: list[str]) -> None:
    """Each run with and without its folder of features; what each did, in a file of each rank."""
    allow_deepspeed()
    rank = torch.distributed.get_rank()
    for name in names:
        for kind, cache in (("plain", None), ("kept", str(folder / f"cache of {name}"))):
            run = Run(name.partition(",")[0], rows=ROWS, settings={"vision_cache": cache})
            place = folder / f"{name} {kind}"
            try:
                found = train(run, place, base=str(folder / "base"), processes=2, evaluates=True)
            except ConfigError as error:
                if "missing" in name:  # in the middle of training, on one rank
                    raise
                found = {"error": str(error)}
                forget_deepspeed()
            torch.save(found, folder / f"{name}.{kind}.{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
