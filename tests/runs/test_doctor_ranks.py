"""``vlcpt doctor`` on two ranks, with gloo in the place of NCCL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.processes import run_on_ranks
from tests.ranks import run
from vlcpt.runs.doctor.run import CHECKS

pytestmark = [pytest.mark.slow, pytest.mark.alone]
NAMES = [name for name, _ in CHECKS]
PASSED = dict.fromkeys(NAMES, "passed") | {"cached features = computed": "not run"}  # the merger trains
TOWERS = "every rank calls the towers equally"


@pytest.fixture
def config(tiny_model_dir: Path, tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text('{"text": "one two"}\n')
    config = tmp_path / "my.yaml"
    config.write_text(
        f"model_name_or_path: {tiny_model_dir}\ntrain_data: train.jsonl\noutput_dir: out\nmax_length: 96\n"
        "train_merger: true\nlora_r: 4\ndataloader_num_workers: 0\nlearning_rate: 1e-3\nddp_timeout: 120\n"
    )
    return config


def found(output: Path) -> dict[str, dict[str, object]]:
    return {line["name"]: line for line in json.loads(output.read_text())["lines"]}


def statuses(output: Path) -> dict[str, object]:
    return {name: line["status"] for name, line in found(output).items()}


def test_two_ranks_under_torchrun_pass_every_line(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "doctor.json"
    launcher = ["torchrun", "--standalone", "--nproc_per_node", "2", "-m", "vlcpt"]

    done = run([*launcher, "doctor", str(config), "--quick", "--use_cpu", "--output", str(output)])

    assert done.returncode == 0, done.stdout
    assert statuses(output) == PASSED
    assert json.loads(output.read_text())["run"]["engine"] == "DDP"
    assert done.stdout.count("save and resume") == 1  # rank 0 alone prints


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_two_ranks_of_deepspeed_pass_every_line(config: Path, tmp_path: Path, engine: str) -> None:
    output = tmp_path / "doctor.json"

    done = run_on_ranks("tests.runs.doctor_rank", "none", str(config), str(output), engine)

    assert done.returncode == 0, done.stdout
    assert statuses(output) == PASSED, found(output)
    assert json.loads(output.read_text())["run"]["engine"] == f"ZeRO-{engine[-1]}"


def test_features_that_were_computed_ahead_are_read_under_zero3(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "doctor.json"

    done = run_on_ranks("tests.runs.doctor_rank", "cached", str(config), str(output), "zero3")

    assert done.returncode == 0, done.stdout
    assert statuses(output) == {"cached features = computed": "passed"}


def test_a_rank_that_skips_a_tower_fails_its_line_and_no_other(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "doctor.json"

    done = run_on_ranks("tests.runs.doctor_rank", "skip", str(config), str(output))

    assert done.returncode == 0, done.stdout
    lines = found(output)
    assert [name for name, line in lines.items() if line["status"] == "failed"] == [TOWERS]
    assert "rank 0: 2, rank 1: " in str(lines[TOWERS]["detail"])
    assert str(lines["save and resume = uninterrupted"]["detail"]).startswith("a rank would wait")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_alone_is_named_within_seconds(config: Path, tmp_path: Path, rank: int) -> None:
    """The other one waits for it in the backward pass."""
    output = tmp_path / "doctor.json"
    launcher = ["torchrun", "--standalone", "--nproc_per_node", "2", "-m", "tests.runs.doctor_rank"]

    done = run([*launcher, f"fail-{rank}", str(config), str(output)])

    assert done.returncode == 1
    cause = f"rank {rank}: RuntimeError: CUDA error: out of memory (rank {1 - rank} then waited for it)"
    assert statuses(output) == {
        "media are never targets": "passed",
        "step = any split of it": "failed",
        "speed": "not run",
    }
    assert found(output)["step = any split of it"]["detail"] == cause
    assert f"step = any split of it: {cause}" in done.stdout
    assert json.loads(output.read_text())["seconds"] < 300  # a collective would wait 600
    assert not list(tmp_path.glob(".vlcpt-doctor-*"))
