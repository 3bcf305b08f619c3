"""One run of training, the same on one process and on two: what is compared, and how it is told.

``torchrun --nproc_per_node 2 -m tests.training.layouts FOLDER NAME…`` runs it on two.
"""

import json
import sys
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from tests.ranks import EngineGradients, allow_deepspeed, forget_deepspeed
from tests.support import avi, digits, png, row
from vlcpt import CPTConfig, CPTDataset, CPTTrainer, ModelConfig, load_model, load_processor
from vlcpt.config.paths import shipped_deepspeed
from vlcpt.training import loss
from vlcpt.training.guards import engine_stage

FULL = {"tuning": "full", "train_merger": True, "train_vision": True}
ADAPTERS = {"lora_r": 4}
ALL_ADAPTERS = {"lora_r": 4, "train_merger": True, "train_vision": True}


def mixed_rows() -> list[dict[str, object]]:
    """40 rows: two by two, every pair of text alone, image, video, and image with video; then four more.

    Each is an item of its own, so that in two processes each step has one row here and one there.
    """
    kinds = ("text", "image", "video", "both")
    pairs = [*product(kinds, kinds), *zip(kinds, kinds[1:] + kinds[:1], strict=True)]
    rows = []
    for number, kind in enumerate(kind for pair in pairs for kind in pair):
        image, video = kind in ("image", "both"), kind in ("video", "both")
        weight = f' weight="{1 + number % 3}"' if number % 4 == 0 else ""
        rows.append(
            row(
                f"{'<image>' if image else ''}{'<video>' if video else ''}{digits(2, number)} "
                f"<trainable_text{weight}>{digits(1 + number * 7 % 11, 100 + number)}</trainable_text>.",
                images=[png(number, 56, 28 + 28 * (number % 2))] if image else [],
                videos=[avi(number, frames=8, width=28, height=28)] if video else [],
            )
        )
    return rows


@dataclass(frozen=True)
class Run:
    """What is trained, and how.

    Args:
        engine: A shipped DeepSpeed config, or ``ddp``. In one process: neither.
        model: Fields of ``ModelConfig``.
        rows: How many of :func:`mixed_rows`.
        settings: Fields of ``CPTConfig``.
        blank: Whether its evaluation, where one is made, also has blank images; that takes twice as long.
    """

    engine: str
    model: dict[str, object] = field(default_factory=lambda: dict(ADAPTERS))
    rows: int = 40
    settings: dict[str, object] = field(default_factory=dict)
    blank: bool = False


FOUR_BITS = {"tuning": "qlora", "lora_r": 4, "train_merger": True, "lora_towers": ("language",)}
LANGUAGE = {"tuning": "full"}
MIXED = {"lora_r": 4, "train_vision": True, "train_merger": True, "lora_towers": ("language", "vision")}
EMBEDDINGS = {"tuning": "full", "train_embeddings": True}
OUTPUT = {"lora_r": 4, "lora_target_modules": ["q_proj", "v_proj", "lm_head"]}
RUNS = {
    **{f"{engine} full": Run(engine, FULL, blank=True) for engine in ("ddp", "zero1", "zero2", "zero3")},
    **{f"{engine} lora": Run(engine) for engine in ("ddp", "zero1", "zero2", "zero3")},
    **{f"{engine} lora, all towers": Run(engine, ALL_ADAPTERS) for engine in ("ddp", "zero2", "zero3")},
    **{
        f"{engine} qlora, merger in full": Run(engine, FOUR_BITS, blank=True)
        for engine in ("ddp", "zero2", "zero3")
    },
    **{f"{engine} full, language alone": Run(engine, LANGUAGE) for engine in ("zero2", "zero3")},
    **{f"{engine} lora, merger in full": Run(engine, MIXED) for engine in ("zero2", "zero3")},
    **{f"{engine} full, embeddings": Run(engine, EMBEDDINGS) for engine in ("ddp", "zero2", "zero3")},
    **{f"{engine} lora, output layer": Run(engine, OUTPUT) for engine in ("ddp", "zero3")},
    "zero3 dora, output layer": Run("zero3", {**OUTPUT, "use_dora": True}),
    **{
        f"{engine} full, linear patches": Run(engine, FULL, settings={"patch_embedding": "linear"})
        for engine in ("zero2", "zero3")
    },
}


# As most people train, with numbers that round: 6 steps.
ROUNDED = {
    f"{engine} {what}, bf16": Run(engine, {**model, "dtype": "bfloat16"}, 12, {"bf16": True})
    for engine in ("zero2", "zero3")
    for what, model in (("qlora", FOUR_BITS), ("lora", ALL_ADAPTERS))
}
# The shipped configs that are not above.
OFFLOADED = {
    f"{engine} full, offloaded": Run(engine, FULL, 12) for engine in ("zero2_offload", "zero3_offload")
}


def shipped_config(name: str) -> str | dict[str, object]:
    """A shipped DeepSpeed config; with torch's AdamW where DeepSpeed would first compile its own."""
    if not name.endswith("_offload"):
        return name
    config = json.loads(Path(shipped_deepspeed()[name]).read_text())
    return {**config, "zero_force_ds_cpu_optimizer": False}


class ByRow(CPTDataset):
    """Items in the order of the rows, which a data set shuffles."""

    def __getitem__(self, index: int) -> list[object]:
        if index >= len(self):
            raise IndexError(index)
        if not hasattr(self, "_places"):
            names = [self.names(number)[0] for number in range(len(self))]
            self._places = sorted(range(len(self)), key=lambda place: int(names[place].rpartition(":")[2]))
        return super().__getitem__(self._places[index])


class InOrder(CPTTrainer):
    """Takes the items as they stand, so that the pairs stay together."""

    def _get_train_sampler(self, train_dataset: Dataset[object] | None = None) -> None:
        return None


class Watch(TrainerCallback):
    """Notes what a run did on this rank."""

    def __init__(self) -> None:
        self.engine = ""
        self.stage: int | None = None
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.vision_calls: list[int] = []
        self.most_logits = 0
        self._calls = 0
        self.trainer: CPTTrainer

    @contextmanager
    def counting_logits(self):
        """Note of how many targets there are logits at once."""
        names = ("_nll", "_nll_and_normaliser", "_logit_gradient")
        given = {name: getattr(loss, name) for name in names}

        def counted(function):
            def count(logits, *rest):
                self.most_logits = max(self.most_logits, len(logits))
                return function(logits, *rest)

            return count

        vars(loss).update({name: counted(function) for name, function in given.items()})
        try:
            yield
        finally:
            vars(loss).update(given)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        wrapped = self.trainer.model_wrapped
        self.engine, self.stage = type(wrapped).__name__, engine_stage(wrapped)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.model.visual.register_forward_hook(self._count)
        if self.stage is not None:
            watched = EngineGradients()
            watched.watch(wrapped)
            self.gradients = watched.steps

    def _count(self, *ignored):
        self._calls += 1

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.stage is None:
            named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            self.gradients.append(
                {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named}
            )

    def on_step_end(self, args, state, control, **kwargs):
        self.vision_calls.append(self._calls)
        self._calls = 0


def train(
    run: Run, folder: Path, *, base: str, processes: int, resume: bool | str = False, evaluates: bool = False
) -> dict[str, object]:
    """Train; what it did, on this rank. Where the run saves, the result is saved as well.

    An evaluation takes longer than the steps of a short run, so it is made where it is looked at.
    """
    settings = {
        "use_cpu": processes == 1 or run.engine == "ddp",
        "deepspeed": None if processes == 1 or run.engine == "ddp" else shipped_config(run.engine),
        "gradient_accumulation_steps": 2 // processes,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "max_length": 128,
        "packing": False,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "max_grad_norm": 0,
        "ddp_timeout": 60,
        # Ranks have different numbers of chunks; one process makes all logits at once.
        "loss_chunk": 3 if processes == 2 else 0,
        "eval_blank_images": run.blank,
        "eval_strategy": "no",  # calls of towers are counted, and the evaluation is asked for below
    }
    args = CPTConfig(output_dir=str(folder), **(settings | run.settings))
    processor = load_processor(base)
    torch.manual_seed(0)  # adapters are drawn
    model = load_model(ModelConfig(base, **run.model))
    rows = mixed_rows()
    dataset = ByRow(rows[: run.rows], processor, max_length=128, packing=False)
    # 39 rows: the ranks do not get equally many.
    held_out = CPTDataset(rows[:39], processor, max_length=128, packing=False)
    watch = Watch()
    trainer = InOrder(
        model,
        args,
        train_dataset=dataset,
        eval_dataset=held_out,
        processing_class=processor,
        callbacks=[watch],
    )
    watch.trainer = trainer
    with watch.counting_logits():
        trainer.train(resume_from_checkpoint=resume)
        evaluation = trainer.evaluate() if evaluates else {}
    weights = None
    if args.save_strategy != "no":
        weights = whole_weights(trainer.model)
        trainer.save_model()
    forget_deepspeed()
    return {
        "weights": weights,
        "engine": watch.engine,
        "stage": watch.stage,
        "world": args.world_size,
        "gradients": watch.gradients[:1],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "vision_calls": watch.vision_calls,
        "most_logits": watch.most_logits,
        "filled": trainer.data_collator.fill_modalities,
        "evaluation": {
            name: evaluation[name]
            for name in ("eval_loss", "eval_targets", "eval_reliance")
            if name in evaluation
        },
    }


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter in memory; under ZeRO-3 put together from the ranks' parts."""
    named = dict(model.named_parameters())
    gathered: AbstractContextManager[object] = nullcontext()
    if any(hasattr(one, "ds_id") for one in named.values()):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(named.values()))
    with gathered:
        return {name: one.detach().clone() for name, one in named.items()}


def main(folder: Path, names: list[str]) -> None:
    """Each run in turn, in the same two processes; what each did, in a file of each rank."""
    allow_deepspeed()
    rank = torch.distributed.get_rank()
    base, runs = str(folder / "base"), RUNS | ROUNDED | OFFLOADED
    for name in names:
        found = train(runs[name], folder / name, base=base, processes=2, evaluates=True)
        torch.save(found, folder / f"{name}.{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
