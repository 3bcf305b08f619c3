"""Tests of vlcpt/runs/memory.py."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support import write_run
from vlcpt import CPTConfig
from vlcpt.config.yaml import dump_config, load_config
from vlcpt.demo import base_path
from vlcpt.model.counting import count_towers, empty_model
from vlcpt.model.loading import load_processor
from vlcpt.report.memory import CONTEXT
from vlcpt.runs import memory
from vlcpt.runs.data import RunData


@pytest.fixture
def on_a_gpu(tmp_path, monkeypatch):
    """A function that chooses for a run on a GPU of so many bytes: what it says, and the configuration."""
    config = write_run(tmp_path)

    def choose(total: int, *options: str, config: Path = config) -> tuple[str, CPTConfig]:
        configs = load_config(config, ["--use_cpu", "true", *options])
        processor = load_processor(base_path())
        dataset = RunData(configs, processor, lambda items, what: items).train()
        with monkeypatch.context() as patched:
            patched.setattr(CPTConfig, "device", torch.device("cuda", 0))
            properties = SimpleNamespace(total_memory=total)
            patched.setattr(torch.cuda, "get_device_properties", lambda device: properties)
            chosen = memory.choose_checkpointing(configs, dataset, 4)
        (tmp_path / "written.yaml").write_text(dump_config(configs, tmp_path))
        if chosen is not None:
            assert 0 < chosen.foreseen_gib < 2
        return "" if chosen is None else chosen.said, configs.training

    return choose


def test_activations_are_kept_where_they_stay_below_70_percent(on_a_gpu):
    said, training = on_a_gpu(80 * 2**30)

    assert training.activation_checkpointing is False
    assert said.startswith("activation checkpointing is off: without it a device needs about 0.")


def test_the_limit_counts_what_cuda_takes_for_itself(on_a_gpu):
    said, training = on_a_gpu(int(CONTEXT / 0.7))

    assert training.activation_checkpointing is True
    assert said.startswith("activation checkpointing is on: ")


@pytest.mark.parametrize("asked", ["true", "false"])
def test_what_the_configuration_says_stays(on_a_gpu, asked):
    said, training = on_a_gpu(2**30, "--activation_checkpointing", asked)

    assert said == ""
    assert training.activation_checkpointing is (asked == "true")


@pytest.mark.parametrize(
    ("total", "options"),
    [(80 * 2**30, ()), (2**30, ()), (2**30, ("--activation_checkpointing", "false"))],
    ids=["chosen off", "chosen on", "asked"],
)
def test_the_written_configuration_repeats_the_run_on_a_gpu_of_any_size(on_a_gpu, tmp_path, total, options):
    """What a machine has chosen is written as if it had been asked for: another one must not choose again."""
    _, first = on_a_gpu(total, *options)

    for other in (2**30, 80 * 2**30):
        said, again = on_a_gpu(other, config=tmp_path / "written.yaml")

        assert said == ""
        assert again.activation_checkpointing is first.activation_checkpointing
        assert again.gradient_checkpointing is first.gradient_checkpointing


@pytest.mark.parametrize(
    ("engine", "buckets"),
    [("zero1", 1), ("zero2", 2), ("zero2_offload", 2), ("zero3", 1), ("zero3_offload", 1)],
)
def test_the_buckets_that_deepspeed_reserves_whole_count_for_few_gradients_too(tmp_path, engine, buckets):
    """An H200 needed 762 MiB more for ZeRO-2 in bfloat16 than a tiny model has gradients."""
    configs = load_config(write_run(tmp_path), ["--deepspeed", engine])
    dataset = RunData(configs, load_processor(base_path()), lambda items, what: items).train()
    model = empty_model(configs.model)
    towers = count_towers(model, configs.model)

    found = memory.foresee(configs, model, towers, dataset.pack_sizes(), devices=1, merge=4)

    of_one = 4 * 200_000_000  # float32, as the configuration of each engine says
    assert found["as configured"].gradients == pytest.approx(buckets * of_one, rel=0.01)


def test_inputs_that_dora_widens_under_autocast_are_foreseen_as_copies(tmp_path):
    """peft does, where other adapters leave their inputs to autocast."""
    needs = []
    for dora in ("false", "true"):
        options = ["--use_cpu", "true", "--bf16", "true", "--dtype", "bfloat16", "--use_dora", dora]
        configs = load_config(write_run(tmp_path), options)
        dataset = RunData(configs, load_processor(base_path()), lambda items, what: items).train()
        model = empty_model(configs.model)
        towers = count_towers(model, configs.model)
        found = memory.foresee(configs, model, towers, dataset.pack_sizes(), devices=1, merge=4)
        needs.append(found["as configured"].activations)

    assert needs[1] > 1.05 * needs[0]
