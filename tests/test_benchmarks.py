"""The scripts of benchmarks/ start. How fast they are is no test."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(one for one in (ROOT / "benchmarks").glob("*.py") if "__main__" in one.read_text("utf-8"))


@pytest.mark.slow
def test_each_script_imports_what_it_needs_and_says_what_it_measures():
    command = [sys.executable, "-m", "tests.helps", *map(str, SCRIPTS)]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert len(said) == len(SCRIPTS) > 15
    assert {name: text for name, (code, text) in said.items() if code} == {}
    assert [name for name, (_, text) in said.items() if f"usage: {Path(name).name}" not in text] == []


def test_every_script_is_named_on_the_page_of_results_or_on_one_of_its_own():
    pages = "".join(one.read_text("utf-8") for one in (ROOT / "benchmarks/results").glob("*.md"))

    assert [one.name for one in SCRIPTS if f"benchmarks/{one.name}" not in pages] == []


def test_the_first_table_of_the_gpu_page_has_the_numbers_of_its_json():
    results = ROOT / "benchmarks/results"
    page = (results / "2026-11-29-gpu.md").read_text("utf-8")
    parts = json.loads((results / "2026-11-29-gpu.json").read_text("utf-8"))["parts"]

    rows = []
    for name in ("lora-4096", "lora-8192", "full-4096", "full-8192"):
        run, memory = parts[name], parts[name]["memory"]
        how, tokens = name.split("-")
        rows.append(
            f"| {how.replace('lora', 'LoRA')}, {int(tokens):,} "
            f"| {run['seconds of a step, by the clock']:.2f} s | {run['tokens a second']:,} "
            f"| {run['mfu']['median']:.0%} | {run['data wait, share']:.1%} "
            f"| {memory['peak'] / 2**20:,.0f} MiB | {memory['foreseen'] / memory['peak'] - 1:+.1%} |"
        )
    assert "\n".join(rows) in page


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_all_sides_of_the_losss_benchmark_compute_the_same(head, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS[0].parent))
    loss = importlib.import_module("loss")
    monkeypatch.setattr(loss, "pin", lambda: None)  # it would hold for the tests after this one
    for name, size in {"TOKENS": 90, "TARGETS": 40, "WIDTH": 8, "VOCABULARY": 50}.items():
        monkeypatch.setattr(loss, name, size)

    found = {side: [loss.run_side(side, head)] for side in loss.SIDES}
    loss.compare(found)  # ends the process where one computes something else

    assert found["all"][0]["loss"] == pytest.approx(math.log(50), rel=0.1)
