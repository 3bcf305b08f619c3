"""Packages that a key needs are looked for before anything is read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from vlcpt.config import packages
from vlcpt.config.keys import check_packages
from vlcpt.config.packages import missing_packages, require_packages
from vlcpt.config.trainer_args import PLAIN_OPTIMIZERS
from vlcpt.config.yaml import load_config
from vlcpt.errors import ConfigError
from vlcpt.runs.train import train_run

WHOLE = "model_name_or_path: org/model\ntrain_data: a.jsonl\noutput_dir: out\nuse_cpu: true\n"


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)


@pytest.fixture
def all_installed(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: name)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("report_to", "wandb", "pip install wandb,"),
        ("report_to", ["none", "tensorboard"], "pip install tensorboard,"),
        ("attn_implementation", "flash_attention_2", "pip install flash-attn --no-build-isolation,"),
        ("attn_implementation", "flash_attention_3", "pip install kernels,"),
        ("optim", "paged_adamw_8bit", "pip install bitsandbytes."),
        ("tuning", "qlora", "pip install bitsandbytes."),
        ("deepspeed", "zero3", "pip install deepspeed."),
    ],
)
def test_a_missing_package_is_told_with_how_to_install_it(nothing_installed, key, value, told):
    (message,) = missing_packages(key, value)

    assert told in message


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
def test_what_needs_no_package_says_nothing(nothing_installed, key, value):
    assert list(missing_packages(key, value)) == []


def test_nothing_is_told_where_all_is_installed(all_installed):
    assert all(not list(missing_packages("report_to", name)) for name in INTEGRATION_TO_CALLBACK)
    assert all(not list(missing_packages("optim", name)) for name in PLAIN_OPTIMIZERS)


def test_the_names_of_report_to_are_those_of_transformers():
    assert packages._REPORTS.keys() == INTEGRATION_TO_CALLBACK.keys()
    (message,) = missing_packages("report_to", "tensor_board")
    assert message.startswith("report_to: tensor_board is not known. Choose of: azure_ml, ")


def test_all_missing_packages_are_told_in_one_message_with_their_lines(tmp_path, nothing_installed):
    path = tmp_path / "run.yaml"
    path.write_text(WHOLE + "report_to: [wandb, mlflow]\ntuning: qlora\n")

    with pytest.raises(ConfigError) as caught:
        check_packages(path, ["--optim", "lion_8bit"])

    assert [
        line.replace(str(path), "run.yaml").partition(" ")[0] for line in str(caught.value).splitlines()
    ] == [
        "run.yaml:5:",
        "run.yaml:5:",
        "command",
        "run.yaml:6:",
    ]


def test_a_run_from_python_looks_before_it_reads_or_writes(tmp_path, nothing_installed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("not read\n")
    Path("run.yaml").write_text(WHOLE + "optim: lion_8bit\n")

    with pytest.raises(ConfigError, match=r"^optim: lion_8bit needs bitsandbytes, which is not installed\."):
        train_run(load_config("run.yaml"))
    assert not Path("out").exists()


def test_require_packages_says_nothing_of_defaults(nothing_installed):
    require_packages({"report_to": [], "optim": "adamw_torch_fused", "tuning": "lora", "deepspeed": None})


def test_the_command_tells_it_with_2_without_torch_and_leaves_nothing(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(WHOLE + "report_to: tensor_board\n")
    code = (
        "import sys; from vlcpt.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as done: assert done.code == 2, done.code\n"
        "assert not {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(packages.__file__).parents[2])},
    )

    assert done.returncode == 0, done.stderr
    assert "run.yaml:5: report_to: tensor_board is not known." in done.stderr
    assert not (tmp_path / "out").exists()
