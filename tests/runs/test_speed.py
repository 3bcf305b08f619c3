"""Tests of vlcpt/runs/speed.py."""

import json
import math

import pytest

from tests.support import write_run
from vlcpt.config.yaml import load_config
from vlcpt.demo import base_path
from vlcpt.errors import ConfigError
from vlcpt.model.counting import count_towers, empty_model
from vlcpt.model.loading import load_model, load_processor
from vlcpt.runs import speed as speed_module
from vlcpt.runs.data import RunData
from vlcpt.runs.speed import Machine, foresee_speed, read_machine
from vlcpt.training.cost import MEGA, cost_of

MEASURED = {
    "run": {
        **{"layers": [2, 2], "of_layers": [2, 2], "ranks": 4, "device": "NVIDIA H200"},
        **{"base": "base", "tuning": "lora", "trained": ["language"]},
    },
    "speed": {"tokens_per_second": 8000.0},
}


@pytest.fixture
def foreseen(tmp_path, monkeypatch):
    """A function that foresees a run of four texts on a machine."""
    config = write_run(tmp_path, "use_cpu: true")
    monkeypatch.setattr(speed_module, "seconds_to_load", lambda *ignored: 3.0)

    def foresee(machine: Machine | str, devices: int = 1, *options: str):
        configs = load_config(config, list(options))
        processor = load_processor(base_path())
        dataset = RunData(configs, processor, lambda items, what: items).train()
        model = empty_model(configs.model)
        towers = count_towers(model, configs.model)
        if isinstance(machine, str):
            machine = read_machine(machine, configs)
        return configs, dataset, foresee_speed(configs, dataset, model, towers, processor, machine, devices)

    return foresee


def test_an_epoch_takes_the_operations_of_its_packs_at_a_share_of_the_peak(foreseen):
    machine = Machine("one", peak=1e9, memory=10**15)
    configs, dataset, speed = foreseen(machine)

    cost = cost_of(load_model(configs.model), recomputes=False)
    operations = dataset.pack_costs(cost, 1)[0].sum() * MEGA
    assert speed.seconds == pytest.approx((operations / 1e9 / 0.5, operations / 1e9 / 0.25))
    assert "activation checkpointing off" in speed.assumes


def test_where_activations_do_not_fit_they_are_computed_again(foreseen):
    small, large = (foreseen(Machine("one", peak=1e9, memory=size))[2] for size in (1, 10**15))

    assert "activation checkpointing on" in small.assumes
    assert small.seconds[0] > 1.2 * large.seconds[0]


def test_gpus_share_an_epoch_and_each_needs_workers_for_its_own_packs(foreseen):
    machine = Machine("one", peak=1e9, memory=10**15)
    _, dataset, one = foreseen(machine)
    _, _, four = foreseen(machine, 4)

    assert four.seconds[0] == pytest.approx(one.seconds[0] / 4)
    a_pack = one.seconds[0] / len(dataset)
    assert one.workers == min(len(dataset), math.ceil(3.0 / a_pack))
    assert four.workers == 1  # each has a pack


def test_a_measured_machine_takes_what_it_took_a_token(foreseen, tmp_path):
    (tmp_path / "doctor.json").write_text(json.dumps(MEASURED))
    _, dataset, speed = foreseen(str(tmp_path / "doctor.json"), 2)

    tokens = dataset.pack_sizes()[:, 0].sum()
    assert speed.seconds == pytest.approx((tokens / 4000,) * 2)  # two of its four GPUs


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", r"no speed that vlcpt doctor measured"),
        ("[1", r"no speed that vlcpt doctor measured"),
        *(
            (json.dumps({**MEASURED, "run": {**MEASURED["run"], key: value}}), r"no speed that vlcpt doctor")
            for key, value in (("ranks", 0), ("layers", []), ("layers", 3))
        ),
        *(
            (json.dumps({**MEASURED, "speed": {"tokens_per_second": rate}}), r"no speed that vlcpt doctor")
            for rate in (0, -5, float("nan"))
        ),
        (
            json.dumps({**MEASURED, "run": {**MEASURED["run"], "base": "vlcpt demo", "tuning": "full"}}),
            r"another run \(base vlcpt demo, here base; tuning full, here lora\)",
        ),
        (json.dumps({**MEASURED, "speed": None}), r"no speed that vlcpt doctor measured"),
        (
            json.dumps({**MEASURED, "run": {**MEASURED["run"], "layers": [1, 1]}}),
            r"measured 1 of 2 layers, which says nothing of all",
        ),
    ],
)
def test_a_file_without_a_speed_of_this_run_is_refused(foreseen, tmp_path, content, message):
    (tmp_path / "doctor.json").write_text(content)

    with pytest.raises(ConfigError, match=message):
        foreseen(str(tmp_path / "doctor.json"))


def test_a_gpu_that_is_not_known_is_refused_with_those_that_are(foreseen, tmp_path):
    with pytest.raises(ConfigError, match=r"--gpu T4: not known\. Give one of .*H100"):
        foreseen("T4")
    with pytest.raises(ConfigError, match=r"No such file"):
        foreseen(str(tmp_path / "missing.json"))
