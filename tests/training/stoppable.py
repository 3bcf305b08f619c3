"""A run in a process of its own, to be sent signals: ``python -m tests.training.stoppable FOLDER …``."""

import json
import os
import sys
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from tests.support import TEN, make_trainer
from vlcpt import CPTDataset, ModelConfig, load_model, load_processor
from vlcpt.__main__ import _leave


class Progress(TrainerCallback):
    """Tells of each step, and takes its time in it."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self._folder = folder
        self._seconds = seconds

    def on_step_begin(self, args, state, control, **kwargs):
        (self._folder / f"began-{state.global_step + 1}.{args.process_index}").touch()
        time.sleep(self._seconds)

    def on_step_end(self, args, state, control, **kwargs):
        (self._folder / f"ended-{state.global_step}.{args.process_index}").touch()


def main(folder: Path, settings: dict[str, object]) -> None:
    """Train. The settings: ``base``, ``tuning``, ``workers``, ``seconds`` of a step, ``steps`` …"""
    if settings.get("deepspeed"):
        from tests.ranks import allow_deepspeed

        allow_deepspeed()
    (folder / f"pid.{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
    base = settings["base"]
    processor = load_processor(base)
    dataset = CPTDataset(TEN, processor, max_length=256, packing=False)
    torch.manual_seed(0)
    model = load_model(ModelConfig(base, tuning=settings.get("tuning", "lora")))
    more = {name: one for name, one in settings.items() if name.startswith("save_")}
    if settings.get("deepspeed"):
        more |= {"use_cpu": False, "deepspeed": settings["deepspeed"], "dataloader_pin_memory": False}
    trainer = make_trainer(
        model,
        dataset,
        processor,
        folder / "out",
        max_steps=settings.get("steps", 5),
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        ddp_timeout=60,
        dataloader_num_workers=settings.get("workers", 0),
        callbacks=[Progress(folder, settings.get("seconds", 0))],
        **more,
    )
    trainer.train(resume_from_checkpoint=settings.get("resume"))
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    _leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
