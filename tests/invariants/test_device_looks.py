"""Nothing of this library waits for the device in a micro-batch, and once a step at most."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.invariants.looking_ranks import RUNS, STEPS
from tests.looks import PACKAGE, Looks
from tests.processes import run_on_ranks
from tests.support import TEN, make_trainer
from vlcpt import CPTDataset, CPTTrainer, ModelConfig, load_model
from vlcpt.training import evaluate
from vlcpt.training import trainer as trainer_module


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_micro_batch_on_the_device_is_looked_at_by_nothing_of_ours(
    tiny_model_dir, tiny_processor, tmp_path, monkeypatch, tuning, rows
):
    model = load_model(ModelConfig(str(tiny_model_dir), dtype="float32", tuning=tuning))
    dataset = CPTDataset(TEN, tiny_processor, max_length=70)
    looks = Looks(monkeypatch)
    looks.is_on = False

    class Watched(CPTTrainer):
        def training_step(self, *args, **kwargs):
            looks.is_on = True
            with looks:
                try:
                    return super().training_step(*args, **kwargs)
                finally:
                    looks.is_on = False

    def sent(batch, device, scales):
        looks.is_on = False  # what it looks at is still on the CPU
        found = trainer_module_sent(batch, device, scales)
        looks.is_on = True
        return found

    trainer_module_sent = trainer_module.sent
    monkeypatch.setattr(trainer_module, "sent", sent)
    trainer = make_trainer(
        model, dataset, tiny_processor, tmp_path, per_device_train_batch_size=rows, max_steps=2
    )
    trainer.__class__ = Watched
    trainer.train()

    assert not looks.ours
    assert looks.lines  # upstream's own, of images: or counting proves nothing


def test_a_batch_of_an_evaluation_is_looked_at_by_nothing_of_ours(
    tiny_model_dir, tiny_processor, monkeypatch
):
    """Neither in a pass nor where its losses are added up."""
    model = load_model(ModelConfig(str(tiny_model_dir), dtype="float32"))
    dataset = CPTDataset(TEN, tiny_processor, max_length=70)
    looks = Looks(monkeypatch)
    calls: Counter[str] = Counter()

    def watch(owner, name):
        function = getattr(owner, name)

        def watched(*args, **kwargs):
            calls[name] += 1
            looks.is_on = True  # what is read and collated is still on the CPU
            with looks:
                try:
                    return function(*args, **kwargs)
                finally:
                    looks.is_on = False

        monkeypatch.setattr(owner, name, watched)

    watch(evaluate, "target_losses")
    watch(evaluate._Scorer, "_values")
    looks.is_on = False
    result = evaluate.evaluate_sets(model, {"ten": dataset}, tiny_processor)["ten"]

    assert None not in result.values()
    assert calls == dict.fromkeys(("target_losses", "_values"), 4 * len(dataset))
    assert not looks.ours
    assert looks.lines  # upstream's own, of images


def test_on_one_process_a_step_looks_once_at_the_norm_of_its_gradient(
    tiny_model_dir, tiny_processor, tmp_path, monkeypatch
):
    """Everything that is not of the batches, which lie on the CPU, would be a look at the device."""
    model = load_model(ModelConfig(str(tiny_model_dir), dtype="float32"))
    dataset = CPTDataset(TEN, tiny_processor, max_length=70)
    trainer = make_trainer(
        model, dataset, tiny_processor, tmp_path, gradient_accumulation_steps=2, max_steps=3, logging_steps=10
    )
    found = []
    norm = trainer.accelerator.clip_grad_norm_

    class Norm(torch.Tensor):
        """A number that notes who asks for it."""

        def __float__(self):
            found.append("norm")
            return float(self.as_subclass(torch.Tensor))

    monkeypatch.setattr(
        trainer.accelerator, "clip_grad_norm_", lambda *args: note(norm(*args).as_subclass(Norm))
    )

    def note(value):
        trainer._finite._norm = value
        return value

    reduced = []
    monkeypatch.setattr(trainer.accelerator, "reduce", lambda *args: reduced.append(args))
    trainer.train()

    assert found == ["norm"] * 3
    assert not reduced


def test_an_evaluation_of_the_trainer_looks_at_nothing_on_the_device(
    tiny_model_dir, tiny_processor, tmp_path, monkeypatch
):
    """Batches come to ``prediction_step`` as the loader made them, and are sent there."""
    model = load_model(ModelConfig(str(tiny_model_dir), dtype="float32"))
    dataset = CPTDataset(TEN, tiny_processor, max_length=70)
    trainer = make_trainer(model, dataset, tiny_processor, tmp_path)
    looks, devices = Looks(monkeypatch), []
    looks.is_on = False
    given = trainer_module.sent

    def sent(batch, device, scales):
        found = given(batch, device, scales)
        looks.is_on = True
        return found

    sums = trainer_module.sums_with_blank

    def summed(*args):
        found = sums(*args)
        looks.is_on = False
        return found

    loop = trainer.evaluation_loop
    monkeypatch.setattr(trainer_module, "sent", sent)
    monkeypatch.setattr(trainer_module, "sums_with_blank", summed)

    def watched(dataloader, *args, **kwargs):
        found = loop(dataloader, *args, **kwargs)
        devices.append(dataloader.device)
        return found

    trainer.evaluation_loop = watched
    with looks:
        trainer.evaluate(dataset)

    assert devices == [None]
    assert not looks.ours
    assert looks.lines


@pytest.fixture(scope="module")
def on_two(
    tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, dict[str, object]]]:
    """Who looked in each run, on rank 0 and on rank 1; what it printed is in ``printed``."""
    folder = tmp_path_factory.mktemp("looks")
    done = run_on_ranks("tests.invariants.looking_ranks", str(folder), str(tiny_model_dir))
    assert done.returncode == 0, done.stdout
    found = [json.loads((folder / f"looks.{rank}.json").read_text()) for rank in (0, 1)]
    return [{**one, "printed": done.stdout} for one in found]


def files(lines: dict[str, int]) -> dict[str, int]:
    """Looks by file of the package."""
    found: Counter[str] = Counter()
    for line, count in lines.items():
        found[line.removeprefix(f"{PACKAGE}/").rpartition(":")[0]] += count
    return dict(found)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in RUNS if "without" not in name])
def test_on_two_ranks_a_step_looks_once_at_what_must_be_finite(name, on_two):
    """DeepSpeed, Trainer and the model look as well: so counting proves something."""
    for rank in on_two:
        assert files(rank[name]["ours"]) == {"training/guards.py": STEPS}
        assert rank[name]["all"].keys() > rank[name]["ours"].keys()


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_ranks_that_gloo_does_not_connect_count_on_the_device_and_say_so(on_two):
    for rank in on_two:
        found = files(rank["ddp without gloo"]["ours"])
        assert found == {"training/guards.py": STEPS, "training/ranks.py": STEPS}
        assert rank["ddp without gloo"]["losses"] == rank["ddp"]["losses"]
    said = "gloo does not connect the ranks, so each step waits once more for the device"
    assert on_two[0]["printed"].count(said) == 1
    assert "rank 1: Unable to find address for: eth7" in on_two[0]["printed"]
