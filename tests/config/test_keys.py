"""keys.json: which keys there are, with types, defaults and help."""

import json
import runpy
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from vlcpt.config import keys
from vlcpt.config.keys import known_types, read_keys
from vlcpt.config.schema import DataConfig, ModelConfig
from vlcpt.config.training import CPTConfig
from vlcpt.config.yaml import read_early
from vlcpt.errors import ConfigError

MAKE = runpy.run_path(str(Path(__file__).parents[2] / "docs/make_keys.py"))
WHOLE = f"model_name_or_path: org/model\ntrain_data: {__file__}\noutput_dir: out\n"


def test_the_keys_and_plain_types_of_the_file_are_those_of_the_dataclasses():
    types = known_types()
    hints = {}
    for cls in (ModelConfig, DataConfig, CPTConfig):
        known = get_type_hints(cls)
        hints |= {item.name: known[item.name] for item in fields(cls)}

    assert hints.keys() <= types.keys()
    others = {name: hint for name, hint in types.items() if hint != hints[name]}
    assert len(others) < 20
    # A class of another package is a mapping in YAML.
    assert others.pop("parallelism_config") == dict | None
    # What TrainingArguments types as text or an Enum, and has choices for, is a Literal of these.
    assert {"logging_strategy", "optim", "log_level"} <= others.keys()
    assert all("Literal[" in str(hint) for hint in others.values())
    assert all(
        CPTConfig("out", use_cpu=True, logging_strategy=name) for name in get_args(types["logging_strategy"])
    )


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
    try:
        for release, known in ((stored["transformers"], False), ("4.0", True)):
            monkeypatch.setitem(stored, "transformers", release)
            known_types.cache_clear()
            if known:
                read_early(path)
            else:
                with pytest.raises(ConfigError, match="torch_compile_mode: unknown key"):
                    read_early(path)
        path.write_text(WHOLE + "max_lenght: 8\n")
        with pytest.raises(ConfigError, match="Did you mean max_length"):
            read_early(path)
    finally:
        known_types.cache_clear()
