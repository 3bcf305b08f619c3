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


def command(folder, *arguments):
    """Run a command in a child process; what it said, and the modules it had loaded at its end."""
    code = (
        "import sys; from vlcpt.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as done: code = done.code\n"
        "open('modules', 'w').write('\\n'.join(sys.modules))\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(vlcpt.__file__).parents[1])},
    )
    return done, set((folder / "modules").read_text().split())


@pytest.fixture
def folder(tmp_path):
    """A run of a few rows."""
    rows = [{"text": f"Valve {n} <trainable_text>is open.</trainable_text>"} for n in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: a.jsonl\noutput_dir: out\n"
        "max_length: 64\nbf16: true\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["inspect", "run.yaml"], {TRAINER, MODEL, "datasets"}),
        (["prepare", "run.yaml", "--output", "shards"], {TRAINER, MODEL, "datasets"}),
        (["check", "run.yaml"], {TRAINER, "datasets"}),
    ],
)
def test_a_command_that_trains_nothing_imports_no_trainer(folder, arguments, absent):
    """``bf16: true`` is for the machine that trains: these commands pass it on any."""
    done, modules = command(folder, *arguments)

    assert done.returncode == 0, done.stderr
    assert "transformers.training_args" in modules  # or nothing would be shown
    assert modules & absent == set()
    assert done.stderr.startswith("vlcpt: run.yaml is read; loading torch and transformers …\n")


def test_check_says_first_what_train_refuses_about_output_dir(folder):
    (folder / "out/checkpoint-1").mkdir(parents=True)
    done, _ = command(folder, "check", "run.yaml")

    assert done.returncode == 0
    assert done.stderr.startswith("vlcpt: vlcpt train would refuse this: output_dir out is not empty. Give")
