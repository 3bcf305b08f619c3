"""The command: what it writes, how it exits, and what it leaves."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vlcpt.runs.doctor.run
from vlcpt.cli import app
from vlcpt.demo import base_path
from vlcpt.report.doctor import Line
from vlcpt.runs.doctor.batches import equal_calls, media_untrained
from vlcpt.runs.doctor.steps import frozen_untouched
from vlcpt.runs.doctor.subject import Subject
from vlcpt.training.checkpoints.resume import StepSeeds

OPTIONS = ("--quick", "--use_cpu", "--dataloader_num_workers", "0")


def schema(value: object) -> object:
    """The types of a JSON value, by key; of a list those of its first item."""
    if isinstance(value, dict):
        return {key: schema(one) for key, one in value.items()}
    if isinstance(value, list):
        return [schema(value[0])] if value else []
    return type(value).__name__


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the checks only: the others are in test_doctor.py."""
    two = (("media are never targets", media_untrained), ("every rank calls the towers equally", equal_calls))
    monkeypatch.setattr(vlcpt.runs.doctor.run, "CHECKS", two)


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("short")
def test_without_a_config_the_demo_is_examined_and_nothing_but_the_report_is_left(in_folder: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", *OPTIONS])

    assert done.exit_code == 0, done.output
    assert "are never" in done.output  # narrow, so on two lines
    assert [one.name for one in in_folder.iterdir()] == ["doctor.json"]
    assert json.loads((in_folder / "doctor.json").read_text())["run"]["base"] == "vlcpt demo"


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("options", [("--learning_rate", "1e-5"), ("--learning-rate=1e-5",)])
def test_keys_can_follow_without_a_config(in_folder: Path, options: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, ["doctor", *options, *OPTIONS])

    assert done.exit_code == 0, done.output


def test_the_report_has_these_keys_and_types(in_folder: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", *OPTIONS, "--max_length", "64", "--output", "mine.json"])

    assert done.exit_code == 0, done.output
    found = json.loads((in_folder / "mine.json").read_text())
    assert {"vlcpt", "python", "system", "torch", "cuda"} <= found.pop("machine").keys()
    assert schema(found) == {
        **{"format": "int", "vlcpt": "str", "passed": "bool", "seconds": "float"},
        "run": {
            **{"base": "str", "weights": "str", "parameters": "int", "layers": ["int"], "of_layers": ["int"]},
            **{"tuning": "str", "trained": ["str"], "attention": "str", "dtype": "str", "products": "str"},
            **{"batch_size": "int", "accumulation": "int", "max_length": "int", "ranks": "int"},
            **{"activation_checkpointing": "bool", "engine": "NoneType", "device": "str", "quick": "bool"},
        },
        "lines": [
            {
                **{"name": "str", "status": "str", "measured": "int", "tolerance": "int", "unit": "str"},
                "detail": "str",
            }
        ],
        "speed": {
            **{"tokens_per_second": "float", "targets_per_second": "float", "data_wait": "float"},
            **{"share_of_peak": "NoneType", "seconds_per_step": "float", "tokens_per_step": "float"},
            **{f"seconds/{phase}": "float" for phase in ("data_wait", "forward", "backward", "optimizer")},
        },
        "memory": {"estimate": "int", "peak": "int"},
    }
    assert str(in_folder) not in (in_folder / "mine.json").read_text()


def test_a_line_that_failed_exits_with_1_and_names_the_cause(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(subject: Subject, name: str) -> Line:
        return Line(name, "failed", 1.0, 0.5, detail="the kernel is wrong. Report it.")

    def broken(subject: Subject, name: str) -> Line:
        raise RuntimeError("CUDA error: no kernel image\nmore of it")

    monkeypatch.setattr(vlcpt.runs.doctor.run, "CHECKS", (("one", wrong), ("two", broken)))

    done = CliRunner().invoke(app, ["doctor", *OPTIONS])

    assert done.exit_code == 1
    assert "one: the kernel is wrong. Report it." in done.output
    assert "two: RuntimeError: CUDA error: no kernel image\n" in done.output
    assert json.loads((in_folder / "doctor.json").read_text())["passed"] is False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_without_a_report_or_a_checkpoint(
    in_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: int,
    code: int,
) -> None:
    def on_step_begin(*given: object, **named: object) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(StepSeeds, "on_step_begin", on_step_begin)
    monkeypatch.setattr(vlcpt.runs.doctor.run, "CHECKS", (("frozen", frozen_untouched),))

    done = CliRunner().invoke(app, ["doctor", *OPTIONS])

    assert done.exit_code == code, done.output
    said = done.output + capfd.readouterr().err
    assert "ending without a report" in said
    assert "checkpoint" not in said
    assert not any(in_folder.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "none.yaml: No such file"),
        (["--lerning_rate", "1"], "unknown key"),
        (["--output", "folder"], "not a file in a folder that is there"),
        (["--output", "none/doctor.json"], "not a file in a folder that is there"),
        (["--lora_target_modules", "[q_porj]"], "lora_target_modules"),
    ],
    ids=["no file", "key", "folder", "no folder", "layer"],
)
def test_a_wrong_config_exits_with_2(in_folder: Path, arguments: list[str], message: str) -> None:
    (in_folder / "folder").mkdir()

    done = CliRunner().invoke(app, ["doctor", *arguments, *OPTIONS])

    assert done.exit_code == 2, done.output
    assert message in done.output
    assert [one.name for one in in_folder.iterdir()] == ["folder"]


@pytest.mark.usefixtures("short")
def test_a_base_without_weights_is_examined_with_random_ones(in_folder: Path) -> None:
    base = in_folder / "base"
    base.mkdir()
    for file in Path(base_path()).iterdir():
        if file.suffix != ".safetensors":
            (base / file.name).write_bytes(file.read_bytes())
    (in_folder / "my.yaml").write_text("model_name_or_path: base\ntrain_data: a.jsonl\noutput_dir: out\n")
    (in_folder / "a.jsonl").write_text('{"text": "one two"}\n')

    done = CliRunner().invoke(app, ["doctor", "my.yaml", *OPTIONS])

    assert done.exit_code == 0, done.output
    found = json.loads((in_folder / "doctor.json").read_text())["run"]
    assert (found["weights"], found["layers"], found["base"]) == ("random", [4, 3], "base")
    assert not (in_folder / "out").exists()
