"""Mistakes in a configuration that are told before anything heavy is imported."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

from vlcpt.config import keys
from vlcpt.config.keys import check_early, newer_keys, plain_types, read_keys
from vlcpt.config.schema import CPTConfig, DataConfig, ModelConfig
from vlcpt.config.yaml import load_config
from vlcpt.errors import ConfigError

MAKE = runpy.run_path(str(Path(__file__).parents[2] / "docs/make_keys.py"))
WHOLE = "model_name_or_path: org/model\ntrain_data: a.jsonl\noutput_dir: out\n"


def test_the_keys_and_plain_types_of_the_file_are_those_of_the_dataclasses():
    types = plain_types()
    hints = {}
    for cls in (ModelConfig, DataConfig, CPTConfig):
        known = get_type_hints(cls)
        hints |= {item.name: known[item.name] for item in fields(cls)}

    assert hints.keys() <= {*types, *newer_keys()}
    plain = {name: hint for name, hint in types.items() if hint is not None}
    assert len(plain) > 50
    assert {name: hint for name, hint in plain.items() if hint != hints[name]} == {}


def test_the_file_is_what_its_script_writes():
    """Keys, types, defaults and help are promised: what changes here is a change for users."""
    made = json.loads(json.dumps(MAKE["keys"]()))
    stored = json.loads(MAKE["FILE"].read_text("utf-8"))

    for section in ("model", "data", "source", "training"):
        assert stored[section] == made[section]
    if stored["transformers"] == made["transformers"]:  # of another release, its fields may be others
        assert stored["trainer"].keys() == made["trainer"].keys()
    assert MAKE["FILE"].read_text("utf-8") == MAKE["text"](stored)


def test_a_field_of_a_newer_transformers_is_left_to_the_later_look(tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text(WHOLE + "torch_compile_mode: default\n")
    stored = dict(read_keys())
    stored["trainer"] = {name: key for name, key in stored["trainer"].items() if name != "torch_compile_mode"}
    monkeypatch.setattr(keys, "read_keys", lambda: stored)
    caches = (keys.plain_types, keys.newer_keys)
    try:
        for release, known in ((stored["transformers"], False), ("4.0", True)):
            monkeypatch.setitem(stored, "transformers", release)
            for one in caches:
                one.cache_clear()
            if known:
                check_early(path)
            else:
                with pytest.raises(ConfigError, match="torch_compile_mode: unknown key"):
                    check_early(path)
        path.write_text(WHOLE + "max_lenght: 8\n")
        with pytest.raises(ConfigError, match="Did you mean max_length"):
            check_early(path)
    finally:
        for one in caches:
            one.cache_clear()


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
