"""A run from its configuration; tests/test_cli.py types the commands."""

import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from vlcpt.config import ConfigError
from vlcpt.config_reading import Configs, load_config
from vlcpt.demo import base_path
from vlcpt.runs import eval_run, load_trained, prepare_output, train_run, write_json

QUIET = Console(file=StringIO(), width=100)


def configs(folder: Path, *overrides: str) -> Configs:
    rows = [{"text": f"one <trainable_text>two {n}</trainable_text>"} for n in range(4)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "my.yaml").write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: train.jsonl\n"
        "eval_data: [{path: train.jsonl, name: same}]\noutput_dir: out\nmax_length: 64\nmax_steps: 2\n"
        "use_cpu: true\ndataloader_num_workers: 0\nlearning_rate: 1e-3\n"
    )
    return load_config(folder / "my.yaml", overrides)


@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
def test_a_trained_model_is_measured_beside_its_base(tmp_path: Path, tuning: str) -> None:
    run = configs(tmp_path, "--tuning", tuning)
    train_run(run, QUIET)
    untrained = eval_run(configs(tmp_path, "--tuning", tuning), tmp_path / "out", console=QUIET)["same"]

    assert untrained["base_loss"] is not None
    assert untrained["loss"] < untrained["base_loss"]


def test_a_checkpoint_of_a_full_run_loads_with_what_was_trained(tmp_path: Path) -> None:
    trainer = train_run(configs(tmp_path, "--tuning", "full"), QUIET)
    trained, base = load_trained(configs(tmp_path, "--tuning", "full").model, tmp_path / "out")

    assert base is not None and trainer.model is not None
    weight = "model.language_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(trained.state_dict()[weight], trainer.model.state_dict()[weight])
    assert not torch.equal(trained.state_dict()[weight], base.state_dict()[weight])


def test_evaluation_during_training_measures_each_set_by_name(tmp_path: Path) -> None:
    trainer = train_run(configs(tmp_path, "--eval_strategy", "steps", "--eval_steps", "1"), QUIET)

    assert [entry for entry in trainer.state.log_history if "eval_same_loss" in entry]


def test_nothing_to_measure_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is nothing to measure"):
        eval_run(configs(tmp_path, "--eval_data", "[]"), tmp_path, console=QUIET)


def test_resuming_or_an_empty_folder_needs_no_overwrite(tmp_path: Path) -> None:
    run = configs(tmp_path)
    (tmp_path / "out").mkdir()
    prepare_output(run)
    (tmp_path / "out/checkpoint-1").mkdir()

    with pytest.raises(ConfigError, match="is not empty"):
        prepare_output(run)
    prepare_output(configs(tmp_path, "--resume_from_checkpoint", "true"))
    assert (tmp_path / "out/checkpoint-1").is_dir()


def test_json_is_written_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "new/a.json", {"value": "阀"})

    assert json.loads((tmp_path / "new/a.json").read_text("utf-8")) == {"value": "阀"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]
