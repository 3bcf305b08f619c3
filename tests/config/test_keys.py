"""Mistakes in a configuration that are told before anything heavy is imported."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

from vlcpt.config import keys
from vlcpt.config.keys import check_early, plain_types
from vlcpt.config.schema import CPTConfig, DataConfig, ModelConfig
from vlcpt.config.yaml import load_config
from vlcpt.errors import ConfigError

WHOLE = "model_name_or_path: org/model\ntrain_data: a.jsonl\noutput_dir: out\n"


def test_the_keys_and_types_read_from_the_source_are_those_of_the_dataclasses():
    """TrainingArguments is read by its text: a release that says its fields otherwise shows here."""
    types = plain_types()
    hints = {}
    for cls in (ModelConfig, DataConfig, CPTConfig):
        known = get_type_hints(cls)
        hints |= {item.name: known[item.name] for item in fields(cls)}

    assert types.keys() == hints.keys()
    plain = {name: hint for name, hint in types.items() if hint is not None}
    assert len(plain) > 100
    assert {name: hint for name, hint in plain.items() if hint != hints[name]} == {}


@pytest.mark.parametrize(
    "lines",
    [
        "max_lenght: 8\n",
        "learning_rate: fast\n",
        "train_merger: [1]\n",
        "seed: 1\nseed: 2\n",
        "trust_remote_code: true\n",
        f"run_name: hf_{'a' * 34}\n",
        "nested: {a: 1\n",
    ],
)
def test_what_is_told_early_has_the_message_that_it_would_have_later(tmp_path, lines):
    path = tmp_path / "run.yaml"
    path.write_text(WHOLE + lines)

    said = []
    for look in (check_early, load_config):
        with pytest.raises(ConfigError) as caught:
            look(path)
        said.append(str(caught.value))

    assert said[0] == said[1]


def test_a_missing_key_is_told_early(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(WHOLE.replace("output_dir: out\n", ""))

    with pytest.raises(ConfigError, match=r"run\.yaml: output_dir is missing\. Add a line output_dir: …"):
        check_early(path)


def test_a_configuration_that_may_be_right_is_passed(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(WHOLE + "learning_rate: 1e-5\nlr_scheduler_type: cosine\nlora_towers: [language]\n")

    check_early(path, ["--report-to", "none", "--num_train_epochs=2", "--use_cpu"])


def test_another_layout_of_transformers_leaves_it_to_the_later_look(tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text(WHOLE + "max_lenght: 8\n")
    monkeypatch.setattr(keys, "_CLASSES", (("transformers", "elsewhere.py", ("TrainingArguments",)),))
    plain_types.cache_clear()
    try:
        check_early(path)
    finally:
        plain_types.cache_clear()


@pytest.mark.parametrize("command", ["train", "check", "inspect", "eval", "prepare"])
def test_a_misspelt_key_is_told_without_torch_or_transformers(tmp_path, command):
    path = tmp_path / "run.yaml"
    path.write_text(WHOLE + "max_lenght: 8\n")
    more = {"eval": ["--checkpoint", "out"], "prepare": ["--output", "shards"]}.get(command, [])
    code = (
        "import sys; from vlcpt.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as done: assert done.code == 2, done.code\n"
        "assert not {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, command, str(path), *more],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(keys.__file__).parents[2])},
    )

    assert done.returncode == 0, done.stderr
    assert "max_lenght: unknown key. Did you mean max_length?" in done.stderr
