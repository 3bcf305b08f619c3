"""`vlcpt demo`, whole."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlcpt.cli import app
from vlcpt.config.yaml import load_config
from vlcpt.demo.run import copy_inputs, own_commands


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one demo."""
    folder = tmp_path_factory.mktemp("demo")
    started = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-m", "vlcpt", "demo"],
        cwd=folder,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "100"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (folder / "stdout").write_text(run.stdout)
    (folder / "seconds").write_text(str(time.monotonic() - started))
    return folder


def sets(demo: Path, when: str) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads((demo / "vlcpt-demo/demo.json").read_text())[when]["sets"]
    return found


@pytest.mark.slow
@pytest.mark.alone
def test_the_new_domains_perplexity_falls_tenfold(demo: Path) -> None:
    assert sets(demo, "before")["new"]["perplexity"] / sets(demo, "after")["new"]["perplexity"] >= 10


@pytest.mark.slow
@pytest.mark.alone
def test_the_new_domain_is_read_from_the_right_image(demo: Path) -> None:
    after = sets(demo, "after")["new"]

    assert after["shuffled_images_loss"] - after["loss"] >= 0.6931  # a factor of 2 in perplexity
    assert after["blank_images_loss"] > after["loss"]


@pytest.mark.slow
@pytest.mark.alone
def test_the_old_domain_is_kept_within_ten_percent(demo: Path) -> None:
    ratio = sets(demo, "after")["old"]["perplexity"] / sets(demo, "before")["old"]["perplexity"]

    assert ratio < 1.1


@pytest.mark.slow
@pytest.mark.alone
def test_the_demo_ends_within_180_seconds(demo: Path) -> None:
    assert json.loads((demo / "vlcpt-demo/demo.json").read_text())["seconds"] <= 180
    assert float((demo / "seconds").read_text()) <= 180


PAGES = """
import sys, time
from pathlib import Path
import vlcpt.runs.train  # what a run has imported anyway
start = time.process_time()
from vlcpt.report.pages.run import run_page
for _ in range(2):  # the first and the last, which every run draws
    text = run_page(Path(sys.argv[1]))
assert "Training loss" in text
print(time.process_time() - start)
"""


@pytest.mark.slow
@pytest.mark.alone
def test_the_pages_of_the_demo_cost_less_than_a_hundredth_of_its_training(demo: Path) -> None:
    """All pages by the run's own clock; and the imports and the two that each run has, in processor time."""
    folder = demo / "vlcpt-demo"
    run = json.loads((folder / "run.json").read_text())
    done = subprocess.run(
        [sys.executable, "-c", PAGES, str(folder)], capture_output=True, text=True, check=True
    )

    assert 0 < run["page_seconds"] < 0.01 * run["seconds"]
    assert 0 < float(done.stdout) < 0.01 * run["seconds"]


@pytest.mark.slow
@pytest.mark.alone
def test_the_demo_writes_the_standard_folder_and_shows_what_to_type_next(demo: Path) -> None:
    written = {path.name for path in (demo / "vlcpt-demo").iterdir()}
    shown = (demo / "stdout").read_text()

    assert {
        "config.yaml",
        "ledger.json",
        "dropped.jsonl",
        "train_log.jsonl",
        "demo.json",
        "inputs",
    } <= written
    assert "adapter_model.safetensors" in written
    assert "another document's" in shown and "documents," in shown
    assert "vlcpt train vlcpt-demo/inputs/my.yaml" in shown


@pytest.mark.slow
@pytest.mark.alone
def test_the_demos_own_config_can_be_inspected(demo: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(demo / "vlcpt-demo/inputs/demo.yaml"), "--rows", "0"])

    assert result.exit_code == 0, result.output
    assert "targets" in result.output


def test_a_filled_folder_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    result = CliRunner().invoke(app, ["demo", "--output_dir", str(tmp_path)])

    assert result.exit_code == 2
    assert "is not empty" in result.output and "--overwrite" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_closing_commands_work_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inputs = copy_inputs(Path("the demo"), overwrite=False).parent
    _, copy, check, inspect, train = map(shlex.split, own_commands(inputs))

    assert copy[0] == "cp"
    shutil.copy(*copy[1:])
    for command in (check, inspect):
        result = CliRunner().invoke(app, command[1:])
        assert result.exit_code == 0, result.output
    assert load_config(Path(train[2])).training.output_dir == "the demo/my-run"  # and not the demo's own
