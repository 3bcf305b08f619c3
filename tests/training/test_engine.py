"""Tests of vlcpt/training/engine.py on one process; what many do is held by test_layouts.py."""

import os

import pytest
from rich.console import Console
from torch import nn
from transformers import TrainerControl, TrainerState

from tests.support import FOUR, make_trainer
from vlcpt import CPTDataset
from vlcpt.training.engine import EngineCheck, describe_engine, engine_stage


class DeepSpeedEngine(nn.Module):
    """Says what DeepSpeed's own class of this name says."""

    def zero_optimization_stage(self):
        return 2


def test_an_engine_is_named_with_its_processes_and_stage():
    assert engine_stage(DeepSpeedEngine()) == 2
    assert describe_engine(DeepSpeedEngine(), 2) == "2 processes, DeepSpeed ZeRO-2"
    assert describe_engine(nn.Linear(1, 1), 1) == "1 process"


def test_an_engine_that_nobody_asked_for_stops_the_run(tiny_model, tiny_processor, tmp_path):
    dataset = CPTDataset(FOUR, tiny_processor, max_length=128)
    trainer = make_trainer(tiny_model, dataset, tiny_processor, tmp_path)
    trainer.model_wrapped = DeepSpeedEngine()
    check = EngineCheck(trainer, Console(file=open(os.devnull, "w")))  # noqa: SIM115

    with pytest.raises(ValueError, match=r"has 1 process, DeepSpeed ZeRO-2, but .* asks for no DeepSpeed"):
        check.on_train_begin(trainer.args, TrainerState(), TrainerControl())
