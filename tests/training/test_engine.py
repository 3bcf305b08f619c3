"""Tests of vlcpt/training/engine.py on one process; what many do is held by test_layouts.py."""

import os

import pytest
import torch
from accelerate.state import DistributedType
from rich.console import Console
from torch import nn
from transformers import TrainerControl, TrainerState

from tests.support import FOUR, make_trainer
from vlcpt import CPTConfig, CPTDataset, CPTTrainer
from vlcpt.config import ConfigError
from vlcpt.training.engine import EngineCheck, check_launch, describe_engine, engine_stage


def cpu_config(folder, **settings):
    return CPTConfig(str(folder), use_cpu=True, report_to="none", **settings)


def without_cpu_asked_for(folder, **settings):
    """What a machine with GPUs has in its file, here."""
    args = cpu_config(folder, **settings)
    args.use_cpu = False
    return args


def test_several_gpus_in_one_process_are_refused_with_the_command_to_use(tmp_path):
    args = cpu_config(tmp_path)
    args._n_gpu = 4  # Trainer would take nn.DataParallel

    with pytest.raises(ConfigError, match=r"nn\.DataParallel.* torchrun --nproc_per_node 4 -m vlcpt train"):
        check_launch(args)


def test_processes_that_do_not_find_each_other_are_refused(tmp_path, monkeypatch):
    args = without_cpu_asked_for(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(ConfigError, match=r"started 2 processes, but there is no GPU here.*use_cpu: true"):
        check_launch(args)


def test_a_launcher_of_one_process_is_no_reason_to_refuse(tmp_path, monkeypatch):
    args = without_cpu_asked_for(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")

    check_launch(args)


def test_deepspeed_that_would_not_be_used_is_refused_with_the_reason(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="deepspeed zero2 would not be used: use_cpu is set"):
        check_launch(cpu_config(tmp_path, deepspeed="zero2"))
    with pytest.raises(ConfigError, match="deepspeed zero3 would not be used: there is no GPU here"):
        check_launch(without_cpu_asked_for(tmp_path, deepspeed="zero3"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"zero1 would not be used: no launcher.*torchrun --nproc_per_node"):
        check_launch(without_cpu_asked_for(tmp_path, deepspeed="zero1"))


def test_deepspeed_that_is_used_is_passed(tmp_path):
    args = without_cpu_asked_for(tmp_path, deepspeed="zero2")
    args.distributed_state.distributed_type = DistributedType.DEEPSPEED
    try:
        check_launch(args)
    finally:
        args.distributed_state.distributed_type = DistributedType.NO


def test_the_trainer_refuses_them_as_well(tiny_model, tiny_processor, tmp_path):
    args = cpu_config(tmp_path)
    args._n_gpu = 2

    with pytest.raises(ConfigError, match="torchrun --nproc_per_node 2"):
        CPTTrainer(tiny_model, args, processing_class=tiny_processor)


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
