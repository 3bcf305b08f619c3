"""Pushes to a stand-in for the Hub, and what comes back from there with vlcpt left out."""

import html
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, constants
from markdown_it import MarkdownIt
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from tests.hub_server import OWNER, TOKEN, Hub, Repository, environment, serve_hub
from tests.processes import holding
from vlcpt import merge_adapter, push_adapter
from vlcpt.cli import app
from vlcpt.config.yaml import load_config
from vlcpt.demo import base_path
from vlcpt.errors import ConfigError
from vlcpt.folder_locks import LOCK
from vlcpt.hub import access
from vlcpt.hub.push import open_repository, push_run
from vlcpt.report.card import Licence
from vlcpt.runs.train import train_run
from vlcpt.training.checkpoints.files import UNFINISHED

QUIET = Console(file=StringIO(), width=100)
PROCESSOR = {"processor_config.json", "tokenizer.json", "tokenizer_config.json"}
ADAPTER = {
    *{"README.md", "adapter_config.json", "adapter_model.safetensors", "generation_config.json"},
    *PROCESSOR,
}
BASE = "org/base"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in that this process takes for the Hub, with the demo's base model on it."""
    with serve_hub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        files = {path.name: path.read_bytes() for path in Path(base_path()).iterdir()}
        served.repositories[BASE] = Repository(private=False, branches={"main": files})
        yield served


def write_run(folder: Path) -> Path:
    """A configuration, with its data."""
    rows = [{"text": f"one <trainable_text>two {n}</trainable_text>", "id": f"row-{n}"} for n in range(4)]
    for name in ("confidential", "held_out"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "my.yaml").write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: confidential.jsonl\n"
        "eval_data: [{path: held_out.jsonl, name: books}]\neval_strategy: steps\neval_steps: 1\n"
        "output_dir: out\nmax_length: 64\nmax_steps: 2\nuse_cpu: true\ndataloader_num_workers: 0\n"
        "learning_rate: 0.01\nlora_r: 4\n"
    )
    return folder / "my.yaml"


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """The folders of two finished runs, not to be written to."""
    found = {}
    for tuning in ("lora", "full"):
        folder = tmp_path_factory.mktemp(tuning)
        lora = [] if tuning == "lora" else ["--tuning", "full", "--lora_r", "16"]
        train_run(load_config(write_run(folder), lora), QUIET)
        found[tuning] = folder / "out"
    return found


@pytest.fixture
def adapter(runs, tmp_path):
    """A copy of the adapter's run that a test may change."""
    return Path(shutil.copytree(runs["lora"], tmp_path / "out"))


@pytest.fixture(scope="session")
def merged(runs, tmp_path_factory):
    """The adapter's run merged into shards, not to be written to."""
    folder = tmp_path_factory.mktemp("merged") / "merged"
    merge_adapter(runs["lora"], folder, max_shard_size="1MB")
    return folder


def push_merged(merged: Path, runs: dict[str, Path], repository: str) -> None:
    options = ["--run", str(runs["lora"]), "--base_model", BASE, "--license", "apache-2.0"]
    done = CliRunner().invoke(app, ["push", str(merged), repository, *options])
    assert done.exit_code == 0, done.output


def code_of(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    return code


def logits_elsewhere(hub: Hub, repositories: list[str], folder: Path) -> dict[str, np.ndarray]:
    """Run the own code of each card without vlcpt, in one process; the models' logits for a text."""
    codes = {name: code_of(hub.files(f"me/{name}")["README.md"].decode()) for name in repositories}
    script = (
        f"import sys, numpy, torch\nfor name, code in {codes!r}.items():\n    found = {{}}\n"
        "    exec(code, found)\n    assert 'vlcpt' not in sys.modules\n"
        "    inputs = found['processor'](text=['three four'], return_tensors='pt')\n"
        "    numpy.save(f'{name}.npy', found['model'].eval()(**inputs).logits.detach().numpy())\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script],
        cwd=folder,
        env={**os.environ, **environment(hub, str(folder / "home"))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {name: np.load(folder / f"{name}.npy") for name in repositories}


def logits_here(folder: Path, processor: object, is_adapter: bool) -> np.ndarray:
    model = AutoModelForImageTextToText.from_pretrained(base_path() if is_adapter else folder)
    model = PeftModel.from_pretrained(model, folder) if is_adapter else model
    with torch.no_grad():
        return model.eval()(**processor(text=["three four"], return_tensors="pt")).logits.numpy()


def test_what_was_pushed_loads_from_there_as_its_card_says_and_gives_the_same_logits(
    hub, runs, merged, tmp_path, tiny_processor
):
    for tuning, folder in runs.items():
        push_adapter(folder, f"me/{tuning}", base_model=BASE)
    push_merged(merged, runs, "me/merged")

    found = logits_elsewhere(hub, ["lora", "full", "merged"], tmp_path)

    for name in found:
        assert any(f"GET /me/{name}/resolve" in request for request in hub.requests)
    expected = {tuning: logits_here(runs[tuning], tiny_processor, tuning == "lora") for tuning in runs}
    for tuning in runs:
        np.testing.assert_allclose(found[tuning], expected[tuning], atol=1e-5)
    np.testing.assert_allclose(found["merged"], expected["lora"], atol=1e-4)
    untrained = logits_here(Path(base_path()), tiny_processor, is_adapter=False)
    assert all(np.abs(logits - untrained).max() > 0.01 for logits in found.values())


def test_only_files_of_the_allow_list_go(hub, adapter):
    for name in ("optimizer.pt", "training_args.bin", "adapter_model.bin", ".env", "notes.md", "data.jsonl"):
        (adapter / name).write_text("private")
    (adapter / "global_step2").mkdir()

    push_adapter(adapter, "me/mine", base_model=BASE)

    assert set(hub.files("me/mine")) == ADAPTER
    held = {path.name for path in adapter.iterdir()}
    assert {
        "config.yaml",
        "ledger.json",
        "train_log.jsonl",
        "checkpoint-2",
    } < held  # or nothing was held back


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_licences_and_what_the_base_says_of_generating_go_byte_for_byte(hub, runs, tmp_path, tuning):
    folder = Path(shutil.copytree(runs[tuning], tmp_path / "out"))
    terms = {name: name.encode() for name in ("LICENSE", "Notice.txt", "COPYING.md", "LICENSE-Apache-2.0")}
    for name, content in terms.items():
        (folder / name).write_bytes(content)
    for name in ("license.key", "license.json", "license.py", "LICENSE.safetensors"):
        (folder / name).write_text("private")

    push_adapter(folder, "me/mine", base_model=BASE)

    files = hub.files("me/mine")
    terms_of = re.compile("(?i)licen|notice|copying")
    assert {name: content for name, content in files.items() if terms_of.match(name)} == terms
    assert files["generation_config.json"] == Path(base_path(), "generation_config.json").read_bytes()


def test_a_licence_that_someone_put_into_the_repository_stays(hub, adapter):
    hub.repositories["me/mine"] = Repository(private=True, branches={"main": {"LICENSE": b"mine"}})

    push_adapter(adapter, "me/mine", base_model=BASE)

    assert hub.files("me/mine")["LICENSE"] == b"mine"


def test_a_configuration_without_paths_goes_byte_for_byte(hub, adapter):
    written = {}
    for name in ("processor_config.json", "tokenizer_config.json", "generation_config.json"):
        found = json.loads((adapter / name).read_text())
        written[name] = json.dumps(found | {"x": "é"}, indent=1).encode() + b"\n\n"
        (adapter / name).write_bytes(written[name])
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": BASE}
    written["adapter_config.json"] = json.dumps(config).encode()
    (adapter / "adapter_config.json").write_bytes(written["adapter_config.json"])

    push_adapter(adapter, "me/mine", base_model=BASE)

    files = hub.files("me/mine")
    assert {name: files[name] for name in written} == written


def test_a_path_does_not_hide_behind_a_second_key_of_its_name(hub, adapter):
    (adapter / "generation_config.json").write_text('{"a": {"x": "/home/me", "x": 1}}')

    with pytest.raises(ValueError, match=r"generation_config.json is no JSON .*the key 'x' stands twice"):
        push_adapter(adapter, "me/mine", base_model=BASE)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_limits_of_pixels_that_were_trained_with_are_in_the_cards_code(runs, tmp_path, tuning):
    folder = Path(shutil.copytree(runs[tuning], tmp_path / "out"))
    with (folder / "config.yaml").open("a") as config:
        config.write("\nmin_pixels: 3136\nmax_pixels: 50176\n")

    push = push_adapter(folder / "checkpoint-2", "me/mine", base_model=BASE, dry_run=True)

    assert "    low = 3136\n    high = 50176\n    part.size = " in code_of(push.card)


def test_a_checkpoint_of_a_run_goes_with_what_the_run_knows_of_it(hub, runs):
    push_adapter(runs["lora"] / "checkpoint-2", "me/mine", base_model=BASE)

    assert set(hub.files("me/mine")) == ADAPTER
    assert "| targets |" in (card := hub.files("me/mine")["README.md"].decode()) and "steps done | 2" in card


def test_a_model_in_shards_goes_complete_and_an_older_one_is_deleted(hub, runs, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(runs["full"])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="1MB")
    hub.repositories["me/mine"] = Repository(
        private=True,
        branches={"main": {"model.safetensors": b"old", "adapter_config.json": b"{}", "mine.png": b"kept"}},
    )

    push_adapter(tmp_path / "sharded", "me/mine")

    files = hub.files("me/mine")
    shards = set(json.loads(files["model.safetensors.index.json"])["weight_map"].values())
    assert len(shards) > 1 and shards <= set(files)
    assert files["mine.png"] == b"kept"
    assert not {"model.safetensors", "adapter_config.json"} & set(files)


def test_a_merged_model_in_shards_goes_with_the_card_of_its_run(hub, runs, merged):
    push_merged(merged, runs, "me/mine")

    files = hub.files("me/mine")
    shards = set(json.loads(files["model.safetensors.index.json"])["weight_map"].values())
    assert len(shards) > 1 and {"config.json", "README.md", *PROCESSOR, *shards} <= set(files)
    card = files["README.md"].decode()
    assert (ModelCard(card).data.base_model, ModelCard(card).data.library_name) == (BASE, "transformers")
    assert "| language tower | LoRA, r 4, alpha 32, dropout 0, merged into the weights |" in card
    assert "| source 1 | 4 | 0 |" in card and "| learning_rate | 0.01 |" in card


def test_a_run_that_is_not_there_is_an_error(adapter):
    with pytest.raises(ConfigError, match=r"--run gone: no such folder"):
        push_adapter(adapter, "me/mine", base_model=BASE, run="gone", dry_run=True)


def test_a_dry_run_names_exactly_what_a_push_sends_and_sends_nothing(hub, adapter, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    planned = push_adapter(adapter, "me/mine", base_model=BASE, dry_run=True)
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    push_adapter(adapter, "me/mine", base_model=BASE)

    sent = hub.files("me/mine")
    assert {file.name: file.size for file in planned.files} == {name: len(sent[name]) for name in sent}
    assert sent["README.md"].decode() == planned.card
    assert planned.url is None


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_is_private_unless_asked_otherwise(hub, adapter, private):
    done = push_adapter(adapter, "me/mine", base_model=BASE, **{} if private else {"private": False})

    assert hub.repositories["me/mine"].private is private is done.private


def test_a_private_push_into_a_public_repository_is_refused(hub, adapter):
    hub.repositories["me/mine"] = Repository(private=False)

    with pytest.raises(ConfigError, match=r"me/mine is on the Hub already and public.*--public"):
        push_adapter(adapter, "me/mine", base_model=BASE)

    assert hub.files("me/mine") == {}
    push_adapter(adapter, "me/mine", base_model=BASE, private=False)
    assert set(hub.files("me/mine")) == ADAPTER


def test_no_path_of_this_machine_is_pushed(hub, adapter):
    for name in ("adapter_config.json", "processor_config.json", "tokenizer_config.json"):
        found = json.loads((adapter / name).read_text())
        found |= {
            "_name_or_path": "runs/mine",
            "tokenizer_file": f"{adapter}/tokenizer.json",
            "x": ["/etc/me"],
        }
        (adapter / name).write_text(json.dumps(found))

    push_adapter(adapter, "me/mine", base_model=BASE)

    for name, content in hub.files("me/mine").items():
        for path in (base_path(), str(adapter), "/etc/me", "runs/mine", str(Path.home())):
            assert path.encode() not in content, (name, path)
    config = json.loads(hub.files("me/mine")["adapter_config.json"])
    assert config["base_model_name_or_path"] == BASE and config["r"] == 4


def test_an_adapter_on_a_folder_needs_its_bases_name(hub, adapter):
    with pytest.raises(ConfigError, match=r"base model is the folder .*--base_model owner/name"):
        push_adapter(adapter, "me/mine", dry_run=True)


def test_a_base_that_is_not_on_the_hub_is_refused(hub, adapter):
    with pytest.raises(ConfigError, match="base model org/none is not on the Hub"):
        push_adapter(adapter, "me/mine", base_model="org/none")

    assert hub.files("me/mine") == {}


def test_a_branch_is_made_and_named_in_the_card(hub, adapter):
    push_adapter(adapter, "me/mine", base_model=BASE, revision="v1")

    assert set(hub.files("me/mine", "v1")) == ADAPTER
    assert hub.files("me/mine") == {}
    card = hub.files("me/mine", "v1")["README.md"].decode()
    assert code_of(card).count('"me/mine", revision="v1"') == 2


@pytest.mark.parametrize(
    ("stage", "status"), [("/commit/", 500), ("objects/batch", 403), ("/large/", 403), ("preupload", 404)]
)
def test_a_failed_push_keeps_the_weights_and_says_how_to_try_again(hub, adapter, stage, status):
    before = {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()}
    hub.fail_at, hub.status = stage, status

    with pytest.raises(ValueError, match=r"me/mine: the push failed: .*is unchanged") as failed:
        push_adapter(adapter, "me/mine", base_model=BASE, licence=Licence("apache-2.0"))

    assert not isinstance(failed.value, ConfigError)
    assert TOKEN not in str(failed.value)
    assert {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()} == before
    assert hub.files("me/mine") == {}  # no half of a commit
    hub.fail_at = None
    command = shlex.split(str(failed.value).partition("Try again: ")[2])
    assert command[:2] == ["vlcpt", "push"]
    again = CliRunner().invoke(app, command[1:])
    assert again.exit_code == 0, again.output
    assert set(hub.files("me/mine")) == ADAPTER
    assert "license: apache-2.0" in hub.files("me/mine")["README.md"].decode()


def test_a_hub_that_is_not_there_is_one_message(hub, adapter, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    message = r"me/mine: the repository could not be opened.*refused.*Try again: vlcpt push .* --base_model"
    with pytest.raises(ValueError, match=message):
        push_adapter(adapter, "me/mine", base_model=BASE)


def test_a_hub_that_does_not_answer_is_said_after_seconds_and_not_after_minutes(adapter, monkeypatch):
    """A firewall that drops packets looks so; the library's own calls wait without end."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(access, "_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ValueError, match=r"could not be opened for a push: .*timed out"):
            push_adapter(adapter, "me/mine", base_model=BASE)


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["merge", "none", "new"], 2, "none: no such folder"),
        (["merge", "out", "out"], 2, "out exists and is not empty"),
        (["merge", "cut", "new"], 2, "one of them is missing"),
        (["push", "none", "me/mine"], 2, "none: no such folder"),
        (["push", "cut", "me/mine"], 2, "one of them is missing"),
        (["push", "out", "me/mine", "--run", "none"], 2, "--run none: no such folder"),
        (["push", "out", "a/b/c"], 2, "no name of a repository"),
        (["push", "out", "me/mine"], 1, "could not be opened for a push"),
    ],
)
def test_what_can_be_refused_without_torch_is_refused_before_it_is_loaded(adapter, command, code, message):
    (adapter.parent / "cut").mkdir()
    shutil.copy(adapter / "adapter_config.json", adapter.parent / "cut")
    script = (
        f"import sys\nfrom vlcpt.cli import app\ntry:\n    app({command!r})\nexcept SystemExit as ended:\n"
        "    print(ended.code, 'torch' in sys.modules)\n"
    )
    there = {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}

    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=adapter.parent,
        env={**os.environ, **there},
        capture_output=True,
        text=True,
    )

    assert (done.stdout, message in done.stderr) == (f"{code} False\n", True), done.stderr


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (["out", "me/mine", "--base_model", BASE], None, "no access token for the Hub"),
        (["out", "me/mine", "--base_model", BASE], "hf_wrong", "does not let this token write there"),
        (["out", "them/theirs", "--base_model", BASE], TOKEN, "does not let this token write there"),
        (["out", "a/b/c"], TOKEN, "'a/b/c' is no name of a repository"),
        (["out", "me/mine", "--base_model", "../base"], TOKEN, "'../base' is no name of a repository"),
        (["out", "me/mine", "--revision", "a b"], TOKEN, "'a b' is no name of a branch"),
        (["none", "me/mine"], TOKEN, "none: no such folder"),
        (["out", "me/mine", "--evaluation", "none.json"], TOKEN, "none.json: no such file"),
    ],
)
def test_a_wrong_push_is_one_message_and_exit_code_2(hub, adapter, monkeypatch, arguments, token, message):
    monkeypatch.chdir(adapter.parent)
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)

    result = CliRunner().invoke(app, ["push", *arguments])

    assert result.exit_code == 2, result.output
    assert message in result.output and "Traceback" not in result.output
    assert "hf_" not in result.output
    assert not any("/commit/" in request for request in hub.requests)


def test_an_incomplete_checkpoint_is_not_pushed(hub, adapter):
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"pickle")

    result = CliRunner().invoke(app, ["push", str(adapter), "me/mine", "--base_model", BASE])

    assert result.exit_code == 1
    assert "a format that can run code" in result.output
    assert hub.requests == ["HEAD /"]  # whether it is there: nothing is sent


@pytest.mark.parametrize("width", [40, 200])
def test_a_dry_run_shows_every_file_and_the_card_at_any_width(adapter, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    planned = push_adapter(adapter, "me/mine", base_model=BASE, dry_run=True)

    result = CliRunner().invoke(app, ["push", str(adapter), "me/mine", "--base_model", BASE, "--dry-run"])

    assert result.exit_code == 0, result.output
    assert "would go to me/mine (private, branch main)" in result.output
    for file in planned.files:
        assert file.name in result.output and f"{file.size:,}" in result.output
    assert all(line in result.output for line in planned.card.splitlines())


def test_the_card_tells_what_was_done_and_no_file_name(adapter):
    card = push_adapter(adapter, "me/mine", base_model=BASE, dry_run=True).card
    ledger = json.loads((adapter / "ledger.json").read_text())["total"]
    log = [json.loads(line) for line in (adapter / "train_log.jsonl").read_text().splitlines()]
    measured = [entry["eval_books_loss"] for entry in log if "eval_books_loss" in entry][-1]

    data = ModelCard(card).data
    assert (data.base_model, data.library_name, data.license) == (BASE, "peft", "other")
    assert (data.license_name, data.license_link) == ("unknown", f"https://huggingface.co/{BASE}")
    assert "Licence: not stated." in card
    assert "| language tower | LoRA, r 4, alpha 32, dropout 0 |" in card
    assert "| vision tower | frozen |" in card
    assert f"| source 1 | 4 | 0 | {ledger['tokens']['targets']} |" in card
    assert "| learning_rate | 0.01 |" in card and "| steps done | 2 |" in card
    assert f"| books | {measured:.4g} |" in card and "measured at step 2" in card
    assert "- transformers 5." in card and "- peft 0." in card
    for name in ("confidential", "held_out", "row-", str(adapter)):
        assert name not in card


def test_a_licence_that_was_given_is_the_cards(adapter):
    own = Licence("my-licence", "https://example.org/licence")
    card = push_adapter(adapter, "me/mine", base_model=BASE, dry_run=True, licence=own).card

    data = ModelCard(card).data
    assert (data.license, data.license_name) == ("other", "my-licence")
    assert data.license_link == "https://example.org/licence"


def test_numbers_of_an_evaluation_come_into_the_card(adapter, tmp_path):
    sets = {"books": {"loss": 1.25, "perplexity": 3.49, "base_loss": 4.5, "targets": 12345}}
    (tmp_path / "eval.json").write_text(json.dumps({"sets": sets}))

    card = push_adapter(
        adapter, "me/mine", base_model=BASE, dry_run=True, evaluation=tmp_path / "eval.json"
    ).card

    assert "| set | targets | loss | perplexity | base's loss |" in card
    assert "| books | 12,345 | 1.25 | 3.49 | 4.5 |" in card


def test_a_merged_model_carries_the_evaluation_of_its_run_with_its_plot(adapter, tmp_path):
    """Merging copies the run's record."""
    one = {"loss": 1.25, "base_loss": 4.5, "intervals": {"learnt": [3.0, 3.5]}}
    (adapter / "eval.json").write_text(json.dumps({"sets": {"books": one}, "retention": []}))
    merge_adapter(adapter, tmp_path / "merged")

    push = push_adapter(tmp_path / "merged", "me/mine", dry_run=True)

    assert [file.name for file in push.files][:2] == ["README.md", "evaluation.png"]
    assert "The loss is 1.250, 3.250 less than before (95% interval 3.000 to 3.500)" in push.card
    assert "](evaluation.png)" in push.card


def test_a_folder_without_its_runs_files_says_that_nothing_is_known(runs, tmp_path):
    shutil.copytree(runs["full"], tmp_path / "alone")
    for name in ("config.yaml", "ledger.json", "train_log.jsonl"):
        (tmp_path / "alone" / name).unlink()

    card = push_adapter(tmp_path / "alone", "me/mine", dry_run=True).card

    assert card.count("Not recorded beside these files.") == 3
    assert "None was recorded." in card and "Base: a model that is not named here" in card


def test_hostile_names_are_only_text_in_the_card(adapter):
    hostile = 'x|<script>alert(1)</script>](http://a.b) {{ 7*7 }} `\x1b[2J"'
    config = (adapter / "config.yaml").read_text()
    name = json.dumps(hostile)
    assert "train_data:\n" in config
    changed = config.replace("train_data:\n", f"train_data:\n- {{path: a.jsonl, name: {name}}}\n")
    (adapter / "config.yaml").write_text(changed)
    ledger = json.loads((adapter / "ledger.json").read_text())
    ledger["sources"] = {hostile: ledger["sources"]["confidential"]}
    (adapter / "ledger.json").write_text(json.dumps(ledger))

    card = push_adapter(adapter, "me/mine", base_model=BASE, dry_run=True).card

    assert not re.search(r"\x1b|49", card)
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(card)
    assert html.escape(hostile.replace("\x1b", "\ufffd")) in page
    assert not re.search(r"<script|<a href=\"http://a", page)
    (row,) = re.findall(r"<tr>(?:(?!</tr>).)*script.*?</tr>", page, re.DOTALL)
    assert row.count("<td") == 7


def test_push_to_hub_opens_the_repository_before_training_and_pushes_once_after(hub, tmp_path, monkeypatch):
    config = load_config(
        write_run(tmp_path), ["--push_to_hub", "true", "--hub_model_id", "mine", "--save_steps", "1"]
    )
    config = replace(config, model=replace(config.model, tuning="full", lora_r=16))
    train_run(config, QUIET)

    assert hub.repositories["me/mine"].private
    assert {"README.md", "model.safetensors", "config.json", *PROCESSOR} <= set(hub.files("me/mine"))
    assert len(hub.repositories["me/mine"].commits) == 1
    assert not any(name.startswith("checkpoint") for name in hub.files("me/mine"))
    pushed = hub.files("me/mine")["model.safetensors"]
    assert pushed == (tmp_path / "out/model.safetensors").read_bytes()
    written = (tmp_path / "out/config.yaml").read_text()
    assert "push_to_hub" not in written and "hub_" not in written  # repeating the run leaves this push alone


@pytest.mark.parametrize(
    ("lines", "token", "message"),
    [
        ("tuning: full", None, "no access token for the Hub"),
        ("tuning: full\nhub_model_id: them/theirs", TOKEN, "does not let this token write there"),
        ("tuning: lora", TOKEN, "push_to_hub: an adapter on the Hub needs its base there"),
    ],
)
def test_a_push_that_cannot_work_is_an_error_before_anything_is_read(
    hub, tmp_path, monkeypatch, lines, token, message
):
    config = write_run(tmp_path)
    config.write_text(config.read_text().replace("lora_r: 4\n", "") + f"{lines}\npush_to_hub: true\n")
    (tmp_path / "confidential.jsonl").write_text("not read\n")
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)

    result = CliRunner().invoke(app, ["train", str(config)])

    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_base_that_is_not_on_the_hub_is_an_error_before_anything_is_read(hub, tmp_path, tuning):
    config = write_run(tmp_path)
    written = config.read_text().replace(base_path(), "org/none").replace("lora_r: 4\n", "")
    config.write_text(f"{written}tuning: {tuning}\npush_to_hub: true\n")
    (tmp_path / "confidential.jsonl").write_text("not read\n")

    result = CliRunner().invoke(app, ["train", str(config)])

    assert result.exit_code == 2, result.output
    assert "the base model org/none is not on the Hub, or not for this token" in result.output
    assert not (tmp_path / "out").exists()
    config.write_text(config.read_text().replace("org/none", BASE))
    assert open_repository(load_config(config)) == "me/out"  # or any base would be refused


def test_a_base_that_left_the_hub_while_a_run_trained_is_an_error_with_the_command_to_try_again(hub, adapter):
    config = load_config(
        write_run(adapter.parent), ["--output_dir", str(adapter), "--hub_private_repo", "false"]
    )
    saved = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(saved | {"base_model_name_or_path": "org/gone"}))

    with pytest.raises(ValueError, match=r"is saved, but not pushed: the base model org/gone") as failed:
        push_run(config, "me/mine")

    assert not isinstance(failed.value, ConfigError)  # after training the exit code is 1
    hub.repositories["org/gone"] = hub.repositories[BASE]
    command = shlex.split(str(failed.value).partition("Try again: ")[2])
    again = CliRunner().invoke(app, command[1:])
    assert again.exit_code == 0, again.output
    assert set(hub.files("me/mine")) == ADAPTER and not hub.repositories["me/mine"].private


def test_a_run_whose_push_fails_ends_with_1_and_keeps_its_model(hub, tmp_path):
    hub.fail_at = "/commit/"
    config = write_run(tmp_path)
    config.write_text(config.read_text().replace("lora_r: 4\n", "") + "tuning: full\npush_to_hub: true\n")

    result = CliRunner().invoke(app, ["train", str(config)])

    assert result.exit_code == 1
    assert re.search(
        r"me/out: the push failed.*Try again: vlcpt push .*out me/out$", result.output, re.M | re.S
    )
    assert load_file(tmp_path / "out/model.safetensors")


@pytest.mark.slow
@pytest.mark.alone
def test_of_two_processes_one_pushes(hub, tmp_path):
    config = write_run(tmp_path)
    config.write_text(config.read_text().replace("lora_r: 4\n", "") + "tuning: full\npush_to_hub: true\n")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "-m",
            "vlcpt",
            "train",
            "my.yaml",
        ],
        cwd=tmp_path,
        env={**os.environ, **environment(hub, str(tmp_path / "home")), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert len(hub.repositories[f"{OWNER}/out"].commits) == 1
    assert (
        len([request for request in hub.requests if request == "POST /api/repos/create"]) == 2
    )  # before, after


def test_a_folder_into_which_a_run_still_writes_is_not_pushed_and_its_complete_checkpoints_are(adapter):
    (adapter / "checkpoint-9").mkdir()
    (adapter / "checkpoint-9" / UNFINISHED).touch()
    with holding(adapter) as (first, _):
        with pytest.raises(ConfigError, match=rf"the run's folder .* is in use by process {first.pid} on"):
            push_adapter(adapter, "me/mine", base_model=BASE, dry_run=True)
        with pytest.raises(ConfigError, match="checkpoint-9 was not saved to its end"):
            push_adapter(adapter / "checkpoint-9", "me/mine", base_model=BASE, dry_run=True)
        push_adapter(adapter / "checkpoint-2", "me/mine", base_model=BASE, dry_run=True)
    (adapter / LOCK).write_text("1 elsewhere")  # as a run that was killed leaves it
    push = push_adapter(adapter, "me/mine", base_model=BASE, dry_run=True)
    assert LOCK not in [file.name for file in push.files]
