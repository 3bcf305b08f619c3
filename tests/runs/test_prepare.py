"""``vlcpt prepare``: what it writes trains as the rows do, and how it refuses."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.processes import holding
from tests.support import png
from vlcpt.cli import app
from vlcpt.config.yaml import Configs, load_config
from vlcpt.data.documents import DocumentError
from vlcpt.data.encode.encoder import DocumentEncoder
from vlcpt.data.plan.ledger import BadDataError
from vlcpt.demo import base_path
from vlcpt.errors import ConfigError
from vlcpt.runs.check import check_run
from vlcpt.runs.evaluate import eval_run
from vlcpt.runs.inspect import inspect_run
from vlcpt.runs.prepare import prepare_run
from vlcpt.runs.train import train_run

QUIET = Console(file=StringIO(), width=100)
DATA = {
    "train_data": "[{path: a.jsonl, share: 0.6}, {path: b.jsonl, name: talks/b, share: 0.4}]",
    "replay_data": "[{path: old.jsonl}]",
    "eval_data": "[{path: a.jsonl, name: held}]",
    "retention_data": "[{path: old.jsonl}]",
}
PREPARED = dict.fromkeys(DATA, "[{path: set}]")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Two training sources, one of them conversations with images, and an old one."""
    (tmp_path / "media/talks").mkdir(parents=True)
    (tmp_path / "media/talks/red.png").write_bytes(png(1, 84, 56))
    texts = [{"text": f"one <trainable_text>two {n}</trainable_text>", "id": f"a{n}"} for n in range(5)]
    talk = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "a house"}]
    rows = {
        "a": texts,
        "b": [{"messages": talk, "images": ["media/talks/red.png"]}] * 3,
        "old": texts[:2] + texts[:1],
    }
    for name, found in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)) + "\n")
    return tmp_path


def configs(project: Path, data: dict[str, str] = DATA, *overrides: str) -> Configs:
    lines = [f"{key}: {value}" for key, value in data.items()]
    lines += ["eval_on_start: true"] * ("eval_data" in data) + ["replay_share: 0.2"] * ("replay_data" in data)
    (project / "my.yaml").write_text(
        f"model_name_or_path: {base_path()}\noutput_dir: out\nmax_length: 64\nmax_steps: 3\nuse_cpu: true\n"
        "dataloader_num_workers: 0\nlearning_rate: 1e-3\n" + "\n".join(lines)
    )
    return load_config(project / "my.yaml", overrides)


def losses(folder: Path) -> list[object]:
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "loss" in key} for line in lines]


def test_a_run_from_what_was_prepared_is_the_run_from_its_rows(project: Path) -> None:
    train_run(configs(project), QUIET)
    prepare_run(configs(project), project / "set", console=QUIET)
    for path in (*project.glob("*.jsonl"), project / "media/talks/red.png"):
        path.unlink()
    train_run(configs(project, PREPARED, "--output_dir", str(project / "again")), QUIET)

    for name in ("ledger.json", "dropped.jsonl"):
        assert (project / "again" / name).read_text() == (project / "out" / name).read_text()
    assert json.loads((project / "out/ledger.json").read_text())["sources"].keys() == {"a", "talks/b", "old"}
    assert losses(project / "again") == losses(project / "out")
    assert any("loss" in line for line in losses(project / "out"))
    weights = "adapter_model.safetensors"
    assert (project / "again" / weights).read_bytes() == (project / "out" / weights).read_bytes()


def test_it_is_measured_checked_and_shown_as_its_rows_are(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlcpt.runs.check.seconds_to_load", lambda *ignored: 1.0)  # a measured time
    prepare_run(configs(project), project / "set", console=QUIET)
    train_run(configs(project, PREPARED), QUIET)
    shown = {}
    for name, data in {"rows": DATA, "set": PREPARED}.items():
        console = Console(file=StringIO(), width=100)
        found = configs(project, data)
        results = eval_run(found, project / "out", console=console)
        assert check_run(found, console=console).is_complete
        inspect_run(found, slice(0, 3), console)
        shown[name] = (results, console.file.getvalue())  # type: ignore[attr-defined]

    assert list(shown["rows"][0]) == ["held", "old"]
    # That what is held out is trained as well is known of a prepared set, too.
    advice = (
        "\nwhat to change\n→ held, old: the same data is trained, so that its loss shows what was memorised: "
        "measure documents that are not trained.\n"
    )
    assert shown["rows"][1].count(advice) == 1
    assert shown["set"] == shown["rows"]


def test_the_command_says_how_to_train_from_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs(project)
    monkeypatch.chdir(project)

    first = CliRunner().invoke(app, ["prepare", "my.yaml", "--output", "set"])
    again = CliRunner().invoke(app, ["prepare", "my.yaml", "--output", "set", "--engine", "local"])

    assert first.exit_code == 0, first.output
    assert again.exit_code == 0, again.output
    assert 'train_data: "set"' in first.output
    assert "media files beside the rows" not in first.output  # they are those of b.jsonl
    assert {"prepared.json", "ledger.json", "dropped.jsonl"} <= {path.name for path in Path("set").iterdir()}
    assert not Path("set/preparing.json").exists()


def test_one_of_its_sources_can_be_named_alone(project: Path) -> None:
    prepare_run(configs(project), project / "set", console=QUIET)
    alone = {"train_data": "[{path: set/train_data/talks%2Fb, name: talks}, {path: a.jsonl}]"}

    trained = train_run(configs(project, alone), QUIET).train_dataset.ledger

    assert {name: one.documents["used"] for name, one in trained.sources.items()} == {"talks": 3, "a": 5}


@pytest.mark.parametrize(
    ("data", "reported"),
    [
        ("[{path: set, share: 1}]", "share cannot be set for 2 sources at once. Give each its own entry: "),
        ("[{path: set, name: mine}]", "name cannot be set for 2 sources at once"),
        ("[{path: set, format: messages}]", "format 'messages' does not apply: it was prepared with format"),
    ],
    ids=["share", "name", "format"],
)
def test_what_is_said_of_one_source_does_not_fit_several(project: Path, data: str, reported: str) -> None:
    prepare_run(configs(project), project / "set", console=QUIET)

    with pytest.raises(DocumentError) as error:
        train_run(configs(project, {"train_data": data}), QUIET)

    assert reported in str(error.value)


def test_a_set_without_held_out_data_says_so(project: Path) -> None:
    only = {"train_data": "[{path: a.jsonl}]"}
    prepare_run(configs(project, only), project / "set", console=QUIET)

    with pytest.raises(DocumentError, match=r"prepared without eval_data; it holds train_data a\. Give the"):
        eval_run(configs(project, {**only, "eval_data": "[{path: set}]"}), Path(base_path()), console=QUIET)


def test_too_many_bad_rows_leave_it_unfinished_and_no_work_is_lost(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (project / "a.jsonl").open("a") as file:
        file.write('{"text": 7}\n')
    only = {"train_data": "[{path: a.jsonl}]", "on_bad_data": "skip"}
    with pytest.raises(BadDataError, match="1 of 6 rows of 'a' cannot be used, more than max_bad_fraction"):
        prepare_run(configs(project, only), project / "set", console=QUIET)
    with pytest.raises(DocumentError, match=r"not prepared to its end\. Run the same vlcpt prepare again"):
        train_run(configs(project, {"train_data": "set"}), QUIET)

    monkeypatch.setattr(DocumentEncoder, "tokens", None)  # nothing is encoded again
    prepare_run(configs(project, only, "--max_bad_fraction", "0.5"), project / "set", console=QUIET)

    ledger = json.loads((project / "set/ledger.json").read_text())
    assert ledger["sources"]["a"]["documents"]["dropped"] == {"row": 1}


def test_another_configuration_goes_on_only_from_the_start(project: Path) -> None:
    only = {"train_data": "[{path: a.jsonl}]"}
    prepare_run(configs(project, only), project / "set", console=QUIET)
    (project / "set/notes.txt").write_text("mine")
    masked = configs(project, only, "--train_eos", "never")
    with pytest.raises(DocumentError, match='train_eos: "auto" then, "never" now'):
        prepare_run(masked, project / "set", console=QUIET)

    masked.training.overwrite = True
    prepare_run(masked, project / "set", console=QUIET)

    reported = json.loads((project / "set/train_data/a/prepared.json").read_text())
    assert reported["fingerprint"]["train_eos"] == "never"
    assert (project / "set/notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("output", "engine", "reported"),
    [
        ("my.yaml", "local", "is a file. Give a folder"),
        ("s3://bucket/set", "local", "shards are written to a folder. Give one, and copy it"),
        (".", "local", "is not empty, and holds nothing that was prepared. Give another folder"),
        ("set", "ray", r"needs Ray: pip install"),
    ],
    ids=["file", "address", "foreign", "no ray"],
)
def test_an_output_that_cannot_be_used_is_reported_first(
    project: Path, monkeypatch: pytest.MonkeyPatch, output: str, engine: str, reported: str
) -> None:
    monkeypatch.setattr("vlcpt.runs.prepare.find_spec", lambda name: None)
    found = configs(project)
    monkeypatch.chdir(project)

    with pytest.raises(ConfigError, match=reported):
        prepare_run(found, Path(output), engine, QUIET)  # type: ignore[arg-type]
    assert not (project / "set").exists()


def test_a_wrong_engine_is_a_wrong_command(project: Path) -> None:
    configs(project)
    arguments = ["prepare", str(project / "my.yaml"), "--output", "set", "--engine", "spark"]

    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_what_is_prepared_is_not_prepared_again(project: Path) -> None:
    prepare_run(configs(project), project / "set", console=QUIET)

    with pytest.raises(DocumentError, match="set: it is prepared already"):
        prepare_run(configs(project, {"train_data": "set"}), project / "other", console=QUIET)


def test_a_cut_image_is_left_out_and_not_encoded(project: Path) -> None:
    """Its header is whole, so that only training would find it, from the rows."""
    whole = png(2, 84, 56)
    (project / "cut.png").write_bytes(whole[: len(whole) // 2])
    row = {"text": "<image>is <trainable_text>cut</trainable_text>", "images": ["cut.png"]}
    with (project / "a.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    skip = ("--on_bad_data", "skip", "--max_bad_fraction", "0.5")

    prepare_run(configs(project, {"train_data": "a.jsonl"}, *skip), project / "set", console=QUIET)

    ledger = json.loads((project / "set/ledger.json").read_text())
    assert ledger["total"]["documents"]["used"] == 5
    assert ledger["total"]["documents"]["dropped"] == {"medium": 1}


def test_overwrite_starts_afresh_only_where_something_was_prepared(project: Path) -> None:
    prepare_run(configs(project), project / "mine/sub/set", console=QUIET)
    found = configs(project)
    found.training.overwrite = True

    with pytest.raises(ConfigError, match="is not empty, and holds nothing that was prepared"):
        prepare_run(found, project / "mine", console=QUIET)

    assert (project / "mine/sub/set/prepared.json").is_file()


def test_a_folder_that_another_process_prepares_is_refused(project: Path) -> None:
    run = configs(project)
    with (
        holding(project / "set") as (first, _),
        pytest.raises(ConfigError, match=rf"--output .*set is in use by process {first.pid} on host "),
    ):
        prepare_run(run, project / "set", console=QUIET)
    prepare_run(run, project / "set", console=QUIET)
    assert not list((project / "set").rglob(".vlcpt.lock"))
