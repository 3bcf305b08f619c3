"""A run from its configuration; tests/test_cli.py types the commands."""

import json
import re
import shlex
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.processes import holding, run_on_ranks, start_ranks
from tests.support import png
from vlcpt.cli import app
from vlcpt.config.yaml import Configs, load_config
from vlcpt.data.plan.scan import SourceScanner
from vlcpt.demo import base_path
from vlcpt.errors import ConfigError
from vlcpt.file_writes import write_json
from vlcpt.report.card import read_run
from vlcpt.runs.check import check_run
from vlcpt.runs.evaluate import eval_run
from vlcpt.runs.inspect import inspect_run
from vlcpt.runs.train import prepare_output, train_run

QUIET = Console(file=StringIO(), width=100)


def configs(folder: Path, *overrides: str) -> Configs:
    rows = [{"text": f"one <trainable_text>two {n}</trainable_text>"} for n in range(4)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "my.yaml").write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: train.jsonl\n"
        "eval_data: [{path: train.jsonl, name: same}]\noutput_dir: out\nmax_length: 64\nmax_steps: 2\n"
        "use_cpu: true\ndataloader_num_workers: 0\nlearning_rate: 1e-3\n"
    )
    return load_config(folder / "my.yaml", overrides)


@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
def test_a_trained_model_is_measured_beside_its_base(tmp_path: Path, tuning: str) -> None:
    run = configs(tmp_path, "--tuning", tuning)
    train_run(run, QUIET)
    untrained = eval_run(configs(tmp_path, "--tuning", tuning), tmp_path / "out", console=QUIET)["same"]

    assert untrained["base_loss"] is not None
    assert untrained["loss"] < untrained["base_loss"]
    # The run has measured the same at its end; of a base that it no longer holds, before its first step.
    found = json.loads((tmp_path / "out/eval.json").read_text())
    judged = found["sets"]["same"]
    bound = 1e-2 if tuning == "qlora" else 1e-5
    assert [judged[key] for key in ("loss", "base_loss")] == pytest.approx(
        [untrained[key] for key in ("loss", "base_loss")], rel=bound
    )
    assert len(found["samples"]["same"]) == 2


def with_images(folder: Path, *overrides: str) -> Configs:
    """A run on eight documents with an image each, which are held out and kept as well."""
    rows = []
    for number in range(8):
        (folder / f"{number}.png").write_bytes(png(number))
        text = f"<image>page <trainable_text>{number * 7} lines</trainable_text>"
        rows.append({"text": text, "images": [f"{number}.png"]})
    configs(folder)
    (folder / "seen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "seen.yaml").write_text(
        (folder / "my.yaml").read_text().replace("train.jsonl", "seen.jsonl").replace("max_steps: 2", "")
        + "max_steps: 3\nretention_data: [{path: seen.jsonl, name: kept}]\n"
    )
    return load_config(folder / "seen.yaml", overrides)


def test_the_curve_of_reliance_begins_at_the_base_and_ends_at_eval_json(tmp_path: Path) -> None:
    trainer = train_run(with_images(tmp_path), QUIET)
    base = eval_run(with_images(tmp_path, "--tuning", "full"), Path(base_path()), console=QUIET)
    judged = json.loads((tmp_path / "out/eval.json").read_text())["sets"]

    log = [json.loads(line) for line in (tmp_path / "out/train_log.jsonl").read_text().splitlines()]
    for name in ("same", "kept"):
        curve = [(line["step"], line[f"eval_{name}_reliance"]) for line in log if f"eval_{name}_loss" in line]
        ends = [one["blank_images_loss"] - one["loss"] for one in (base[name], judged[name])]
        assert [step for step, _ in curve] == [0, 3]
        assert [value for _, value in curve] == pytest.approx(ends, abs=1e-5)
        assert min(map(abs, ends)) > 1e-3
    history = [line for line in trainer.state.log_history if "eval_same_loss" in line]
    assert [line["eval_same_reliance"] for line in history] == [
        line["eval_same_reliance"] for line in log if "eval_same_loss" in line
    ]


IN_TRAINING = ("--eval_strategy", "steps", "--eval_steps", "3", "--eval_on_start", "true")


def test_without_eval_json_the_verdict_has_what_blank_images_cost(tmp_path: Path) -> None:
    """As under ZeRO-3, where the end is not measured with other images."""
    console = Console(file=StringIO(), width=200)

    train_run(with_images(tmp_path, *IN_TRAINING), console)

    assert not (tmp_path / "out/eval.json").exists()
    shown = console.file.getvalue()
    assert re.search(r"same: a blank image costs \S+ nats a target, and \S+ before training", shown), shown
    assert len(re.findall(r"^\s*reliance +\S+ +\S+ +[+-]\S+\s*$", shown, re.M)) == 2


@pytest.mark.parametrize("evaluates", [(), IN_TRAINING])
def test_advice_names_the_runs_own_files(tmp_path: Path, evaluates: tuple[str, ...]) -> None:
    """Whether it is judged as by ``vlcpt eval``, or by its own evaluations alone."""
    console = Console(file=StringIO(), width=400)

    run = with_images(tmp_path, "--learning_rate", "0", *evaluates)
    train_run(run, console, config_path=tmp_path / "my seen.yaml")

    shown = console.file.getvalue()
    assert (tmp_path / "out/eval.json").exists() == (not evaluates)
    commands = re.findall("`vlcpt inspect ([^`]*)`", shown)
    assert commands, shown
    assert {shlex.split(one)[0] for one in commands} == {str(tmp_path / "my seen.yaml")}


def test_a_run_that_is_not_to_be_evaluated_is_not_judged(tmp_path: Path) -> None:
    trainer = train_run(configs(tmp_path, "--eval_strategy", "no"), QUIET)

    assert not [entry for entry in trainer.state.log_history if "eval_same_loss" in entry]
    assert not (tmp_path / "out/eval.json").exists()


def test_evaluation_during_training_measures_each_set_by_name(tmp_path: Path) -> None:
    trainer = train_run(configs(tmp_path, "--eval_strategy", "steps", "--eval_steps", "1"), QUIET)

    assert [entry for entry in trainer.state.log_history if "eval_same_loss" in entry]


@pytest.mark.parametrize("fails", [True, False])
def test_the_ledger_is_shown_again_if_documents_failed_in_training(tmp_path: Path, fails: bool) -> None:
    image = tmp_path / "a.png"
    skips = ("--on_bad_data", "skip", "--max_bad_fraction", "1", "--packing", "false")
    run = configs(tmp_path, *skips, "--max_steps", "-1", "--num_train_epochs", "1")
    image.write_bytes(png(0, 56, 56)[: 60 if fails else None])  # its header is whole
    with (tmp_path / "train.jsonl").open("a") as file:
        row = {"text": "<image><trainable_text>one</trainable_text>", "images": ["a.png"]}
        file.write(json.dumps(row) + "\n")
    shown = StringIO()
    trainer = train_run(run, Console(file=shown, width=120))

    text = shown.getvalue()
    used = trainer.train_dataset.ledger.total.documents["used"]
    assert text.count("documents read") == 1 + fails
    assert ("1 document failed in training, see dropped.jsonl" in text) == fails
    if fails:
        before, after = text.split("failed in training")
        assert "dropped: medium" in after and "dropped: medium" not in before
        assert f"used {used}".split() in [line.split() for line in after.splitlines()]


def test_nothing_to_measure_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is nothing to measure"):
        eval_run(configs(tmp_path, "--eval_data", "[]"), tmp_path, console=QUIET)


def test_resuming_or_an_empty_folder_needs_no_overwrite(tmp_path: Path) -> None:
    run = configs(tmp_path)
    (tmp_path / "out").mkdir()
    prepare_output(run)
    (tmp_path / "out/checkpoint-1").mkdir()

    with pytest.raises(ConfigError, match="is not empty"):
        prepare_output(run)
    prepare_output(configs(tmp_path, "--resume_from_checkpoint", "true"))
    assert (tmp_path / "out/checkpoint-1").is_dir()


def test_a_run_that_was_stopped_while_it_planned_starts_again_without_overwrite(tmp_path: Path) -> None:
    run = configs(tmp_path)
    good = (tmp_path / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text('{"text": "<trainable_text>"}\n' + good)
    with pytest.raises(ValueError, match="is not closed"):
        train_run(run, QUIET)
    (tmp_path / "out/plan").mkdir(parents=True, exist_ok=True)
    (tmp_path / "train.jsonl").write_text(good)
    train_run(run, QUIET)

    assert list((tmp_path / "out/plan/train").iterdir())


def test_a_resumed_run_plans_from_what_was_read(tmp_path: Path, monkeypatch) -> None:
    train_run(configs(tmp_path, "--eval_strategy", "epoch", "--save_strategy", "epoch"), QUIET)
    assert sorted(path.name for path in (tmp_path / "out/plan").iterdir()) == ["eval-same", "train"]
    arguments = ["--resume_from_checkpoint", "true", "--max_steps", "3", "--eval_strategy", "epoch"]
    again = load_config(tmp_path / "my.yaml", arguments)

    def unread(scanner, piece):
        raise AssertionError(f"piece {piece} was read again")

    monkeypatch.setattr(SourceScanner, "__getitem__", unread)
    screen = Console(file=StringIO(), width=100)
    assert train_run(again, screen).state.global_step == 3
    said = screen.file.getvalue()
    assert re.search(r"\n2 \+ 1 step, .* s since the resume\. Its page: ", said)


def test_overwriting_plans_anew(tmp_path: Path) -> None:
    train_run(configs(tmp_path), QUIET)
    prepare_output(configs(tmp_path, "--overwrite"))

    assert not (tmp_path / "out/plan").exists()


def test_a_run_that_overwrites_says_which_checkpoints_it_deleted(tmp_path: Path) -> None:
    for step in (2, 10):
        (tmp_path / f"out/checkpoint-{step}").mkdir(parents=True)
    screen = Console(file=StringIO(), width=100)

    train_run(configs(tmp_path, "--overwrite", "true"), screen)

    assert screen.file.getvalue().startswith("overwrite: deleted checkpoint-2, checkpoint-10\n")


def test_json_is_written_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "new/a.json", {"value": "阀"})

    assert json.loads((tmp_path / "new/a.json").read_text("utf-8")) == {"value": "阀"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_overwriting_takes_away_an_older_adapter(tmp_path: Path) -> None:
    train_run(configs(tmp_path), QUIET)
    train_run(configs(tmp_path, "--tuning", "full", "--overwrite"), QUIET)

    assert (tmp_path / "out/model.safetensors").is_file()
    assert not (tmp_path / "out/adapter_config.json").exists()


def test_overwriting_keeps_what_a_person_put_there(tmp_path: Path) -> None:
    run = configs(tmp_path, "--overwrite")
    (tmp_path / "out/checkpoint-mine").mkdir(parents=True)
    (tmp_path / "out/checkpoint-7").mkdir()
    (tmp_path / "out/checkpoint-7.tar").write_text("a copy")
    prepare_output(run)

    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["checkpoint-7.tar", "checkpoint-mine"]


def test_overwriting_takes_away_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    run = configs(tmp_path, "--overwrite")
    (tmp_path / "out").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/model.safetensors").write_text("kept")
    (tmp_path / "out/checkpoint-7").symlink_to(tmp_path / "theirs")
    prepare_output(run)

    assert not any((tmp_path / "out").iterdir())
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["model.safetensors"]


def test_a_run_does_not_write_over_the_config_that_it_is_read_from(tmp_path: Path) -> None:
    configs(tmp_path)
    mine = tmp_path / "config.yaml"
    mine.write_text((tmp_path / "my.yaml").read_text().replace("output_dir: out", "output_dir: ."))
    with pytest.raises(ConfigError, match="over"):
        prepare_output(load_config(mine, ["--overwrite"]), mine)

    assert mine.read_text().startswith("model_name_or_path")


def test_documents_that_an_evaluation_leaves_out_are_named(tmp_path: Path) -> None:
    train_run(configs(tmp_path), QUIET)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"text": "</trainable_text>"}\n')
    screen = Console(file=StringIO(), width=200)
    run = load_config(
        tmp_path / "my.yaml", ["--on_bad_data", "skip", "--max_bad_fraction", "1", "--overwrite"]
    )
    eval_run(run, tmp_path / "out", console=screen)

    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "same: 1 of 5 documents are not measured (1 markup)" in text
    assert "train.jsonl:5" in text


def test_numbers_that_json_does_not_have_become_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"sets": {"new": {"perplexity": float("inf")}}})

    assert json.loads((tmp_path / "a.json").read_text()) == {"sets": {"new": {"perplexity": None}}}


@pytest.mark.parametrize(("other", "note"), [(2.5, "; other images: of the next document"), (None, "")])
def test_the_card_explains_a_loss_only_where_it_shows_it(tmp_path, other, note):
    result = {"loss": 2.0, "shuffled_images_loss": other, "blank_images_loss": 3.0}
    (tmp_path / "eval.json").write_text(json.dumps({"sets": {"new": result}}))

    table = read_run(tmp_path).evaluation

    assert table.caption == note
    assert ("loss, other images" in table.columns) == bool(note)


@pytest.mark.parametrize("on_bad_data", ["error", "skip"])
def test_inspect_goes_on_after_a_row_that_cannot_be_used(tmp_path: Path, on_bad_data: str) -> None:
    run = configs(tmp_path, "--on_bad_data", on_bad_data)
    good = (tmp_path / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text('{"text": "<trainable_text>"}\n' + good)
    shown = StringIO()
    inspect_run(run, slice(0, 9), Console(file=shown, width=200))

    what = {"error": "training would stop here", "skip": "not used"}[on_bad_data]
    (line,) = [line for line in shown.getvalue().splitlines() if line.startswith(what)]
    assert "train.jsonl:1: text, character 0: <trainable_text> is not closed" in line
    assert all(f"train.jsonl:{line}  " in shown.getvalue() for line in (2, 3, 4, 5))


def test_documents_that_are_not_measured_are_in_dropped_jsonl(tmp_path: Path) -> None:
    held = json.dumps([{"path": str(tmp_path / "held.jsonl")}])
    skips = ("--on_bad_data", "skip", "--max_bad_fraction", "1", "--eval_data", held)
    (tmp_path / "held.jsonl").write_text('{"text": "fine"}\n{"text": "<trainable_text>"}\n')
    train_run(configs(tmp_path, "--eval_strategy", "steps", "--eval_steps", "2", *skips), QUIET)

    lines = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    assert [(one["source"].rpartition("/")[2], one["line"]) for one in lines] == [("held.jsonl", 2)]


def test_a_folder_without_a_checkpoint_is_not_said_to_have_one(tmp_path: Path) -> None:
    run = configs(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.yaml").touch()
    with pytest.raises(ConfigError, match="as no checkpoint is in it, delete the run in it with --overwrite"):
        prepare_output(run)
    (tmp_path / "out/checkpoint-1").mkdir()
    with pytest.raises(ConfigError, match="resume it with --resume_from_checkpoint true"):
        prepare_output(run)


def test_rows_that_no_source_has_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--rows 4: no source has so many documents; the longest has 4\."):
        inspect_run(configs(tmp_path), slice(4, 9), QUIET)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train my.yaml --model_name_or_path empty", "no processor could be loaded from this folder"),
        ("check my.yaml --model_name_or_path empty", "no processor could be loaded from this folder"),
        ("inspect my.yaml --model_name_or_path empty", "no processor could be loaded from this folder"),
        (
            "train my.yaml --adapter_name_or_path nowhere",
            "nowhere: no such folder, and no adapter of this id",
        ),
        ("train my.yaml --adapter_name_or_path empty", "no adapter could be loaded from this folder"),
        ("check my.yaml --adapter_name_or_path nowhere", "nowhere: no such folder, and no adapter of this"),
        (
            "train my.yaml --attn_implementation flash_attention_3",
            "cannot be loaded with attn_implementation",
        ),
        ("eval my.yaml --checkpoint full --attn_implementation flash_attention_3", "cannot be loaded with"),
        ("train my.yaml --lora_target_modules [q_porj]", "lora_target_modules names 'q_porj'"),
        ("check my.yaml --lora_target_modules [q_porj]", "lora_target_modules names 'q_porj'"),
        ("eval my.yaml --checkpoint empty", "empty holds neither an adapter"),
        ("merge nowhere merged", "nowhere: no such folder"),
        ("merge empty merged", "empty holds neither an adapter"),
        (
            "merge full merged",
            "full holds a model, and neither it nor the folder above has a run's config.yaml",
        ),
        ("merge full full", "full exists and is not empty"),
    ],
)
def test_a_wrong_model_is_reported_before_the_data_is_read_with_2(tmp_path, monkeypatch, command, message):
    configs(tmp_path)
    (tmp_path / "train.jsonl").write_text("not read\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").symlink_to(base_path())
    monkeypatch.chdir(tmp_path)

    result = CliRunner().invoke(app, command.split())

    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split()) and "Traceback" not in result.output


def test_a_run_in_a_folder_that_another_process_holds_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    train_run(configs(tmp_path, "--save_strategy", "steps", "--save_steps", "1"), QUIET)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with holding(tmp_path / "out") as (first, _):
        for more in ([], ["--overwrite"], ["--resume_from_checkpoint", "true"]):
            with pytest.raises(ConfigError, match=rf"is in use by process {first.pid} on host "):
                train_run(configs(tmp_path, *more), QUIET)
        (tmp_path / "out/.vlcpt.lock").stat()
        after = {path: path.stat().st_mtime_ns for path in before}
    assert {path: time for path, time in after.items() if path.is_file()} == {
        path: time for path, time in before.items() if path.is_file()
    }


def test_a_start_that_failed_before_step_1_is_repeated_without_overwrite(tmp_path: Path, monkeypatch) -> None:
    arguments = ("--eval_strategy", "epoch", "--eval_on_start", "true")
    run = configs(tmp_path, *arguments)

    def out_of_memory(*_, **__):
        raise RuntimeError("out of memory")

    for where in ("vlcpt.runs.train.load_model", "vlcpt.training.trainer.target_losses"):
        with monkeypatch.context() as patch:
            patch.setattr(where, out_of_memory)
            with pytest.raises(RuntimeError, match="out of memory"):
                train_run(run, QUIET)
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert "config.yaml" in left and "train_log.jsonl" in left  # or nothing would be shown

    train_run(configs(tmp_path, *arguments), QUIET)

    steps = [json.loads(line)["step"] for line in (tmp_path / "out/train_log.jsonl").read_text().splitlines()]
    assert steps.count(0) == 1 and max(steps) == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "seed: 3\n"),
        ("train_log.jsonl", '{"step": 0, "eval_loss": 1}\n{"step": 1, "loss": 1}\n'),
        ("runs/mine.txt", "precious"),
        ("model.safetensors", ""),
        ("checkpoint-1/model.safetensors", ""),
    ],
)
def test_what_holds_work_needs_overwrite(tmp_path: Path, name: str, content: str) -> None:
    run = configs(tmp_path)
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text(content)
    with pytest.raises(ConfigError, match="is not empty"):
        prepare_output(run)


def test_where_ranks_are_on_several_machines_all_of_them_end_with_the_refusal(tmp_path: Path) -> None:
    configs(tmp_path)
    command, output = ["vlcpt", "train", str(tmp_path / "my.yaml")], tmp_path / "output"
    with holding(tmp_path / "out") as (first, _):
        ranks, store = start_ranks(command, output, LOCAL_WORLD_SIZE="1")
        codes = [rank.wait(100) for rank in ranks]
    del store
    assert codes == [2, 2], output.read_text()
    assert output.read_text().count(f"is in use by process {first.pid} on host") == 2


def test_a_launcher_on_one_machine_gets_the_refusals_exit_code(tmp_path: Path) -> None:
    configs(tmp_path)
    with holding(tmp_path / "out") as (first, _):
        done = run_on_ranks("vlcpt", "train", str(tmp_path / "my.yaml"), timeout=100)
    assert done.returncode == 2, done.stdout
    assert f"is in use by process {first.pid} on host" in done.stdout


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("command", ["check", "inspect", "train"])
def test_fields_that_are_not_read_are_named_with_their_rows(
    tmp_path: Path, command: str, workers: int
) -> None:
    run = configs(tmp_path, "--dataloader_num_workers", str(workers))
    rows = [{"text": f"one {n}"} | ({"source": "web"} if n % 4 else {}) | {"score": n} for n in range(12)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    shown = StringIO()
    console = Console(file=shown, width=120)

    if command == "inspect":
        inspect_run(run, slice(0, 12), console)
    else:
        (check_run if command == "check" else train_run)(run, console=console)
        ledger = json.loads((tmp_path / "out/ledger.json").read_text())
        assert ledger["sources"]["train"]["not_read"] == {"score": 12, "source": 9}

    assert shown.getvalue().count("train: not read: score (12 rows), source (9 rows)\n") == 1
