"""The command line as shells, scripts and people who ask for help see it."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from vlcpt.cli import app
from vlcpt.config.keys import known_types
from vlcpt.demo import base_path

ROOT = Path(__file__).parents[1]
GROUP = get_command(app)
COMMANDS = GROUP.commands  # type: ignore[attr-defined]  # typer hides its base


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration; of its rows the second and the third have the same fault."""
    rows = [{"text": "one <trainable_text>two</trainable_text>"}, {"text": 5}, {"text": 6}]
    (tmp_path / "手册.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "my.yaml").write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: [{{path: 手册.jsonl, name: 手册}}]\n"
        "output_dir: out\nmax_length: 64\nuse_cpu: true\ndataloader_num_workers: 0\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(app, arguments, env=environment, prog_name="vlcpt")


def completed(line: str) -> list[str]:
    """What a shell offers at the end of a line."""
    words = line.split(" ")
    environment = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    return run(_VLCPT_COMPLETE="complete_bash", **environment).stdout.split()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("vlcpt me", ["merge"]),
        ("vlcpt check my.yaml --num", ["--num-processes", "--num_train_epochs"]),
        ("vlcpt train my.yaml --learning_r", ["--learning_rate"]),
        ("vlcpt train my.yaml --seed 1 --learning-r", ["--learning_rate"]),
        ("vlcpt merge a b --learning_r", []),
    ],
)
def test_commands_options_and_keys_are_completed(line: str, found: Sequence[str]) -> None:
    assert completed(line) == list(found)


def test_completion_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom vlcpt.__main__ import main\nsys.argv[:] = ['vlcpt']\ntry:\n    main()\n"
        "except SystemExit:\n    assert not {'torch', 'transformers', 'rich'} & set(sys.modules)\n"
    )
    environment = {"COMP_WORDS": "vlcpt train my.yaml --learning_r", "COMP_CWORD": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"_VLCPT_COMPLETE": "complete_bash", **environment},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )

    assert done.stdout == "--learning_rate\n"
    assert not done.stderr


def examples(command: str) -> list[str]:
    return run(command, "--help").stdout.partition("Examples:\n")[2].splitlines()


def parsed(line: str) -> None:
    """Have typer read a line as it is typed; what follows as --key value are keys."""
    words = shlex.split(line.partition("  #")[0].partition(" > ")[0])
    words = words[words.index("vlcpt") + 1 :]
    context = COMMANDS[words[0]].make_context(
        words[0], words[1:], parent=GROUP.make_context("vlcpt", words[:1])
    )
    keys = [word[2:] for word in context.args if word.startswith("--")]
    assert set(keys) <= set(known_types())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_its_help_with_examples_that_parse(command: str) -> None:
    lines = examples(command)

    assert 1 <= len(lines) <= 4
    for line in lines:
        assert f"vlcpt {command}" in line
        parsed(line)


def test_an_example_with_a_wrong_option_would_not_parse() -> None:
    for line in ("vlcpt merge a b --dytpe bfloat16", "vlcpt train my.yaml --lerning_rate 1"):
        with pytest.raises((AssertionError, Exception), match=r"No such option|lerning_rate"):
            parsed(line)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_eighty_columns_and_cuts_no_sentence(command: str) -> None:
    lines = run(*command.split(), "--help", COLUMNS="80").stdout.splitlines()

    assert lines and max(map(len, lines)) <= 80
    assert not [line for line in lines if line.endswith("...") and "Usage" not in line]


@pytest.mark.parametrize("name", ["commands.md", "commands.zh.md"])
def test_the_page_of_commands_lists_all_options_and_its_commands_parse(name: str) -> None:
    page = (ROOT / "docs" / name).read_text("utf-8")
    rows = dict(re.findall(r"^\| `vlcpt (\w+)[^|]*\|[^|]*\|(.*)\|$", page, re.M))

    assert list(rows) != [] and set(rows) == set(COMMANDS)
    for command, options in rows.items():
        known = {max(one.opts, key=len) for one in COMMANDS[command].params if one.opts[0].startswith("--")}
        assert set(re.findall(r"`(--[\w-]+)`", options)) == known
    for line in re.findall(r"^vlcpt (?!--).*$", page, re.M):
        parsed(line)


def test_check_prints_one_json_document_and_keeps_its_exit_code(project: Path) -> None:
    done = run("check", "my.yaml", "--json")

    assert done.exit_code == 1
    assert done.stdout.isascii()
    found = json.loads(done.stdout)
    assert (found["complete"], found["lost"]) == (False, 2)
    assert found["verdict"] == "Documents that would not be used: 2."
    (problem,) = found["problems"]
    assert (problem["data"], problem["reason"], problem["count"]) == ("train", "row", 2)
    assert problem["places"] == ["手册.jsonl:2", "手册.jsonl:3"]
    assert found["ledger"] == json.loads((project / "out/ledger.json").read_text("utf-8"))
    assert found["steps"]["total"] == 3  # one pack in each of three epochs
    memory = found["memory"]["as configured"]
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "inputs")
    assert memory["total"] == sum(memory[part] for part in parts) > 0
    assert "repair them" in found["advice"][0]
    assert found["speed"] is None
    assert "documents read" in done.stderr  # the table
    for name, heading in (("commands.md", "## JSON of `check`"), ("commands.zh.md", "## `check` 的 JSON")):
        page = (ROOT / "docs" / name).read_text("utf-8").partition(heading)[2]
        assert set(re.findall(r"^\| `(\w+)`", page, re.M)) == set(found)


def test_check_says_no_more_than_its_verdict_where_it_is_quiet(project: Path) -> None:
    done = run("check", "my.yaml", "--quiet")

    assert done.exit_code == 1
    assert done.stdout == "Documents that would not be used: 2.\n"
    assert done.stderr == ""


def test_the_verdict_of_check_is_its_first_line_and_its_last(project: Path) -> None:
    lines = run("check", "my.yaml").stdout.splitlines()

    assert len(lines) > 10
    assert lines[0] == lines[-1] == "Documents that would not be used: 2."


def test_train_eval_and_merge_say_no_more_than_their_result_where_they_are_quiet(project: Path) -> None:
    text = (project / "手册.jsonl").read_text("utf-8").splitlines()[0]
    (project / "手册.jsonl").write_text(f"{text}\n", "utf-8")
    options = ("--eval_data", "[{path: 手册.jsonl, name: held}]", "--max_steps", "1", "--quiet")

    trained = run("train", "my.yaml", *options, "--report_to", "none")
    measured = run("eval", "my.yaml", "--checkpoint", "out", *options)
    merged = run("merge", "out", "merged", "--quiet")

    assert (trained.exit_code, measured.exit_code, merged.exit_code) == (0, 0, 0)
    assert trained.stdout == "saved in out\n"
    assert re.fullmatch(r"held: [^\n]*\n", measured.stdout)
    assert merged.stdout == "merged into merged\n"
    assert (trained.stderr, measured.stderr, merged.stderr) == ("", "", "")


def test_an_error_is_shown_where_a_command_is_quiet_and_leaves_stdout_empty(project: Path) -> None:
    done = run("check", "my.yaml", "--quiet", "--json", "--train_data", "gone.jsonl")

    assert done.exit_code == 2
    assert done.stdout == ""
    assert "gone.jsonl" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "qlora"])
def test_stderr_of_a_run_from_the_start_of_python_on_has_our_lines_only(project: Path, tuning: str) -> None:
    """What libraries say while they are imported, too."""
    options = ["--on_bad_data", "skip", "--max_bad_fraction", "1", "--max_steps", "1", "--tuning", tuning]
    for command in (["train", "my.yaml", *options], ["merge", "out", "merged"]):
        done = subprocess.run(
            [sys.executable, "-m", "vlcpt", *command], capture_output=True, text=True, check=True
        )
        strange = [line for line in done.stderr.splitlines() if not line.startswith("vlcpt: ")]
        assert strange == []
        pushed = "  vlcpt push out-merged OWNER/NAME --run out --dry-run"  # the base is a folder
        assert done.stdout.splitlines()[-1] in ("merged into merged", pushed)
