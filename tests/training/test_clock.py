"""Tests of vlcpt/training/clock.py."""

import torch

from tests.support import TEN, make_trainer
from vlcpt import CPTDataset, ModelConfig, load_model
from vlcpt.training import clock as clock_module
from vlcpt.training.clock import PHASES, StepClock


def test_a_run_that_never_asks_keeps_few_ends_of_phases():
    clock = StepClock(torch.device("cpu"))
    for _ in range(5000):
        clock.end("forward")

    assert len(clock._marks) <= 1024
    assert clock.take()["forward"] > 0


def test_what_lies_before_a_start_is_of_no_phase(monkeypatch):
    now = iter([0.0, 1.0, 100.0, 101.0])
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: next(now))
    clock = StepClock(torch.device("cpu"))
    clock.start()
    clock.end("forward")
    clock.start()  # an evaluation took 99 seconds
    clock.end("forward")

    assert clock.take()["forward"] == 2.0


def test_the_phases_of_a_run_are_nearly_all_of_its_time(tiny_model_dir, tiny_processor, tmp_path):
    model = load_model(ModelConfig(str(tiny_model_dir), dtype="float32", tuning="full"))
    dataset = CPTDataset(TEN, tiny_processor, max_length=70)
    trainer = make_trainer(
        model,
        dataset,
        tiny_processor,
        tmp_path,
        gradient_accumulation_steps=2,
        max_steps=4,
        logging_steps=4,
    )
    trainer.train()

    line = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert line["seconds/forward"] > 0  # for trackers, too
    log = (tmp_path / "train_log.jsonl").read_text()
    assert all(f'"seconds/{phase}": ' in log for phase in PHASES)
    assert '"seconds/backward": 0.0,' not in log
