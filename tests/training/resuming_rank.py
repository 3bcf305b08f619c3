"""A rank that trains, and goes on from its checkpoint in the same process; started by test_resuming.py."""

import sys
from pathlib import Path

import torch

from tests.support import digits, make_trainer, row
from vlcpt import CPTDataset, ModelConfig, load_model, load_processor

SIXTEEN = [
    row(f"page <trainable_text>{digits(5 + number, number)}</trainable_text>.") for number in range(16)
]


class Read(CPTDataset):
    """Keeps the numbers of the items that were read."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.read: list[int] = []

    def __getitem__(self, number: int) -> object:
        self.read.append(number)
        return super().__getitem__(number)


def train(folder: Path, base: str) -> tuple[list[int], list[int]]:
    """The items of one pass over 16 documents, and those that follow its half, read again."""
    processor = load_processor(base)
    dataset = Read(SIXTEEN, processor, max_length=64, packing=False)
    trainer = make_trainer(
        load_model(ModelConfig(base, lora_r=4)),
        dataset,
        processor,
        folder,
        num_train_epochs=1,
        gradient_accumulation_steps=1,
        save_strategy="steps",
        save_steps=4,
        logging_steps=1,
    )
    trainer.train()
    whole, dataset.read = dataset.read, []
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    return whole, dataset.read


if __name__ == "__main__":
    here = Path(sys.argv[1])
    found = train(here / "run", str(here / "base"))
    torch.save(found, here / f"read.{torch.distributed.get_rank()}.pt")
