"""Checkpoints and broken numbers under ZeRO-2, one after the other in one process; what came of each.

``torchrun --nproc_per_node 1 -m tests.training.zero_checkpoints FOLDER``
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from tests.ranks import allow_deepspeed, forget_deepspeed
from tests.support import FOUR, make_trainer
from vlcpt import CPTDataset, CPTTrainer, ModelConfig, load_model, load_processor
from vlcpt.training import trainer as trainer_module
from vlcpt.training.checkpoints.files import MANIFEST, list_checkpoints, verify, write_manifest
from vlcpt.training.loss import target_losses


class Bomb:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, int, bool]]:
        return os.makedirs, (self.path, 0o755, True)


def make(folder: Path, base: str, steps: int, **settings: object) -> CPTTrainer:
    """A trainer that saves each step."""
    processor = load_processor(base)
    dataset = CPTDataset(FOUR, processor, max_length=256, packing=False)
    defaults = {
        "use_cpu": False,
        "deepspeed": "zero2",
        "dataloader_pin_memory": False,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": steps,
    }
    # As CPTConfig is made first in a script: under ZeRO a model may be cut while it is loaded.
    torch.manual_seed(0)
    model = load_model(ModelConfig(base, tuning="full"))
    return make_trainer(model, dataset, processor, folder, **(defaults | settings))


def attempt(trainer: CPTTrainer, resume: bool | str | None = None) -> str:
    """How training ends."""
    try:
        trainer.train(resume_from_checkpoint=resume)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        forget_deepspeed()
    return "done"


def plant(checkpoint: Path, ran: Path) -> None:
    """Put a program into the states of a checkpoint, and make its manifest anew."""
    (states,) = checkpoint.rglob("*model_states.pt")
    content = torch.load(states, weights_only=False)
    torch.save({**content, "more": Bomb(str(ran))}, states)
    write_manifest(checkpoint, json.loads((checkpoint / MANIFEST).read_text())["run"])


def weights(trainer: CPTTrainer) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in trainer.model.named_parameters()}


def names(folder: Path) -> list[str]:
    return [one.name for one in list_checkpoints(folder)]


def broken_loss(trainer: CPTTrainer) -> Callable[[], None]:
    """Make the second loss infinite, with gradients that are finite."""
    calls = []

    def losses(model, inputs, chunk):  # type: ignore[no-untyped-def]
        found = target_losses(model, inputs, chunk)
        calls.append(1)
        return found._replace(nll=found.nll + float("inf")) if len(calls) == 2 else found

    trainer_module.target_losses = losses
    return lambda: setattr(trainer_module, "target_losses", target_losses)


def main(folder: Path, base: str) -> None:
    """All of it."""
    found: dict[str, object] = {}
    whole = make(folder / "whole", base, 3)
    found["whole"] = attempt(whole)
    found["files"] = sorted(verify(folder / "whole/checkpoint-3").files)

    attempt(make(folder / "own", base, 2))
    resumed = make(folder / "own", base, 3)
    found["resumed"] = attempt(resumed, True)
    expected = weights(whole)
    found["equal"] = all(torch.equal(one, expected[name]) for name, one in weights(resumed).items())

    ran = folder / "ran"
    shutil.copytree(folder / "own/checkpoint-2", folder / "foreign/checkpoint-2")
    found["foreign"] = attempt(make(folder / "own", base, 4), str(folder / "foreign/checkpoint-2"))
    found["foreign, trusted"] = attempt(
        make(folder / "third", base, 4, trust_checkpoint=True), str(folder / "foreign/checkpoint-2")
    )
    plant(folder / "own/checkpoint-3", ran)
    found["planted, by path"] = attempt(make(folder / "own", base, 4), str(folder / "own/checkpoint-3"))
    found["planted"] = attempt(make(folder / "own", base, 4), True)
    found["ran"] = ran.exists()
    shutil.copytree(folder / "whole", folder / "copy")
    plant(folder / "copy/checkpoint-3", ran)
    with suppress(TypeError):  # what the program leaves may be no state
        attempt(make(folder / "copy", base, 4, trust_checkpoint=True), True)
    found["ran, trusted"] = ran.exists()

    trainer = make(folder / "loss", base, 3)
    mend = broken_loss(trainer)
    before = attempt(trainer)
    mend()
    found["loss"] = before
    found["loss, saved"] = names(folder / "loss")
    found["loss, finite weights"] = all(bool(one.isfinite().all()) for one in trainer.model.parameters())

    trainer = make(folder / "gradient", base, 3, max_grad_norm=0)
    calls = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * float("nan") if len(calls) == 2 else gradient

    trainer.model.lm_head.weight.register_hook(spoil)
    found["gradient"] = attempt(trainer)
    found["gradient, saved"] = names(folder / "gradient")
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    allow_deepspeed()
    main(Path(sys.argv[1]), sys.argv[2])
