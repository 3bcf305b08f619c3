"""Invariant 5: interrupted and resumed equals uninterrupted, bit for bit on the CPU."""

import json
import shutil

import pytest
import torch
from transformers import TrainerCallback, set_seed

from tests.published import REAL
from tests.support import TEN, make_trainer
from vlcpt import CPTDataset, ModelConfig, load_model

# 5 packs, 2 to a step, so the third step of each of the two epochs has one alone.
STEPS = 6
WAYS = {
    "full": {"tuning": "full", "train_merger": True},
    "lora": {"tuning": "lora", "lora_r": 4, "lora_dropout": 0.1, "train_vision": True},
    "lora and a tower in full": {"lora_r": 4, "train_merger": True, "lora_towers": ["language"]},
    "bfloat16": {"tuning": "full", "train_merger": True, "dtype": "bfloat16"},
}
TIME = ("runtime", "per_second", "preparation_time", "data_wait", "peak_memory_gib", "eta_seconds")


class Interrupted(Exception):
    """Stands for a kill."""


class InterruptAt(TrainerCallback):
    """Ends the run inside step ``step``, its gradient computed and not used."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            raise Interrupted


@pytest.fixture(scope="module")
def dataset(tiny_processor):
    dataset = CPTDataset([*TEN, *TEN[4:6]], tiny_processor, max_length=70)
    assert len(dataset) == 5
    return dataset


@pytest.fixture(scope="module")
def held_out(tiny_processor):
    """A text and one with an image, which is also measured without it."""
    return CPTDataset(TEN[:2], tiny_processor, max_length=70)


@pytest.fixture(scope="module")
def run(tiny_model_dir, tiny_processor, dataset, held_out):
    """A function that trains and returns the log, the weights and the optimizer's state."""

    def train(
        folder, way, workers, *, init_seed=1, resume=None, save_steps=1, callbacks=(), interrupted_at=None
    ):
        set_seed(init_seed)  # a resumed process starts with other adapters and other random state
        model = load_model(ModelConfig(str(tiny_model_dir), **WAYS[way]), seed=init_seed)
        trainer = make_trainer(
            model,
            dataset,
            tiny_processor,
            folder,
            num_train_epochs=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            lr_scheduler_type="cosine",
            weight_decay=0.1,
            dataloader_num_workers=workers,
            save_strategy="steps",
            save_steps=save_steps,
            eval_strategy="steps",
            eval_steps=2,
            eval_dataset=held_out,
            callbacks=list(callbacks),
        )
        torch.rand(init_seed)
        if interrupted_at is not None:
            trainer.add_callback(InterruptAt(interrupted_at))
            with pytest.raises(Interrupted):
                trainer.train()
            trainer.remove_callback(InterruptAt)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == STEPS
        log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
        log = [
            {key: one[key] for key in one if not key.endswith(TIME) and not key.startswith("seconds/")}
            for one in log
        ]
        weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        saved = folder / f"checkpoint-{STEPS}"
        return log, weights, torch.load(saved / "optimizer.pt"), torch.load(saved / "scheduler.pt")

    return train


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    """The result and folder of a run of each kind, made once."""
    made = {}

    def get(way, workers):
        if (way, workers) not in made:
            folder = tmp_path_factory.mktemp("whole")
            made[way, workers] = (*run(folder, way, workers), folder)
        return made[way, workers]

    return get


def same(first: object, second: object) -> bool:
    """Equality to the bit, all the way down."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


ALL_STEPS = tuple(range(2, STEPS + 1))
CASES = [
    ("saved", "full", 0, ALL_STEPS),
    ("saved", "lora", 0, ALL_STEPS),
    ("saved", "full", 2, (3,)),
    ("saved", "lora", 2, (3, 4)),  # 4: between two epochs
    ("saved", "lora and a tower in full", 0, (3,)),
    ("saved", "bfloat16", 0, (3,)),
    *((layout, way, 0, (3,)) for layout in ("3B", "7B") for way in ("full", "lora and a tower in full")),
    *(pytest.param(REAL, way, 0, (3,), marks=pytest.mark.slow) for way in ("full", "lora")),
]


@pytest.mark.parametrize(("layout", "way", "workers", "steps"), CASES, indirect=["layout"])
def test_interrupted_and_resumed_is_uninterrupted(run, uninterrupted, tmp_path, way, workers, steps):
    """Interrupted inside each of the steps in turn, and resumed by another trainer each time."""
    log, weights, optimizer, scheduler, _ = uninterrupted(way, workers)
    for number, step in enumerate(steps):
        with pytest.raises(Interrupted):
            run(
                *(tmp_path, way, workers),
                init_seed=1 + number,
                resume=number > 0,
                callbacks=[InterruptAt(step)],
            )
        assert (tmp_path / f"checkpoint-{step - 1}").is_dir()
        assert not (tmp_path / f"checkpoint-{step}").exists()

    resumed_log, *rest = run(tmp_path, way, workers, init_seed=1 + len(steps), resume=True)

    assert same(rest[0], weights)
    assert same(rest[1:], [optimizer, scheduler])
    assert resumed_log == log
    assert [line["step"] for line in log if "loss" in line] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("layout", ["saved"], indirect=True)
@pytest.mark.parametrize(("way", "workers", "step"), [("full", 0, 3), ("lora", 0, 3), ("lora", 2, 5)])
def test_the_same_trainer_goes_on_as_if_it_had_not_been_interrupted(
    run, uninterrupted, tmp_path, way, workers, step
):
    """Torch's seed is by then that of the last step, on each rank another one."""
    log, weights, optimizer, scheduler, _ = uninterrupted(way, workers)

    resumed_log, *rest = run(tmp_path, way, workers, interrupted_at=step, resume=True)

    assert same(rest[0], weights)
    assert same(rest[1:], [optimizer, scheduler])
    assert resumed_log == log


@pytest.mark.parametrize("layout", ["saved"], indirect=True)
def test_log_lines_past_the_checkpoint_are_written_anew(run, uninterrupted, tmp_path):
    log, weights, *_ = uninterrupted("lora", 0)
    with pytest.raises(Interrupted):
        run(tmp_path, "lora", 0, callbacks=[InterruptAt(5)])
    shutil.rmtree(tmp_path / "checkpoint-4")
    shutil.rmtree(tmp_path / "checkpoint-3")
    assert len((tmp_path / "train_log.jsonl").read_text().splitlines()) > 4

    resumed_log, resumed, *_ = run(tmp_path, "lora", 0, init_seed=2, resume="auto")

    assert resumed_log == log
    assert same(resumed, weights)


@pytest.mark.parametrize("layout", ["saved"], indirect=True)
def test_another_seed_would_be_noticed(run, uninterrupted, tmp_path):
    """Or the comparisons above prove nothing: dropout and the adapters' first values do matter."""
    log, weights, *_ = uninterrupted("lora", 0)

    other_log, other, *_ = run(tmp_path, "lora", 0, init_seed=2)

    assert not same(other, weights)
    assert other_log != log
