"""Packages that a key needs are looked for before anything is read."""

from pathlib import Path

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from vlcpt.config import rules
from vlcpt.config.rules import OPTIMIZERS, missing_packages
from vlcpt.config.yaml import load_config, read_early
from vlcpt.errors import ConfigError
from vlcpt.runs.train import train_run

WHOLE = "model_name_or_path: org/model\ntrain_data: a.jsonl\noutput_dir: out\nuse_cpu: true\n"


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch):
    monkeypatch.setattr(rules, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("key", "value", "reported"),
    [
        ("report_to", "wandb", "pip install wandb,"),
        ("report_to", ["none", "tensorboard"], "pip install tensorboard,"),
        ("report_to", "tensor_board", "tensor_board is not known. Choose one of: azure_ml, "),
        ("attn_implementation", "flash_attention_2", "pip install flash-attn --no-build-isolation,"),
        ("attn_implementation", "flash_attention_3", "pip install kernels,"),
        ("optim", "paged_adamw_8bit", "pip install bitsandbytes."),
        ("tuning", "qlora", "pip install bitsandbytes."),
        ("deepspeed", "zero3", "pip install deepspeed."),
    ],
)
def test_a_missing_package_is_reported_with_how_to_install_it(key, value, reported):
    message = next(missing_packages({key: value}))

    assert message.startswith(f"{key}")
    assert reported in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("report_to", value) for value in ("none", "all", None, [], "kubeflow")),
        *(("attn_implementation", value) for value in ("auto", "sdpa", "eager")),
        *(("optim", value) for value in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd")),
        *(("tuning", value) for value in ("lora", "full")),
        ("deepspeed", None),
    ],
)
def test_what_needs_no_package_says_nothing(key, value):
    assert list(missing_packages({key: value})) == []


def test_nothing_is_reported_where_all_is_installed(monkeypatch):
    monkeypatch.setattr(rules, "find_spec", lambda name: name)
    assert list(missing_packages({"report_to": [*INTEGRATION_TO_CALLBACK]})) == []
    for name in OPTIMIZERS:
        assert list(missing_packages({"optim": name})) == []


def test_the_names_of_report_to_are_those_of_transformers():
    assert rules._REPORTS.keys() == INTEGRATION_TO_CALLBACK.keys()


def test_all_missing_packages_are_reported_in_one_message_with_their_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").touch()
    Path("run.yaml").write_text(WHOLE + "report_to: [wandb, mlflow]\ntuning: qlora\n")
    early = read_early("run.yaml", ["--optim", "lion_8bit"])

    found = early.located(missing_packages({**vars(early.model), **early.training}))

    assert [line.partition(" ")[0] for line in found] == [
        "run.yaml:5:",
        "run.yaml:5:",
        "command",
        "run.yaml:6:",
    ]


def test_a_run_from_python_looks_before_it_reads_or_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("not read\n")
    Path("run.yaml").write_text(WHOLE + "optim: lion_8bit\n")

    with pytest.raises(ConfigError, match=r"^optim: lion_8bit needs bitsandbytes, which is not installed\."):
        train_run(load_config("run.yaml"))
    assert not Path("out").exists()
