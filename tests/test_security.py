"""Nobody gets in through data, a configuration or a model's folder, and no secret gets out."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from huggingface_hub import close_session, constants
from typer.testing import CliRunner

import vlcpt
from tests.hub_server import TOKEN, Repository, environment, serve_hub
from vlcpt.cli import app
from vlcpt.config.values import redacted
from vlcpt.config.yaml import load_config
from vlcpt.demo import base_path
from vlcpt.errors import ConfigError
from vlcpt.model.loading import load_base, load_processor
from vlcpt.report.screen import Screen, visible

OTHER_TOKEN = "hf_" + "AnotherSecret" * 3
# Clears the screen, sets the title, hides what follows, turns the reading direction; and rich's own styles.
HOSTILE = "a\x1b[2J\x1b]0;mine\x07\x9b8m\u202e\r[red]b[/nothing]"
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")


def write_run(folder: Path, lines: str = "", rows: list[dict[str, object]] | None = None) -> Path:
    rows = rows or [{"text": f"one <trainable_text>two {n}</trainable_text>"} for n in range(2)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my.yaml").write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: train.jsonl\noutput_dir: out\nmax_length: 64\n"
        f"max_steps: 2\nuse_cpu: true\ndataloader_num_workers: 0\n{lines}"
    )
    return folder / "my.yaml"


def test_no_secret_is_in_anything_that_a_run_and_its_push_leave(tmp_path):
    """One token in the configuration, another in the environment: both are at work, neither is written."""
    lines = f"tuning: full\npush_to_hub: true\nhub_model_id: mine\nhub_token: {TOKEN}\nlogging_steps: 1\n"
    config = write_run(tmp_path, lines)
    with serve_hub() as hub:
        done = subprocess.run(
            [sys.executable, "-m", "vlcpt", "train", "my.yaml", "--log_level", "debug"],
            cwd=tmp_path,
            env={**os.environ, **environment(hub, str(tmp_path / "home"), OTHER_TOKEN)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert len(hub.repositories["me/mine"].commits) == 1  # so the token was used
        pushed = {f"pushed {name}": content for name, content in hub.files("me/mine").items()}
    left = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path != config}
    said = {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}

    assert {"out/checkpoint-2/trainer_state.json", "out/config.yaml"} <= {
        str(Path(name).relative_to(tmp_path)) for name in left
    }
    for name, content in (left | pushed | said).items():
        for token in (TOKEN, OTHER_TOKEN):
            assert token.encode() not in content, name
        assert b"PlantedSecret" not in content and b"AnotherSecret" not in content, name


@pytest.mark.parametrize(
    "lines",
    [
        f"run_name: {TOKEN}",
        f"eval_data: [{{path: data/{TOKEN}/a.jsonl}}]",
        "eval_data: https://me:password1@example.org/a.jsonl",
        f"accelerator_config: {{x: {TOKEN}}}",
    ],
)
def test_a_secret_under_a_key_that_is_written_down_is_refused_without_being_said(tmp_path, lines):
    with pytest.raises(ConfigError, match="looks like an access token or a password") as refused:
        load_config(write_run(tmp_path, lines + "\n"))

    assert not re.search("PlantedSecret|password1", str(refused.value))


def test_no_command_lets_out_what_is_secret_in_the_configuration_or_the_environment(tmp_path, monkeypatch):
    planted = {
        "HF_TOKEN": OTHER_TOKEN,
        "WANDB_API_KEY": "Planted" + "ab" * 17,
        "AWS_SECRET_ACCESS_KEY": "Planted/Aws/Key",
        "HTTP_PROXY": "http://me:PlantedPassword@127.0.0.1:9",
    }
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()  # the next one takes the proxy
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, f"eval_data: train.jsonl\nhub_token: {TOKEN}\nlogging_steps: 1\n")
    commands = [
        "check my.yaml",
        "inspect my.yaml",
        "train my.yaml --eval_strategy steps --eval_steps 1 --eval_on_start true",
        "eval my.yaml --checkpoint out --output eval.json",
        "merge out merged",
        "push out me/mine --base_model org/base --dry-run",
        "push out me/mine --base_model org/base",  # fails: that proxy is not there
        "env",
    ]

    said = {}
    for command in commands:
        result = CliRunner().invoke(app, command.split())
        close_session()
        assert result.exit_code == (1 if command.endswith("org/base") else 0), (command, result.output)
        said[command] = result.output.encode()
    left = {
        str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    }
    assert TOKEN.encode() in left.pop("my.yaml")

    assert {
        *("out/config.yaml", "out/ledger.json", "out/dropped.jsonl", "out/train_log.jsonl", "eval.json"),
        *("out/checkpoint-2/trainer_state.json", "out/adapter_config.json", "merged/model.safetensors"),
    } <= left.keys()
    assert any(name.startswith("out/plan/") for name in left)
    for name, content in (left | said).items():
        assert not re.search(rb"Planted|AnotherSecret|training_args", content), name
    assert not list(tmp_path.rglob("training_args.bin"))


class Runs:
    """A pickle that leaves a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("what", ["adapter", "model"])
def test_a_pickle_in_the_place_of_weights_runs_nothing_and_is_one_message(tmp_path, what):
    config = write_run(tmp_path)
    assert CliRunner().invoke(app, ["train", str(config), "--save_strategy", "no"]).exit_code == 0
    base = Path(shutil.copytree(base_path(), tmp_path / "base"))
    folder, name = (tmp_path / "out", "adapter_model") if what == "adapter" else (base, "model")
    (folder / f"{name}.safetensors").unlink()
    pickled = folder / ("adapter_model.bin" if what == "adapter" else "pytorch_model.bin")
    torch.save({"weight": Runs(tmp_path / "ran")}, pickled)
    adapter = tmp_path / "out" / "adapter_config.json"
    adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"base_model_name_or_path": str(base)}))

    result = CliRunner().invoke(app, ["merge", str(tmp_path / "out"), str(tmp_path / "merged")])

    assert result.exit_code == 1, result.output
    assert str(folder) in result.output and "\x1b" not in result.output
    assert "a pickle that holds more than tensors" in result.output
    assert not (tmp_path / "ran").exists() and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("arguments", [["--hub_token", f"[{TOKEN}, 2]"], [TOKEN], ["--seed", TOKEN]])
def test_a_misplaced_token_is_not_said_either(tmp_path, arguments):
    result = CliRunner().invoke(app, ["train", str(write_run(tmp_path)), *arguments])

    assert result.exit_code == 2
    assert result.output.startswith("vlcpt: ") and "PlantedSecret" not in result.output


def test_a_token_in_text_is_found_whatever_stands_around_it():
    assert redacted(f"({TOKEN})") == "(***)"
    assert redacted("hf_hub_download and half_of_it") == "hf_hub_download and half_of_it"


@pytest.mark.parametrize(
    "line",
    [
        "seed: !!python/object/apply:os.system ['touch ran']",
        "run_name: !!python/name:os.system",
        "train_data: [{path: train.jsonl, name: !!python/object/new:os.system ['touch ran']}]",
        "? !!python/object/apply:os.system ['touch ran']\n: 1",
    ],
)
def test_a_python_tag_in_yaml_is_an_error_and_runs_nothing(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    config = write_run(tmp_path)
    config.write_text(config.read_text().replace("train_data: train.jsonl\n", "") + line + "\n")

    result = CliRunner().invoke(app, ["train", str(config)])

    assert result.exit_code == 2, result.output
    assert re.search(r"my\.yaml:\d+", result.output) and "Traceback" not in result.output
    assert not (tmp_path / "ran").exists()


def test_a_whole_file_with_a_python_tag_is_an_error(tmp_path):
    config = write_run(tmp_path)
    config.write_text("!!python/object/new:dict\n" + config.read_text())

    result = CliRunner().invoke(app, ["train", str(config)])

    assert result.exit_code == 2
    assert "expected lines of key: value, found !<tag:yaml.org,2002:python/object/new:dict>" in result.output


def test_yaml_is_only_ever_read_safely():
    calls = []
    for path in Path(vlcpt.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "yaml":
                calls.append(node.attr)
    assert "safe_load" in calls and "compose" in calls
    unsafe = {"load", "load_all", "full_load", "unsafe_load", "Loader", "FullLoader", "UnsafeLoader"}
    assert not unsafe & set(calls)


def test_no_code_of_a_model_is_trusted_anywhere():
    given = [
        keyword.value
        for path in Path(vlcpt.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "trust_remote_code"
    ]

    assert len(given) > 2
    assert all(isinstance(value, ast.Constant) and value.value is False for value in given)


def test_a_configuration_that_asks_for_remote_code_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["train", str(write_run(tmp_path, "trust_remote_code: true\n"))])

    assert result.exit_code == 2
    assert "trust_remote_code: no code from a model's folder or the Hub is ever run" in result.output


def test_code_in_a_models_folder_does_not_run(tiny_model_dir, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    for path in tiny_model_dir.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        found = json.loads((folder / name).read_text())
        classes = ("AutoConfig", "AutoProcessor", "AutoTokenizer", "AutoModelForImageTextToText")
        found["auto_map"] = dict.fromkeys(classes, "mine.Mine")
        (folder / name).write_text(json.dumps(found))

    load_base(str(folder))
    load_processor(str(folder))

    assert not (tmp_path / "ran").exists()


@pytest.fixture
def terminal(monkeypatch):
    """Let everything be printed as to a terminal, so that nothing is left out for a file."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "300")


def plain(shown: str) -> str:
    """What was shown without the colours that rich itself puts in, and its bars' cursor movements."""
    return re.sub(r"\x1b\[(?:[0-9;]*m|\?25[lh])|\r?\x1b\[(?:1A|2K)", "", shown)


@pytest.mark.parametrize("command", ["inspect", "check", "train"])
def test_hostile_names_and_texts_do_not_reach_the_terminal_raw(tmp_path, terminal, command):
    rows = [
        {"id": HOSTILE, "text": f"one {HOSTILE} <trainable_text>two {HOSTILE}</trainable_text>"},
        {"id": HOSTILE, "text": f"<image>{HOSTILE}", "images": [f"{HOSTILE}.png"]},
        {"id": HOSTILE, "text": f"<trainable_text {HOSTILE}>"},
    ]
    config = write_run(tmp_path, rows=rows)
    name = f"{HOSTILE.replace('/', '')}.jsonl"
    (tmp_path / "train.jsonl").rename(tmp_path / name)
    lines = f"train_data: {json.dumps(name)}\non_bad_data: skip\nmax_bad_fraction: 1\n"
    config.write_text(config.read_text().replace("train_data: train.jsonl\n", lines))

    result = CliRunner().invoke(app, [command, str(config)], color=True)

    assert result.exit_code == (1 if command == "check" else 0), result.output
    assert "\\x1b[2J" in result.output  # it is shown, and written out
    assert "[red]" in result.output
    assert not STEERING.search(plain(result.output))


def test_hostile_rows_do_not_reach_the_terminal_through_an_error(tmp_path, terminal):
    rows = [{"id": HOSTILE, "text": f"a </trainable_text>{HOSTILE}"}]

    result = CliRunner().invoke(app, ["train", str(write_run(tmp_path, rows=rows))], color=True)

    assert result.exit_code == 1
    assert "vlcpt: " in result.output and not STEERING.search(plain(result.output))


def test_a_screen_shows_strings_titles_and_cells_as_they_are():
    from rich.table import Table

    screen = Screen(file=StringIO(), width=300, force_terminal=True, color_system=None)
    table = Table(title=HOSTILE, caption=HOSTILE)
    table.add_column(HOSTILE, footer=HOSTILE)
    table.add_row(HOSTILE)

    screen.print(HOSTILE, highlight=False)
    screen.print(table)

    shown = plain(screen.file.getvalue())
    assert shown.count("a\\x1b[2J\\x1b]0;mine\\x07\\x9b8m\\u202e\\x0d[red]b[/nothing]") == 5
    assert not STEERING.search(shown)


def test_halves_of_characters_which_a_terminal_cannot_take_are_written_out():
    assert visible(os.fsdecode(b"caf\xe9\n")) == "caf\\udce9\n"


def test_addresses_in_messages_lose_what_may_be_a_secret(tmp_path):
    rows = [{"text": "<image>a", "images": ["https://me:pass1@example.org/a.png?signature=secret2"]}]
    lines = "on_bad_data: skip\nmax_bad_fraction: 1\n"
    config = write_run(tmp_path, lines, rows=[*rows, {"text": "b"}])

    result = CliRunner().invoke(app, ["check", str(config)])

    dropped = (tmp_path / "out/dropped.jsonl").read_text()
    assert "https://example.org/a.png" in dropped and "https://example.org/a.png" in result.output
    assert not re.search("pass1|secret2", dropped + result.output)


def test_a_stand_in_for_the_hub_keeps_what_is_private_to_itself():
    """Or the tests of pushes would prove nothing about tokens."""
    import httpx2

    with serve_hub() as hub:
        hub.repositories["me/mine"] = Repository(private=True)
        assert httpx2.get(f"{hub.endpoint}/api/models/me/mine").status_code == 404
        assert httpx2.post(f"{hub.endpoint}/api/repos/create", json={"name": "x"}).status_code == 401
