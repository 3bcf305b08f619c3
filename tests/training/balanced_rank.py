"""A rank that trains on balanced packs, and goes on from the middle of the epoch; see test_order.py."""

import sys
from pathlib import Path

import torch

from tests.support import digits, make_trainer, png, row
from vlcpt import CPTDataset, ModelConfig, load_model, load_processor

# Images of other sizes, so that packs of one length cost more or less.
ROWS = [
    *(row(f"<image> <trainable_text>{digits(3 + n, n)}</trainable_text>", images=[png(n, 28 * (1 + n % 4))])
      for n in range(20)),
    *(row(f"page <trainable_text>{digits(4 + n, n)}</trainable_text>.") for n in range(38)),
]  # fmt: skip
PER_STEP, STEPS = 4, 6


class Read(CPTDataset):
    """Keeps the numbers of the items that were read."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.read: list[int] = []

    def __getitem__(self, number: int) -> object:
        self.read.append(number)
        return super().__getitem__(number)


def train(folder: Path, base: str, *, ranks: int = 1, resumes: bool = False, **settings: object) -> list[int]:
    """The items of one pass, or of its second half, read after a resume."""
    processor = load_processor(base)
    dataset = Read(ROWS, processor, max_length=64)
    assert len(dataset) == PER_STEP * STEPS
    trainer = make_trainer(
        load_model(ModelConfig(base, lora_r=4), seed=1),
        dataset,
        processor,
        folder,
        num_train_epochs=1,
        gradient_accumulation_steps=PER_STEP // ranks,
        save_strategy="steps",
        save_steps=1,
        **settings,
    )
    assert trainer.args.world_size == ranks
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS // 2}") if resumes else None)
    return dataset.read


if __name__ == "__main__":
    here = Path(sys.argv[1])
    found = [train(here / "run", str(here / "base"), ranks=2, resumes=one) for one in (False, True)]
    torch.save(found, here / f"read.{torch.distributed.get_rank()}.pt")
