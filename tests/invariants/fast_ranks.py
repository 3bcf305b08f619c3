"""Two ranks that train by every fast path at once, and note what they did; see test_fast_ranks.py.

``run_on_ranks("tests.invariants.fast_ranks", FOLDER)``: each run in turn, in the same two processes.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.ranks import allow_deepspeed, forget_deepspeed
from tests.training.layouts import FOUR_BITS, FULL, LANGUAGE, Watch, mixed_rows
from vlcpt import CPTConfig, CPTDataset, CPTTrainer, ModelConfig, load_model, load_processor

ENGINES = ("ddp", "zero2", "zero3")
# With 0.3 transformers' own eager and sdpa attention differ by 9e-5 in the gradients of the third step.
RATE = 0.05
# Documents of all kinds, most of them text alone. With this length two or three make a pack.
MEDIA = (8, 12, 16, 20, 28, 36)
ROWS = [
    one for number, one in enumerate(mixed_rows()) if number in MEDIA or not {"images", "videos"} & one.keys()
]
MAX_LENGTH = 32


@dataclass(frozen=True)
class Form:
    """How documents become batches.

    Args:
        packing, batch: Whether documents share a row, and how many rows a batch has.
        keeps: Whether features come from a folder, in place of pixels.
        settings: More fields of ``CPTConfig``.
    """

    packing: bool
    batch: int
    keeps: bool = False
    settings: dict[str, object] = field(default_factory=dict)


FORMS = {
    "packed": Form(True, 1, settings={"gradient_accumulation_steps": 2}),
    "packed, B = 3": Form(True, 3, settings={"activation_checkpointing": True, "patch_embedding": "linear"}),
    "unpacked, B = 3": Form(False, 3),
    "packed, B = 3, features kept": Form(True, 3, keeps=True),
}
# What trains, and in which forms. Features are kept of frozen towers only.
TRAINS = {"lora": {"lora_r": 4}, "qlora, merger in full": FOUR_BITS, "full, all towers": FULL}
TRAINS_LANGUAGE = {"qlora": {"tuning": "qlora", "lora_r": 4}, "full": LANGUAGE}
MODELS = TRAINS | TRAINS_LANGUAGE
PAIRS = [
    *((model, form) for model in TRAINS for form in FORMS if not FORMS[form].keeps),
    *((model, form) for model in ("lora", *TRAINS_LANGUAGE) for form in FORMS if FORMS[form].keeps),
]


class Noting(CPTTrainer):
    """Notes the documents of each batch that have targets: their tokens up to the last target."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[tuple[int, list[tuple[int, ...]]]] = []  # with the steps done before

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batches.append((self.state.global_step, list(documents(inputs))))
        return super().training_step(model, inputs, num_items_in_batch)


def documents(batch: dict[str, torch.Tensor]) -> Iterator[tuple[int, ...]]:
    """A document begins where the text row of the positions is 0; padding and fillers are such, too."""
    for ids, labels, places in zip(
        batch["input_ids"], batch["labels"], batch["position_ids"][0], strict=True
    ):
        starts = (places == 0).nonzero()[:, 0].tolist()
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            targets = (labels[start:stop] != -100).nonzero()[:, 0].tolist()
            if targets:
                yield tuple(ids[start : start + targets[-1] + 1].tolist())


def train(engine: str, model: str, form: Form, folder: Path, base: str) -> dict[str, object]:
    """Train on all documents once with plain gradient descent; what this rank did."""
    settings = {
        "use_cpu": engine == "ddp",
        "deepspeed": None if engine == "ddp" else engine,
        "packing": form.packing,
        "per_device_train_batch_size": form.batch,
        "vision_cache": str(folder / "features") if form.keeps else None,
        "max_length": MAX_LENGTH,
        "num_train_epochs": 1,
        "data_seed": 39,  # in every run one rank lacks images or videos where the other has them
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "logging_steps": 1,
        "loss_chunk": 5,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "ddp_timeout": 60,
    }
    args = CPTConfig(output_dir=str(folder / "out"), **(settings | form.settings))
    processor = load_processor(base)
    torch.manual_seed(0)  # adapters are drawn
    tuned = load_model(ModelConfig(base, **MODELS[model]))
    dataset = CPTDataset(ROWS, processor, max_length=MAX_LENGTH, packing=form.packing)
    watch = Watch()
    trainer = Noting(tuned, args, train_dataset=dataset, processing_class=processor, callbacks=[watch])
    watch.trainer = trainer
    trainer.train()
    forget_deepspeed()
    return {
        "engine": watch.engine,
        "stage": watch.stage,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "gradients": watch.gradients,
        "batches": trainer.batches,
        "vision_calls": watch.vision_calls,
    }


def main(folder: Path) -> None:
    """Each run in turn; what each did, in a file of each rank."""
    allow_deepspeed()
    for engine in ENGINES:
        for model, form in PAIRS:
            found = train(engine, model, FORMS[form], folder, str(folder / "base"))
            torch.save(found, folder / f"{engine} {model} {form}.{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
