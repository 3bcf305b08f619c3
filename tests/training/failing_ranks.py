"""Runs in which images break after they were planned, on each of several ranks.

``torchrun --nproc_per_node 2 -m tests.training.failing_ranks FOLDER MODEL``
"""

import json
import sys
from pathlib import Path

import torch
from transformers import TrainingArguments

from vlcpt import CPTConfig, CPTDataset, CPTTrainer, ModelConfig, load_model, load_processor

RUNS = {
    "few": {"on_bad_data": "skip", "max_bad_fraction": 0.25},
    "many": {"on_bad_data": "skip", "max_bad_fraction": 0.1},
    "stops": {},
}


def train(name: str, folder: Path, base: str) -> None:
    """Train on a folder's rows, three images of which break on the way; what this rank saw, in a file."""
    args = CPTConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        num_train_epochs=1,
        dataloader_num_workers=0,
        save_strategy="steps",
        save_steps=1,
        report_to="none",
        ddp_timeout=60,
    )
    processor = load_processor(base)

    def read() -> CPTDataset:
        return CPTDataset(folder / "train.jsonl", processor, max_length=256, packing=False, **RUNS[name])

    dataset = read()
    torch.distributed.barrier()
    if args.process_index == 0:
        for number in (1, 4, 7):
            image = folder / f"{number}.png"
            image.write_bytes(image.read_bytes()[:60])
    torch.distributed.barrier()

    def trainer(dataset: CPTDataset) -> CPTTrainer:
        torch.manual_seed(0)
        model = load_model(ModelConfig(base))
        return CPTTrainer(model, args, train_dataset=dataset, processing_class=processor)

    error = None
    try:
        trainer(dataset).train()
    except ValueError as raised:
        error = f"{type(raised).__name__}: {raised}"
    dataset.ledger.check()
    found = {"error": error, "ledger": dataset.ledger.as_json()}
    if error is None:
        again = read()
        trainer(again).train(resume_from_checkpoint=True)
        found["resumed"] = again.ledger.as_json()
    (folder / f"rank-{args.process_index}").write_text(json.dumps(found))


def main(folder: Path, base: str) -> None:
    """Each run in turn, in the same processes."""
    TrainingArguments(str(folder / "out"), use_cpu=True)  # sets the group up
    assert torch.distributed.get_world_size() > 1
    for name in RUNS:
        train(name, folder / name, base)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
