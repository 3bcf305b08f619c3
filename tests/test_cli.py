"""The command line, as a person types it."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.processes import Started, holding, run_module
from tests.support import wait_for
from vlcpt.cli import app
from vlcpt.demo import base_path


def vlcpt(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """The command in a process of its own."""
    return run_module("vlcpt", *arguments, cwd=cwd, environment={"COLUMNS": "100"})


def vlcpt_anew(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """The command from the start of Python on, imports and all."""
    command = [sys.executable, "-m", "vlcpt", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a config and two rows."""
    rows = [{"text": "one <trainable_text>two</trainable_text>"}, {"text": "three four"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "my.yaml").write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: train.jsonl\neval_data: train.jsonl\n"
        "output_dir: out\nmax_length: 64\nmax_steps: 2\nuse_cpu: true\ndataloader_num_workers: 0\n"
    )
    return tmp_path


def children_seconds() -> float:
    """CPU time of all commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def edit(project: Path, line: str) -> None:
    with (project / "my.yaml").open("a") as file:
        file.write(line + "\n")


def test_train_writes_the_standard_output_folder(project: Path) -> None:
    run = vlcpt("train", "my.yaml", cwd=project)

    assert run.returncode == 0, run.stderr
    written = {path.name for path in (project / "out").iterdir()}
    assert {"config.yaml", "ledger.json", "dropped.jsonl", "train_log.jsonl", "checkpoint-2"} <= written
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= written
    assert not list(project.rglob("training_args.bin"))
    ledger = json.loads((project / "out/ledger.json").read_text())
    assert ledger["total"]["documents"]["used"] == 2
    assert "step 2/2  loss " in run.stdout
    assert [line for line in run.stderr.splitlines() if not line.startswith("vlcpt: ")] == []


def test_no_path_is_written_that_the_configuration_has_not(project: Path) -> None:
    shutil.copytree(base_path(), project / "base")
    config = project / "my.yaml"
    config.write_text(config.read_text().replace(str(base_path()), "base"))
    run = vlcpt("train", "my.yaml", cwd=project)

    assert run.returncode == 0, run.stderr
    files = [path for path in (project / "out").rglob("*") if path.is_file()]
    assert len(files) >= 20
    assert [str(path) for path in files if str(project).encode() in path.read_bytes()] == []


def test_training_again_from_the_written_config_repeats_the_run(project: Path) -> None:
    first = vlcpt("train", "my.yaml", cwd=project)
    again = vlcpt("train", "out/config.yaml", "--output_dir", "again", cwd=project)

    assert (first.returncode, again.returncode) == (0, 0), again.stderr
    # The commands that come next name the file where it is the whole configuration.
    assert "vlcpt eval my.yaml --checkpoint out" in first.stdout
    assert "vlcpt eval again/config.yaml --checkpoint again" in again.stdout
    names = ("adapter_model.safetensors", "ledger.json")
    for name in names:
        assert (project / "out" / name).read_bytes() == (project / "again" / name).read_bytes()


def test_eval_writes_its_numbers(project: Path) -> None:
    trained = vlcpt("train", "my.yaml", cwd=project)
    assert trained.returncode == 0, trained.stderr
    assert "what to change:" in trained.stdout  # of the evaluations at its start and its end
    more = ["--samples", "1", "--per_document", "documents.jsonl", "--json"]
    run = vlcpt("eval", "my.yaml", "--checkpoint", "out", "--output", "eval.json", *more, cwd=project)

    assert run.returncode == 0, run.stderr
    assert run.stdout == (project / "eval.json").read_text()  # and nothing else
    assert "what to change:" in run.stderr
    assert "  truth  " in run.stderr
    assert (project / "documents.jsonl").read_text().startswith('{"loss": ')
    (result,) = json.loads((project / "eval.json").read_text())["sets"].values()
    assert set(result) == {
        "loss",
        "perplexity",
        "bits_per_byte",
        "targets",
        "base_loss",
        "shuffled_images_loss",
        "blank_images_loss",
        "documents",
        "intervals",
        "reliance",
    }
    assert result["reliance"] is result["shuffled_images_loss"] is None  # no document has an image
    assert result["base_loss"] > 0


def test_advice_of_eval_names_the_configuration_as_it_was_typed_without_secrets(project: Path) -> None:
    (project / "my.yaml").rename(project / "my run.yaml")
    (project / "train.jsonl").write_text('{"text": "one two"}\n' * 8)
    typed = ("--checkpoint", str(base_path()), "--tuning", "full", "--hub_token", "hf_secret")

    run = vlcpt("eval", "my run.yaml", *typed, cwd=project)

    assert run.returncode == 0, run.stderr
    assert "`vlcpt inspect 'my run.yaml' --tuning full --hub_token …`" in run.stdout
    assert "hf_secret" not in run.stdout + run.stderr


def test_inspect_shows_the_targets_of_the_rows_asked_for(project: Path) -> None:
    run = vlcpt("inspect", "my.yaml", "--rows", "0", cwd=project)

    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("«trained» context  ┊ the rest is dropped")
    assert "one« two<|endoftext|>»" in run.stdout.replace("one «two", "one« two")
    assert "three" not in run.stdout


def test_a_launchers_local_rank_before_the_command_is_accepted(project: Path) -> None:
    run = vlcpt("--local_rank=0", "inspect", "my.yaml", cwd=project)

    assert run.returncode == 0, run.stderr


def test_a_filled_output_folder_is_an_error_that_names_overwrite(project: Path) -> None:
    (project / "out").mkdir()
    (project / "out/mine.txt").write_text("precious")
    run = vlcpt("train", "my.yaml", cwd=project)

    assert run.returncode == 2
    assert "output_dir out is not empty" in run.stderr and "--overwrite" in run.stderr


def test_overwrite_keeps_what_is_not_a_runs_own(project: Path) -> None:
    (project / "out/checkpoint-9").mkdir(parents=True)
    (project / "out/mine.txt").write_text("precious")
    run = vlcpt("train", "my.yaml", "--overwrite", cwd=project)

    assert run.returncode == 0, run.stderr
    assert (project / "out/mine.txt").read_text() == "precious"
    assert not (project / "out/checkpoint-9").exists()


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("max_lenght: 8", 2, "my.yaml:9: max_lenght: unknown key. Did you mean max_length?"),
        ("learning_rate: fast", 2, "my.yaml:9: learning_rate: expected a number, found"),
        ("deepspeed: zero9", 2, "zero9"),
        ("replay_share: 0.5", 2, "replay_data"),
    ],
)
def test_a_wrong_configuration_is_reported_before_anything_is_read(
    project: Path, line: str, code: int, message: str
) -> None:
    (project / "train.jsonl").write_text("not read\n")
    edit(project, line)
    before = children_seconds()
    run = vlcpt_anew("train", "my.yaml", cwd=project)
    spent = children_seconds() - before

    assert run.returncode == code
    assert message in run.stderr and "Traceback" not in run.stderr
    # 10 s of wall time on two idle cores. Tests share theirs, so work is counted, not waiting.
    assert spent < (3 if line.startswith(("max_lenght", "learning_rate")) else 15)
    assert not (project / "out").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "train.jsonl:1: not JSON"),
        (
            '{"text": "a <trainable_text>b"}',
            "train.jsonl:1: text, character 2: <trainable_text> is not closed",
        ),
        ('{"text": "<image>", "images": ["no.png"]}', "no.png"),
        ('{"text": 5}', "train.jsonl:1: text: expected a string, found int"),
        ('{"txt": "a"}', "'txt'"),
        ('{"text": "<image>", "images": ["http://a.b/c.png"]}', "nothing is fetched"),
    ],
)
def test_a_bad_row_is_one_message_without_a_trace(project: Path, row: str, message: str) -> None:
    (project / "train.jsonl").write_text(row + "\n")
    result = CliRunner().invoke(app, ["train", str(project / "my.yaml")])

    assert result.exit_code == 1, result.output
    assert message in result.output and "Traceback" not in result.output
    assert not (project / "out/ledger.json").exists()


def test_a_missing_data_file_is_one_message(project: Path) -> None:
    (project / "train.jsonl").unlink()
    result = CliRunner().invoke(app, ["train", str(project / "my.yaml")])

    assert result.exit_code == 2
    assert "no such file or folder" in result.output


@pytest.mark.parametrize("rows", ["x", "5:2", "-1"])
def test_rows_that_are_no_range_are_refused(project: Path, rows: str) -> None:
    result = CliRunner().invoke(app, ["inspect", str(project / "my.yaml"), "--rows", rows])

    assert result.exit_code == 2
    assert "expected a number, or first:last" in result.output


def test_env_names_versions_and_no_path() -> None:
    result = CliRunner().invoke(app, ["env"])

    assert result.exit_code == 0
    assert "transformers" in result.output and "torch" in result.output
    assert str(Path.home()) not in result.output


@pytest.mark.parametrize("command", ["train", "demo", "prepare"])
def test_a_folder_in_use_is_refused_before_torch_is_imported(project: Path, command: str) -> None:
    arguments = {
        "train": ["train", "my.yaml", "--overwrite"],
        "demo": ["demo", "--output_dir", "out", "--overwrite"],
        "prepare": ["prepare", "my.yaml", "--output", "out"],
    }
    code = (
        "import sys\nfrom vlcpt.__main__ import main\ntry:\n    main()\nexcept SystemExit as end:\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules)\n    raise\n"
    )
    with holding(project / "out") as (first, _):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments[command]], capture_output=True, text=True, cwd=project
        )

    assert done.returncode == 2, done.stderr
    assert f"out is in use by process {first.pid} on host " in done.stderr


def test_a_second_run_leaves_the_first_alone_and_takes_over_when_that_is_killed(project: Path) -> None:
    edit(project, "save_strategy: steps\nsave_steps: 1\nsave_total_limit: 2")
    environment = {"COLUMNS": "100"}
    train = ["vlcpt", "train", "my.yaml"]
    first = Started(
        [*train, "--max_steps", "100000"], project / "first", cwd=project, environment=environment
    )
    try:
        wait_for(lambda: (project / "out/checkpoint-3").exists() or first.poll() is not None, 120)
        second = run_module(*train, "--overwrite", cwd=project, environment=environment)

        assert second.returncode == 2, second.stderr
        assert f"is in use by process {first.pid} on host " in second.stderr
        last = max(int(path.name.rpartition("-")[2]) for path in (project / "out").glob("checkpoint-*"))
        wait_for(lambda: (project / f"out/checkpoint-{last + 2}").exists() or first.poll() is not None, 60)
        assert first.poll() is None, (project / "first").read_text()  # it was not disturbed
    finally:
        first.kill()
    more = ["--resume_from_checkpoint", "true", "--max_steps", "200000"]
    third = Started([*train, *more], project / "third", cwd=project, environment=environment)
    try:
        wait_for(lambda: "step" in (project / "third").read_text() or third.poll() is not None, 120)
        assert third.poll() is None, (project / "third").read_text()
    finally:
        third.kill()
