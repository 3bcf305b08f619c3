"""What a run writes about itself; tests/report/pages/test_run.py reads the page."""

import json
import logging
import re
from io import StringIO
from pathlib import Path

import pytest
from markupsafe import escape
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments
from typer.testing import CliRunner

from tests.processes import Started
from tests.support import wait_for, write_run
from vlcpt.cli import app
from vlcpt.config.yaml import Configs, load_config
from vlcpt.report.pages.run import run_page
from vlcpt.runs import page as module
from vlcpt.runs.page import SHARE, Budget, RunPage
from vlcpt.runs.train import train_run

QUIET = Console(file=StringIO(), width=100)


def configs(folder: Path) -> Configs:
    """A run of two steps."""
    lines = ("max_steps: 2", "use_cpu: true", "dataloader_num_workers: 0", "logging_steps: 1")
    return load_config(write_run(folder, *lines))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def begun(folder: Path, clock: Clock | None = None) -> RunPage:
    (folder / "config.yaml").write_text("tuning: lora\n")
    page = RunPage(folder, clock=clock or Clock())
    page.begin()
    return page


def facts(folder: Path) -> dict[str, object]:
    return json.loads((folder / "run.json").read_text())


def log(page: RunPage, folder: Path) -> None:
    page.on_log(TrainingArguments(folder, use_cpu=True), TrainerState(), TrainerControl())


@pytest.mark.parametrize("cost", [0.3, 2.0, 9.0])
def test_pages_take_less_than_one_percent_of_a_run_the_last_one_included(cost: float) -> None:
    clock = Clock()
    budget, written = Budget(clock=clock), 0
    for _ in range(20_000):  # steps of a second
        clock.now += 1.0
        if budget.allows:
            written += 1
            with budget.spent():
                clock.now += cost
    with budget.spent():
        clock.now += cost

    assert written > 10
    assert budget.seconds <= SHARE * clock.now


def test_the_first_log_line_has_a_page_and_the_next_ones_as_soon_as_there_is_time(
    tmp_path: Path, monkeypatch
) -> None:
    clock = Clock()

    def slow(folder: Path) -> str:
        clock.now += 1.0
        return ""

    monkeypatch.setattr("vlcpt.report.pages.run.run_page", slow)
    page = begun(tmp_path, clock)
    written = []

    for clock.now in (5.0, 6.0, 1000.0):
        log(page, tmp_path)
        written.append((tmp_path / "report.html").exists())
        (tmp_path / "report.html").unlink(missing_ok=True)

    assert written == [True, False, True]
    assert facts(tmp_path)["state"] == "running"


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (ValueError("row 7 is bad"), "failed", "row 7 is bad (before step 1)"),
        (KeyError("odd"), "failed", "KeyError: 'odd' (before step 1)"),
        (KeyboardInterrupt(), "interrupted", "By Ctrl-C (SIGINT), before step 1."),
        (SystemExit(143), "interrupted", "By SIGTERM, before step 1."),
    ],
)
def test_every_end_is_noted_and_goes_on_as_it_was(
    tmp_path: Path, error: BaseException, state: str, message: str
) -> None:
    page = begun(tmp_path)

    with pytest.raises(type(error)) as raised, page.kept():
        raise error

    assert raised.value is error
    assert (facts(tmp_path)["state"], facts(tmp_path)["message"]) == (state, message)
    assert message in (tmp_path / "report.html").read_text().replace("&#39;", "'")


def test_the_seconds_of_the_last_page_are_counted(tmp_path: Path, monkeypatch) -> None:
    clock = Clock()

    def slow(folder: Path) -> str:
        clock.now += 3.0
        return ""

    monkeypatch.setattr("vlcpt.report.pages.run.run_page", slow)
    with begun(tmp_path, clock).kept():
        pass

    assert facts(tmp_path)["page_seconds"] == 3.0


@pytest.mark.slow
@pytest.mark.alone
def test_a_run_that_is_killed_leaves_a_page_and_is_reported_as_killed(tmp_path: Path) -> None:
    lines = ("max_steps: 100000", "use_cpu: true", "dataloader_num_workers: 0", "logging_steps: 1")
    run = Started(["vlcpt", "train", str(write_run(tmp_path, *lines))], tmp_path / "log.txt")
    out = tmp_path / "out"
    try:
        wait_for(lambda: (out / "report.html").exists() or run.poll() is not None, 120)
        assert run.poll() is None, (tmp_path / "log.txt").read_text()
        before = head(run_page(out))
    finally:
        run.kill()
    left = head((out / "report.html").read_text())
    done = CliRunner().invoke(app, ["report", str(out)])

    assert done.exit_code == 0, done.output
    for text in (before, left):
        assert 'class="state running"' in text
        assert re.search(r"as of 20\d\d-\d\d-\d\d \d\d:\d\d UTC; if that is long ago, it was killed", text)
    now = head((out / "report.html").read_text())
    assert 'class="state killed"' in now
    assert re.search(r"last written 20\d\d-\d\d-\d\d \d\d:\d\d UTC; no process holds its folder", now)
    assert facts(out)["state"] == "running"  # or nothing would have been told


def head(page: str) -> str:
    return page.partition("<main")[0]


def test_a_page_that_cannot_be_drawn_is_one_warning_and_no_failure(tmp_path, monkeypatch, caplog) -> None:
    def broken(folder: Path) -> str:
        raise RuntimeError("no fonts")

    monkeypatch.setattr("vlcpt.report.pages.run.run_page", broken)
    page = begun(tmp_path)
    with caplog.at_level(logging.WARNING), page.kept():
        page._attempt(page.draw)

    assert [one.getMessage().count("RuntimeError: no fonts") for one in caplog.records] == [1]
    assert facts(tmp_path)["state"] == "finished"


def test_a_disk_that_ended_the_run_is_not_reported_again_by_its_page(tmp_path, monkeypatch, caplog) -> None:
    def full(folder: Path) -> str:
        raise OSError("no space left")

    monkeypatch.setattr("vlcpt.report.pages.run.run_page", full)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(OSError, match="checkpoint-2"),
        begun(tmp_path).kept(),
    ):
        raise OSError("checkpoint-2 could not be written")

    assert caplog.records == []
    assert facts(tmp_path)["state"] == "failed"


def test_nothing_is_written_by_another_rank_or_before_the_folder_is_the_runs(tmp_path: Path) -> None:
    other = RunPage(tmp_path, is_main=False)
    other.begin()
    with other.kept():
        pass
    with pytest.raises(ValueError, match="not free"), RunPage(tmp_path).kept():
        raise ValueError("not free")

    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_counts_its_starts_and_all_of_its_time(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"starts": 2, "seconds": 60.5}')
    (tmp_path / "train_log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    clock = Clock()
    page = RunPage(tmp_path, clock=clock)
    page.begin(resumes=True)
    clock.now = 10.0
    page.note()

    assert (facts(tmp_path)["starts"], facts(tmp_path)["seconds"]) == (3, 70.5)


def test_a_finished_run_leaves_its_page(tmp_path: Path) -> None:
    train_run(configs(tmp_path), QUIET, command="vlcpt train my.yaml")
    text, found = (tmp_path / "out/report.html").read_text(), facts(tmp_path / "out")

    assert (found["state"], found["steps_planned"], found["message"]) == ("finished", 2, "")
    assert [one["tower"] for one in found["towers"]] == ["vision", "merger", "language"]
    assert found["versions"]["processes"] == "1"
    for part in (
        "Training loss",
        "Where every token went",
        "What trains",
        "vlcpt train my.yaml",
        "max_steps",
    ):
        assert part in text
    assert "is missing" not in text


def test_a_run_that_fails_while_it_reads_leaves_its_page_and_can_be_started_again(tmp_path: Path) -> None:
    run = configs(tmp_path)
    good = (tmp_path / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text('{"text": "a <trainable_text>b"}\n')
    with pytest.raises(ValueError, match="trainable_text") as raised:
        train_run(run, QUIET)

    assert facts(tmp_path / "out")["state"] == "failed"
    assert facts(tmp_path / "out")["message"] == f"{raised.value} (before step 1)"
    assert escape(str(raised.value)) in (tmp_path / "out/report.html").read_text()

    (tmp_path / "train.jsonl").write_text(good)
    train_run(configs(tmp_path), QUIET)
    assert facts(tmp_path / "out")["state"] == "finished"


def test_a_run_that_fails_leaves_its_page_with_the_reason(tmp_path: Path, monkeypatch) -> None:
    def stop(self: RunPage, *args: object, **kwargs: object) -> None:
        self._step = 1
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(module.RunPage, "on_step_end", stop)
    with pytest.raises(RuntimeError, match="the device is gone"):
        train_run(configs(tmp_path), QUIET)

    assert facts(tmp_path / "out")["message"] == "RuntimeError: the device is gone (after step 1)"
    assert "the device is gone" in (tmp_path / "out/report.html").read_text()
