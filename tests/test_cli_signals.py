"""Signals to ``vlcpt train``: what it saves, says and exits with."""

import json
import os
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlcpt.cli import app
from vlcpt.demo import base_path
from vlcpt.training.checkpoints.files import list_checkpoints, verify
from vlcpt.training.checkpoints.resume import StepSeeds
from vlcpt.training.guards import EngineCheck

CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)]


@pytest.fixture(autouse=True)
def handlers_stay():
    """A run that is interrupted leaves SIGCHLD to itself, because its process ends."""
    before = {number: signal.getsignal(number) for number in (*dict(CODES), signal.SIGCHLD)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that run under nohup inherit that it is ignored
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def train(tmp_path: Path):
    """A function that runs the command on three rows, one a step."""
    rows = [{"text": f"one two {number}"} for number in range(3)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my.yaml").write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: train.jsonl\noutput_dir: out\nmax_length: 32\n"
        "packing: false\nnum_train_epochs: 1\nuse_cpu: true\ndataloader_num_workers: 0\nsave_strategy: 'no'\n"
        "report_to: none\n"
    )
    return lambda *more: CliRunner().invoke(app, ["train", str(tmp_path / "my.yaml"), *more])


def send(monkeypatch, to: type, method: str, number: int, step: int) -> None:
    """Let this process get a signal when a callback is called at a step."""
    original = getattr(to, method)

    def called(self, args, state, control, **kwargs):
        if state.global_step == step:
            os.kill(os.getpid(), number)
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(to, method, called)


@pytest.mark.parametrize(("number", "code"), CODES)
def test_in_a_step_it_saves_and_exits_with_the_signals_code(train, tmp_path, monkeypatch, number, code):
    send(monkeypatch, StepSeeds, "on_step_begin", number, step=1)

    done = train()

    assert done.exit_code == code, done.output
    assert "interrupted after step 2: checkpoint-2 is saved" in done.output
    (saved,) = list_checkpoints(tmp_path / "out")
    assert saved.name == "checkpoint-2"
    verify(saved)


@pytest.mark.parametrize(("number", "code"), CODES)
def test_before_the_first_step_it_says_that_there_is_nothing_to_save(
    train, tmp_path, monkeypatch, number, code
):
    with monkeypatch.context() as patch:
        send(patch, EngineCheck, "on_train_begin", number, step=0)
        done = train()

    assert done.exit_code == code, done.output
    assert (
        "interrupted before the first step: nothing is trained yet, so there is no checkpoint" in done.output
    )
    assert not list_checkpoints(tmp_path / "out")

    again = train("--resume_from_checkpoint", "auto")  # as it says
    assert again.exit_code == 0, again.output
    assert "step 1/3" in again.output
