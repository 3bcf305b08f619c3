"""Counts the looks at the device of whole runs on two ranks, under each engine.

``torchrun --nproc_per_node 2 -m tests.invariants.looking_ranks FOLDER BASE``
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers.trainer_utils import TrainOutput

from tests.looks import Looks
from tests.ranks import allow_deepspeed, forget_deepspeed
from tests.support import TEN, make_trainer
from vlcpt import CPTDataset, ModelConfig, load_model, load_processor
from vlcpt.training import ranks, step
from vlcpt.training import trainer as trainer_module
from vlcpt.training.progress import RunProgress

RUNS = ("ddp", "zero2", "zero3", "ddp without gloo")
STEPS = 3


def train(name: str, folder: Path, base: str) -> dict[str, object]:
    """Train for some steps of two micro-batches; who looked, and the losses."""
    engine = name.split()[0]
    settings = {
        "use_cpu": engine == "ddp",
        "deepspeed": None if engine == "ddp" else engine,
        "dataloader_pin_memory": False,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "logging_steps": 1,
        "ddp_timeout": 60,
    }
    processor = load_processor(base)
    dataset = CPTDataset(TEN, processor, max_length=70, packing=False)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        looks = Looks(patch)
        # All that these look at is a batch as the loader made it; the device is everything else.
        for owner, function in (
            (trainer_module, "read_step"),
            (step, "total_weight"),
            (RunProgress, "count"),
            (trainer_module, "sent"),
        ):
            looks.leave_out(patch, owner, function)
        if "without gloo" in name:
            break_gloo(patch)
        trainer = make_trainer(
            load_model(ModelConfig(base, tuning="full")), dataset, processor, folder, **settings
        )
        train_steps = trainer._inner_training_loop
        looks.is_on = False

        def watched(*args: object, **kwargs: object) -> TrainOutput:
            begin(trainer, looks)
            return train_steps(*args, **kwargs)

        patch.setattr(trainer, "_inner_training_loop", watched)
        with looks:
            trainer.train()
    forget_deepspeed()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"ours": looks.ours, "all": looks.lines, "losses": losses}


def begin(trainer: object, looks: Looks) -> None:
    """Count from the first batch on: what is checked once before step 1 is no look of a step."""
    given = trainer.get_batch_samples

    def counted(*args: object) -> object:
        looks.is_on = True
        return given(*args)

    trainer.get_batch_samples = counted


def break_gloo(patch: pytest.MonkeyPatch) -> None:
    """Let rank 1 find no network interface, so that rank 0 waits for it."""
    ranks._host_group.cache_clear()
    patch.setattr(ranks, "_MEETING", 2.0)
    if torch.distributed.get_rank() == 1:

        def refuse(**kwargs: object) -> None:
            raise RuntimeError("Unable to find address for: eth7")

        patch.setattr(torch.distributed, "new_group", refuse)


def main(folder: Path, base: str) -> None:
    """Each run in turn, in the same two processes; what each did, in a file of each rank."""
    allow_deepspeed()
    rank = torch.distributed.get_rank()
    found = {name: train(name, folder / name, base) for name in RUNS}
    (folder / f"looks.{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
