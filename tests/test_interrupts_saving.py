"""Tests of vlcpt/interrupts.py: SIGTERM and SIGINT save within one step, and end with their code."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.processes import Started, start_ranks
from tests.support import wait_for
from vlcpt.training.checkpoints.files import list_checkpoints, verify

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow, pytest.mark.alone]


STARTED: list[Started] = []


@pytest.fixture(autouse=True)
def none_left():
    """Whatever a test started ends with it."""
    yield
    while STARTED:
        STARTED.pop().kill()


class Run:
    """A run, on one rank or more, each a process group of its own; or all of them by torchrun."""

    def __init__(
        self, folder: Path, base: Path, *, ranks: int = 1, torchrun: bool = False, **settings: object
    ) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        for old in [
            *folder.glob("began-*"),
            *folder.glob("ended-*"),
            *folder.glob("pid.*"),
            folder / "log.txt",
        ]:
            old.unlink(missing_ok=True)
        command = ["tests.training.stoppable", str(folder), json.dumps({"base": str(base), **settings})]
        if torchrun:
            command = [
                *("torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"),
                *command,
            ]
        if ranks > 1 and not torchrun:
            self.processes, self.store = start_ranks(command, folder / "log.txt", ranks)
        else:
            self.processes = [Started(command, folder / "log.txt", environment={"DS_ACCELERATOR": "cpu"})]
        STARTED.extend(self.processes)

    @property
    def has_ended(self) -> bool:
        return any(process.poll() is not None for process in self.processes)

    def wait_in_step(self, step: int, rank: int = 0) -> None:
        mark = self.folder / f"began-{step}.{rank}"
        wait_for(lambda: mark.exists() or self.has_ended, 300)
        assert not self.has_ended, self.output

    def pid(self, rank: int) -> int:
        return int((self.folder / f"pid.{rank}").read_text())

    def end(self) -> int:
        """The exit code of the first rank that has another than 0, once all have ended by themselves."""
        return next(filter(None, [process.wait(300) for process in self.processes]), 0)

    @property
    def output(self) -> str:
        return (self.folder / "log.txt").read_text()

    @property
    def steps(self) -> list[int]:
        return [int(one.name.rpartition("-")[2]) for one in list_checkpoints(self.folder / "out")]


def result(folder: Path) -> dict[str, object]:
    (path,) = (folder / "out").glob("*model.safetensors")
    return load_file(path)


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "out/train_log.jsonl").read_text().splitlines()
    return [(one["step"], one["loss"]) for one in map(json.loads, lines) if "loss" in one]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("whole")
    run = Run(folder, tiny_model_dir)
    assert run.end() == 0, run.output
    return folder


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_saves_within_one_step_and_the_rest_follows_as_if_nothing_had_been(
    tmp_path, tiny_model_dir, uninterrupted, number, code, workers
):
    """With workers the signal goes to the whole group, as a terminal or a scheduler sends it."""
    run = Run(tmp_path, tiny_model_dir, seconds=1, workers=workers, save_strategy="no")
    run.wait_in_step(3)
    (os.killpg if workers else os.kill)(run.processes[0].pid, number)

    assert run.end() in (code, -number if number == signal.SIGINT else code), run.output
    assert "interrupted after step 3: checkpoint-3 is saved" in run.output
    assert run.steps == [3]
    verify(tmp_path / "out/checkpoint-3")

    resumed = Run(tmp_path, tiny_model_dir, resume=True)
    assert resumed.end() == 0, resumed.output
    assert not (tmp_path / "began-3.0").exists()
    assert losses(tmp_path) == losses(uninterrupted)
    expected, found = result(uninterrupted), result(tmp_path)
    assert all((found[name] == one).all() for name, one in expected.items())


def test_a_second_signal_ends_at_once(tmp_path, tiny_model_dir):
    run = Run(tmp_path, tiny_model_dir, seconds=30)
    run.wait_in_step(1)
    os.kill(run.processes[0].pid, signal.SIGTERM)
    os.kill(run.processes[0].pid, signal.SIGTERM)  # torchrun sends it on to who has it already
    wait_for(lambda: "stopping after this step, saving a checkpoint; send it again" in run.output, 1)
    time.sleep(2.5)
    assert not run.has_ended

    sent = time.monotonic()
    os.kill(run.processes[0].pid, signal.SIGTERM)

    assert run.end() == 143
    assert time.monotonic() - sent < 5
    assert run.steps == []


def test_what_is_saved_already_is_not_saved_again(tmp_path, tiny_model_dir):
    run = Run(tmp_path, tiny_model_dir, seconds=1, save_strategy="steps", save_steps=1, steps=4)
    run.wait_in_step(3)
    before = (tmp_path / "out/checkpoint-2").stat().st_mtime_ns
    os.kill(run.processes[0].pid, signal.SIGTERM)

    assert run.end() == 143, run.output
    assert run.steps == [1, 2, 3]
    assert (tmp_path / "out/checkpoint-2").stat().st_mtime_ns == before


@pytest.mark.parametrize("deepspeed", [None, "zero2"])
def test_when_one_rank_gets_the_signal_all_save_together(tmp_path, tiny_model_dir, deepspeed):
    """torchrun ends the other rank as soon as it sees the first one gone."""
    more = {"ranks": 2, "deepspeed": deepspeed}
    run = Run(tmp_path, tiny_model_dir, torchrun=True, seconds=1, save_strategy="no", **more)
    run.wait_in_step(2, rank=1)
    os.kill(run.pid(1), signal.SIGTERM)

    assert run.end() != 0
    assert "interrupted after step 2: checkpoint-2 is saved" in run.output
    assert run.steps == [2]
    names = verify(tmp_path / "out/checkpoint-2").files
    assert {"rng_state_0.pth", "rng_state_1.pth"} < names.keys()

    resumed = Run(tmp_path, tiny_model_dir, resume=True, **more)
    assert resumed.end() == 0, resumed.output
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3, 4, 5]
