"""A rank that trains a whole model, vision tower included, on texts; test_guards_engine.py starts it."""

import sys
from pathlib import Path

import torch

from tests.support import make_trainer, row
from vlcpt import CPTDataset, ModelConfig, load_model, load_processor

TEXTS = [row(f"page {number} <trainable_text>{number * 7}</trainable_text>.") for number in range(8)]


def train(folder: Path, base: str, processes: int = 1) -> dict[str, torch.Tensor]:
    """Three steps of two texts each; the weights after them."""
    model = load_model(ModelConfig(base, tuning="full", train_merger=True, train_vision=True))
    processor = load_processor(base)
    trainer = make_trainer(
        model,
        CPTDataset(TEXTS, processor, max_length=64, packing=False),
        processor,
        folder,
        activation_checkpointing=True,
        gradient_accumulation_steps=2 // processes,
        learning_rate=1e-3,
        weight_decay=0.1,
        max_steps=3,
        optim="sgd",
    )
    assert trainer.data_collator.fill_modalities == ()
    trainer.train()
    assert trainer.args.world_size == processes
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


if __name__ == "__main__":
    here = Path(sys.argv[1])
    weights = train(here, str(here / "base"), processes=2)
    torch.save(weights, here / f"blind.{torch.distributed.get_rank()}.pt")
