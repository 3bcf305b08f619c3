"""What a command imports before it works, and what it says meanwhile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vlcpt
from vlcpt.demo import base_path

# Of TrainingArguments' own import peft is a part, in transformers.trainer_utils.
TRAINER, MODEL = "transformers.trainer", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"
# In one process, which imports torch once: what is not loaded after one was not loaded by those before.
COMMANDS = [
    ["inspect", "run.yaml"],
    ["prepare", "run.yaml", "--output", "shards"],
    ["check", "run.yaml"],
    ["check", "again.yaml"],
]
CODE = """
import json, os, sys
from pathlib import Path
from vlcpt.cli import app
for number, command in enumerate(json.loads(sys.argv[1])):
    with open(f"stderr {number}", "w") as errors:
        os.dup2(errors.fileno(), 2)
    try:
        app(command)
    except SystemExit as done:
        code = done.code
    sys.stderr.flush()
    Path(f"done {number}").write_text(json.dumps([code, sorted(sys.modules)]))
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Of each command: its exit code, the modules that are loaded at its end, and what it said."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"text": f"Valve {n} <trainable_text>is open.</trainable_text>"} for n in range(5)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    for name, output in (("run", "out"), ("again", "full")):
        (folder / f"{name}.yaml").write_text(
            f"model_name_or_path: {base_path()}\ntrain_data: a.jsonl\noutput_dir: {output}\n"
            "max_length: 64\nbf16: true\n"
        )
    (folder / "full/checkpoint-1").mkdir(parents=True)
    ended = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(COMMANDS)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(vlcpt.__file__).parents[1])},
    )
    assert ended.returncode == 0
    return [
        (*json.loads((folder / f"done {number}").read_text()), (folder / f"stderr {number}").read_text())
        for number in range(len(COMMANDS))
    ]


@pytest.mark.parametrize(
    ("number", "absent"),
    [(0, {TRAINER, MODEL, "datasets"}), (1, {TRAINER, MODEL, "datasets"}), (2, {TRAINER, "datasets"})],
)
def test_a_command_that_trains_nothing_imports_no_trainer(done, number, absent):
    """``bf16: true`` is for the machine that trains: these commands pass it on any."""
    code, modules, said = done[number]

    assert code == 0, said
    assert "transformers.training_args" in modules  # or nothing would be shown
    assert set(modules) & absent == set()
    assert said.startswith("vlcpt: run.yaml is read; loading torch and transformers …\n")


def test_check_says_first_what_train_refuses_about_output_dir(done):
    code, _, said = done[3]

    assert code == 0
    assert said.startswith("vlcpt: vlcpt train would refuse this: output_dir full is not empty. Give")
