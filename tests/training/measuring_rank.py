"""One rank of an evaluation: scores its share of each set, then of sets in which something breaks.

``torchrun --nproc_per_node 2 -m tests.training.measuring_rank FOLDER BASE``
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import ClassVar

import torch
from transformers import TrainingArguments

from tests.support import TEN
from vlcpt import CPTDataset, ModelConfig, load_model, load_processor
from vlcpt.training.evaluate import EvalOptions, evaluate_sets, score_sets

BATCH_SIZES = (1, 2, 5, 16)  # of ten items: as many batches for both ranks, one more for one, none for one
BROKEN = 3  # the item that breaks: rank 1's, at batch size 1


class Slow(CPTDataset):
    """Takes its time at each item, and notes it; also for copies of itself."""

    read: ClassVar[set[int]] = set()

    def __getitem__(self, index: int) -> list[object]:
        time.sleep(0.05)
        self.read.add(index)
        return super().__getitem__(index)


class Dying(CPTDataset):
    """Ends the worker that reads one of its items."""

    def __getitem__(self, index: int) -> list[object]:
        if index == BROKEN:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def write_rows(folder: Path) -> None:
    """80 rows; in ``many.jsonl`` one, in ``two.jsonl`` two, one a rank, have an image that is cut."""
    image = folder / "cut.png"
    image.write_bytes(TEN[0]["images"][0]["bytes"][:60])
    rows = [{"text": f"a <trainable_text>{number}</trainable_text>"} for number in range(80)]
    rows[7] = {"text": "<image><trainable_text>seven</trainable_text>", "images": [str(image)]}
    (folder / "many.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    rows[6] = rows[7]
    (folder / "two.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))


def main(folder: Path, base: str) -> None:
    """What this rank found, in a file of its own."""
    args = TrainingArguments(str(folder / "out"), use_cpu=True, ddp_timeout=60)
    rank, ranks = args.process_index, args.world_size
    processor, model = load_processor(base), load_model(ModelConfig(base, lora_r=4))

    def measure(dataset: CPTDataset, **options: object) -> object:
        found = EvalOptions(rank=rank, ranks=ranks, **options)
        try:
            return evaluate_sets(model, {"set": dataset}, processor, found)["set"]
        except ValueError as error:
            return f"{type(error).__name__}: {error}"

    ten = CPTDataset(TEN, processor, max_length=70, packing=False)
    found = {str(size): measure(ten, batch_size=size) for size in BATCH_SIZES}
    kept = score_sets(model, {"set": ten}, processor, EvalOptions(rank=rank, ranks=ranks), keeps_targets=True)
    found["targets"] = {name: one.tolist() for name, one in vars(kept["set"].targets).items()}
    if rank == 0:
        write_rows(folder)
    torch.distributed.barrier()
    slow = Slow(folder / "many.jsonl", processor, max_length=70, packing=False)
    found["cut"] = measure(slow)
    found["cut, read"] = len(slow.read)
    skipping = {"on_bad_data": "skip", "max_bad_fraction": 1.5 / 80}  # two of 80 are too many, one is not
    found["too many"] = measure(
        CPTDataset(folder / "two.jsonl", processor, max_length=70, packing=False, **skipping)
    )
    found["dead"] = measure(Dying(TEN, processor, max_length=70, packing=False), num_workers=1, timeout=30)
    found["after"] = measure(ten)
    (folder / f"rank-{rank}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
