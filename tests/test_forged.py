"""What a checkpoint holds may be forged or broken: every command says so in one line, and soon."""

import json
import re
import resource
import shutil
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.forged import ADAPTERS, ADVICE, BASES, PICKLES, STATES, WEIGHTS, remanifest
from vlcpt import ModelConfig, load_model
from vlcpt.cli import app
from vlcpt.demo import base_path

SECONDS = 30  # of a machine that does other things as well; each takes two or three
ROOM = 2 * 2**20  # kilobytes of memory that a message may take beyond what was in use

CONFIG = f"""model_name_or_path: {base_path()}
train_data: train.jsonl
eval_data: train.jsonl
eval_strategy: "no"
eval_on_start: false
output_dir: out
max_length: 64
max_steps: 2
save_steps: 1
use_cpu: true
dataloader_num_workers: 0
report_to: none
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with adapters."""
    folder = tmp_path_factory.mktemp("run")
    rows = [{"text": f"one <trainable_text>two {n}</trainable_text>"} for n in range(4)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my.yaml").write_text(CONFIG)
    done = CliRunner().invoke(app, ["train", str(folder / "my.yaml")])
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def copied(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(run, tmp_path / "run")


COMMANDS = {
    "resume": "train run/my.yaml --max_steps 4 --resume_from_checkpoint run/out/checkpoint-2",
    "go on": "train run/my.yaml --output_dir new --adapter_name_or_path run/out/checkpoint-2",
    "eval": "eval run/my.yaml --checkpoint run/out/checkpoint-2",
    "merge": "merge run/out/checkpoint-2 merged",
    "push": "push run/out/checkpoint-2 me/mine --base_model me/base --dry-run",
}


def refused(command: str, folder: Path) -> str:
    """What a command says: one line, in time, without much memory, with no advice and no code run."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    result = CliRunner().invoke(app, command.split())
    took = time.monotonic() - started
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    assert isinstance(result.exception, SystemExit), (command, repr(result.exception))
    assert result.exit_code in (1, 2), (command, result.output)
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("vlcpt: "), result.stderr
    assert not [word for word in ADVICE if word in result.output], result.output
    assert "Traceback" not in result.output
    assert took < SECONDS and used < ROOM, (took, used)
    assert not list(folder.rglob("ran"))
    return line


# Each of them in Python, below; some in every command.
SOME = (
    *("r of a billion", "r of 60000", "r of 0", "other layers", "no such layer", "IA3", "deep JSON"),
    *("a tensor missing", "half of the weights", "a petabyte", "a program"),
)
# What a push, which has no base, cannot know.
FOR_THE_BASE = ("other layers", "no such layer", "a tensor missing")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("what", SOME)
def test_a_forged_adapter_is_one_line_that_names_the_file(copied, what, command):
    change, message = (ADAPTERS | PICKLES)[what]
    if command == "push" and what in FOR_THE_BASE:
        pytest.skip("a push has no base to compare with")
    change(copied / "out/checkpoint-2")
    remanifest(copied / "out/checkpoint-2")

    said = refused(COMMANDS[command], copied)

    assert "checkpoint-2" in said
    if command == "resume":
        message += r"|is not that of the adapter in memory: saved with"
    if (command, what) != ("push", "a program"):
        assert re.search(message, said), said


@pytest.mark.parametrize("what", [*ADAPTERS, *PICKLES])
def test_a_forged_adapter_is_a_value_error_in_python(copied, what):
    change, message = (ADAPTERS | PICKLES)[what]
    change(copied / "out/checkpoint-2")

    with pytest.raises(ValueError, match=message) as refusal:
        load_model(ModelConfig(base_path(), adapter_name_or_path=str(copied / "out/checkpoint-2")))

    assert not [word for word in ADVICE if word in str(refusal.value)]
    assert not list(copied.rglob("ran"))


@pytest.mark.parametrize("what", STATES)
def test_a_forged_state_is_one_line_that_names_the_file(copied, what):
    """With a manifest that fits, as whoever forges one makes it."""
    change, message = STATES[what]
    change(copied / "out/checkpoint-2")
    remanifest(copied / "out/checkpoint-2")

    said = refused(COMMANDS["resume"], copied)

    assert "checkpoint-2" in said and re.search(message, said), said


def test_training_continues_from_a_checkpoint_that_was_not_touched(copied):
    """Or the refusals prove nothing."""
    remanifest(copied / "out/checkpoint-2")

    result = CliRunner().invoke(app, COMMANDS["resume"].split())

    assert result.exit_code == 0, result.output
    assert (copied / "out/checkpoint-4").is_dir()


@pytest.fixture(scope="module")
def full(run, tmp_path_factory):
    """A finished run in full."""
    folder = tmp_path_factory.mktemp("full") / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("out"))
    done = CliRunner().invoke(app, ["train", str(folder / "my.yaml"), "--tuning", "full"])
    assert done.exit_code == 0, done.output
    return folder


FULL_COMMANDS = {
    "resume": "train run/my.yaml --tuning full --max_steps 4 --resume_from_checkpoint run/out/checkpoint-2",
    "eval": "eval run/my.yaml --checkpoint run/out/checkpoint-2",
    "merge": "merge run/out/checkpoint-2 merged",
    "push": "push run/out/checkpoint-2 me/mine --dry-run",
}


SOME_MODELS = (
    *("half of the weights", "a petabyte", "a tensor missing", "other shapes", "a program"),
    *("a billion layers", "a vast vocabulary", "a list", "deep JSON"),
)


@pytest.mark.parametrize("command", FULL_COMMANDS)
@pytest.mark.parametrize("what", SOME_MODELS)
def test_a_forged_model_is_one_line_that_names_the_file(full, tmp_path, monkeypatch, what, command):
    monkeypatch.chdir(tmp_path)
    copied = Path(shutil.copytree(full, tmp_path / "run"))
    if command == "resume" and what in BASES:
        pytest.skip("a resume takes the model from the base, and config.json from it too")
    if command == "push" and what == "other shapes":
        pytest.skip("a push has no base to compare with")
    change, message = (WEIGHTS | BASES)[what]
    change(copied / "out/checkpoint-2")
    remanifest(copied / "out/checkpoint-2")

    said = refused(FULL_COMMANDS[command], copied)

    assert "checkpoint-2" in said and re.search(message, said), said


BASE_COMMANDS = {
    "train": "train run/my.yaml --output_dir new --model_name_or_path base",
    "eval": "eval run/my.yaml --model_name_or_path base --checkpoint run/out",
    "merge": "merge run/out merged",
}


@pytest.mark.parametrize("command", BASE_COMMANDS)
@pytest.mark.parametrize("what", SOME_MODELS)
def test_a_forged_base_is_one_line_that_names_the_file(copied, tmp_path, what, command):
    base = Path(shutil.copytree(base_path(), tmp_path / "base"))
    settings = copied / "out/adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": str(base)}))
    change, message = (WEIGHTS | BASES)[what]
    change(base)

    said = refused(BASE_COMMANDS[command], copied)

    assert "base" in said and re.search(message, said), said


@pytest.mark.parametrize("what", [*WEIGHTS, *BASES])
def test_a_forged_base_is_a_value_error_in_python(tmp_path, what):
    base = Path(shutil.copytree(base_path(), tmp_path / "base"))
    change, message = (WEIGHTS | BASES)[what]
    change(base)

    with pytest.raises(ValueError, match=message) as refusal:
        load_model(ModelConfig(str(base)))

    assert not [word for word in ADVICE if word in str(refusal.value)]
