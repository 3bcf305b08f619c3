"""Tests of vlcpt/training/progress.py."""

import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerControl, TrainerState, TrainingArguments

from tests.support import FOUR, FOUR_TARGETS, make_trainer
from vlcpt import CPTDataset, ModelConfig, load_model
from vlcpt.data.plan.balance import PackCost
from vlcpt.training.cost import PeakShare
from vlcpt.training.progress import RunProgress

LOG_PAGES = [Path(__file__).parents[2] / "docs" / name for name in ("log.md", "log.zh.md")]


def read_log(folder):
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def make_progress(max_length=8):
    screen = io.StringIO()
    return RunProgress(max_length, Console(file=screen, width=40)), screen


@pytest.fixture
def arguments(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none")


LABELS = torch.tensor([[-100, 5, -100, 7, -100, -100], [-100, -100, -100, -100, -100, 3]])


def log(progress, arguments, state, loss=1.0, of_sources=(), **others):
    """As ``CPTTrainer.log`` does."""
    measured = progress.measures(arguments, state, loss, dict(of_sources))
    progress.on_log(arguments, state, TrainerControl(), logs={"loss": loss, **others, **measured})


def test_targets_tokens_and_rows_are_counted():
    progress, _ = make_progress()

    progress.count([{"labels": LABELS}, {"labels": LABELS[:1]}])

    assert progress.targets == 5
    assert progress.tokens == 4 + 6 + 4  # up to the last target of each row
    assert progress.rows == 3


def test_a_line_says_loss_speed_fill_and_learning_rate(arguments):
    progress, screen = make_progress()
    state = TrainerState(global_step=7, max_steps=120, is_world_process_zero=True)
    progress.count([{"labels": LABELS}])

    log(progress, arguments, state, loss=2.34567, learning_rate=1e-4)

    line = screen.getvalue()
    assert line.count("\n") == 1  # not wrapped, however narrow the terminal
    pattern = r"step   7/120  loss 2\.3457  \(mean 2\.3457\)  [\d,]+ targets/s  fill 62%  left [^\n]*s\n"
    assert re.fullmatch(pattern, line)
    entry = read_log(progress_folder(arguments))[0]
    assert entry["step"] == 7
    assert entry["loss"] == 2.34567
    assert entry["fill"] == 0.625
    assert entry["targets_per_second"] > 0
    assert progress.targets == progress.rows == 0  # the next line counts anew


def progress_folder(arguments):
    return Path(arguments.output_dir)


def test_an_evaluation_is_one_line_with_each_sets_loss(arguments):
    progress, screen = make_progress()
    state = TrainerState(global_step=7, max_steps=10, is_world_process_zero=True)

    progress.on_log(
        arguments, state, TrainerControl(), logs={"eval_new_loss": 1.25, "eval_new_perplexity": 3.49}
    )

    assert screen.getvalue() == "step  7/10  evaluation  new 1.2500\n"
    assert read_log(progress_folder(arguments)) == [
        {"step": 7, "eval_new_loss": 1.25, "eval_new_perplexity": 3.49}
    ]


def test_the_time_of_an_evaluation_does_not_slow_the_steps(arguments, monkeypatch):
    now = iter([100.0, 100.0, 164.0, 164.0])  # made, begun, logged after 64 s
    monkeypatch.setattr("vlcpt.training.progress.time.monotonic", lambda: next(now))
    progress, _ = make_progress()
    state = TrainerState(global_step=1, max_steps=10, is_world_process_zero=True)
    progress.on_train_begin(arguments, state, TrainerControl())
    progress.count([{"labels": LABELS}])

    progress.on_log(arguments, state, TrainerControl(), logs={"eval_new_loss": 1.0, "eval_new_runtime": 60.0})
    log(progress, arguments, state)

    assert read_log(progress_folder(arguments))[1]["targets_per_second"] == 0.8  # 3 targets in 4 s


def test_a_line_says_where_the_time_of_its_steps_went(arguments, monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0, 8.0, 10.0, 11.0, 13.0, 17.0, 18.0])
    monkeypatch.setattr("vlcpt.training.clock.time.perf_counter", lambda: next(now))
    progress, screen = make_progress()
    state = TrainerState(global_step=2, max_steps=10, is_world_process_zero=True)
    progress.count([{"labels": LABELS}])
    for _ in range(2):
        progress.clock.start()
        for phase in ("data_wait", "forward", "backward"):
            progress.clock.end(phase)
        progress.on_step_end(arguments, state, TrainerControl())

    log(progress, arguments, state)

    seconds = {key.partition("/")[2]: value for key, value in read_log(progress_folder(arguments))[0].items()
               if key.startswith("seconds/")}  # fmt: skip
    assert seconds == {"data_wait": 1.0, "forward": 2.0, "backward": 4.0, "optimizer": 1.0}  # a step
    assert "  wait 12%  forward 25% backward 50% optimizer 12%  " in screen.getvalue()
    assert read_log(progress_folder(arguments))[0]["data_wait"] == 0.125


def test_where_the_peak_is_known_a_line_says_its_share(arguments):
    progress, screen = make_progress()
    cost = PackCost(token=100, pair=0, target=0, media=0, frame_pair=0)
    progress.peak_share = PeakShare(cost, peak=1e6, merge=4)
    state = TrainerState(global_step=2, max_steps=10, is_world_process_zero=True)
    progress.count([{"labels": LABELS, "document_lengths": [4, 2, 6]}])

    log(progress, arguments, state)

    assert read_log(progress_folder(arguments))[0]["mfu"] > 0
    assert re.search(r"  mfu [\d,]+%", screen.getvalue())


def test_trainers_closing_summary_is_neither_shown_nor_logged(arguments):
    progress, screen = make_progress()
    state = TrainerState(global_step=7, max_steps=10, is_world_process_zero=True)

    progress.on_log(arguments, state, TrainerControl(), logs={"train_runtime": 3.0, "train_loss": 2.0})

    assert screen.getvalue() == ""
    assert not progress_folder(arguments).exists()


def test_only_the_first_process_writes(arguments):
    progress, screen = make_progress()
    state = TrainerState(global_step=1, max_steps=10, is_world_process_zero=False)

    progress.on_train_begin(arguments, state, TrainerControl())
    progress.on_log(arguments, state, TrainerControl(), logs={"loss": 1.0})

    assert screen.getvalue() == ""
    assert not progress_folder(arguments).exists()


def test_a_resumed_run_keeps_the_lines_up_to_its_checkpoint(arguments):
    folder = progress_folder(arguments)
    folder.mkdir()
    lines = ['{"step": 1, "loss": 3}', '{"step": 2, "loss": 2}', '{"step": 2, "eval_loss": 2}', '{"step": 3}']
    (folder / "train_log.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')  # killed while writing
    progress, _ = make_progress()

    progress.on_train_begin(
        arguments, TrainerState(global_step=2, is_world_process_zero=True), TrainerControl()
    )

    assert (folder / "train_log.jsonl").read_text().splitlines() == lines[:3]


def test_a_run_logs_one_readable_line_a_step(tiny_model_dir, tiny_processor, tmp_path):
    model = load_model(ModelConfig(str(tiny_model_dir), lora_r=2, train_merger=True))
    dataset = CPTDataset(FOUR, tiny_processor, max_length=128)
    screen = io.StringIO()
    settings = {"learning_rate": 1e-3, "merger_learning_rate": 2e-4, "lr_scheduler_type": "linear"}
    trainer = make_trainer(model, dataset, tiny_processor, tmp_path, max_steps=4, **settings)
    trainer.progress.console = Console(file=screen, width=40)

    trainer.train()

    engine, *lines = screen.getvalue().splitlines()
    assert engine == "1 process"
    times = r"wait \d+%  forward \d+% backward \d+% optimizer \d+%"
    pattern = (
        r"step \d/4  loss \d+\.\d{4}  \(mean \d+\.\d{4}( [+-]\d+\.\d{4})?\)  [\d,]+ targets/s  "
        rf"{times}  fill \d+%  lr merger \S+ language \S+  left \d+ .*"
    )
    assert len(lines) == 4
    assert all(re.fullmatch(pattern, line) for line in lines)
    log = read_log(tmp_path)
    assert [one["step"] for one in log] == [1, 2, 3, 4]
    # The rate that the step used: the first is the configured one.
    assert [one["learning_rate/language"] for one in log] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert log[0]["learning_rate/merger"] == pytest.approx(2e-4)
    assert log[0]["fill"] == pytest.approx(dataset.ledger.fill, abs=1e-4)


def test_targets_are_counted_over_accumulated_batches(tiny_model, tiny_processor, tmp_path):
    dataset = CPTDataset(FOUR, tiny_processor, max_length=128, packing=False)
    trainer = make_trainer(
        tiny_model, dataset, tiny_processor, tmp_path, gradient_accumulation_steps=4, num_train_epochs=1
    )
    seen = []
    count = trainer.progress.count

    def counted(batches):
        count(batches)
        seen.append(trainer.progress.targets)

    trainer.progress.count = counted
    trainer.train()

    assert seen == [sum(FOUR_TARGETS)]
    assert "fill" not in read_log(tmp_path)[0]  # unpacked


@pytest.mark.parametrize(("steps", "logged"), [(3, [3]), (5, [5]), (6, [5])])
def test_a_run_shorter_than_logging_steps_logs_its_last_step(
    tiny_model, tiny_processor, tmp_path, steps, logged
):
    dataset = CPTDataset(FOUR, tiny_processor, max_length=128)
    trainer = make_trainer(tiny_model, dataset, tiny_processor, tmp_path, max_steps=steps, logging_steps=5)
    trainer.train()

    assert [one["step"] for one in read_log(tmp_path)] == logged


def test_a_run_that_is_to_log_nothing_logs_nothing(tiny_model, tiny_processor, tmp_path):
    dataset = CPTDataset(FOUR, tiny_processor, max_length=128)
    settings = {"max_steps": 3, "logging_steps": 5, "logging_strategy": "no"}
    make_trainer(tiny_model, dataset, tiny_processor, tmp_path, **settings).train()

    assert not (tmp_path / "train_log.jsonl").exists()


def test_the_mean_of_the_last_lines_is_compared_with_that_of_the_lines_before_them(arguments):
    progress, screen = make_progress()
    losses = [9.0, *[4.0] * 10, *[3.0] * 9]
    state = TrainerState(global_step=21, max_steps=40, is_world_process_zero=True)
    state.log_history = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]

    log(progress, arguments, state, loss=2.0)

    (entry,) = read_log(progress_folder(arguments))
    assert entry["loss_mean"] == pytest.approx((9 * 3 + 2) / 10)
    assert entry["loss_trend"] == pytest.approx(2.9 - 4.0)
    assert "loss 2.0000  (mean 2.9000 -1.1000)  " in screen.getvalue()


def test_the_time_left_is_that_of_the_last_lines_for_the_steps_that_are_left(arguments, monkeypatch):
    now = iter([100.0, 100.0, 104.0, 104.0, 106.0, 106.0])
    monkeypatch.setattr("vlcpt.training.progress.time.monotonic", lambda: next(now))
    progress, _ = make_progress()
    state = TrainerState(global_step=0, max_steps=10, is_world_process_zero=True)
    progress.on_train_begin(arguments, state, TrainerControl())
    for state.global_step in (2, 3):
        for _ in range(2 if state.global_step == 2 else 1):
            progress.on_step_end(arguments, state, TrainerControl())
        log(progress, arguments, state)

    assert [one["eta_seconds"] for one in read_log(progress_folder(arguments))] == [16.0, 14.0]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_line_fits_its_terminal_and_leaves_out_what_matters_least(arguments, width):
    screen = io.StringIO()
    progress = RunProgress(8, Console(file=screen, width=width, force_terminal=True, color_system=None))
    state = TrainerState(global_step=7, max_steps=120_000, is_world_process_zero=True)
    progress.count([{"labels": LABELS}])

    log(progress, arguments, state, of_sources={"manuals": 1.0, "general": 2.0}, loss=2.5)

    line = screen.getvalue().rstrip("\n")
    assert len(line) <= width
    assert line.startswith("step      7/120000  loss 2.5000")
    assert ("manuals 1.0000 general 2.0000" in line) == (width == 120)


def test_each_source_has_its_own_loss_which_trackers_and_the_history_get_too(
    tiny_model_dir, tiny_processor, tmp_path
):
    """In batches of several packs, weights included; the sources' losses make up that of the step."""
    rows = {"plain": FOUR, "weighted": [{"text": '<trainable_text weight="0.25">one two</trainable_text> 3'}]}
    dataset = CPTDataset(
        [{"path": given, "name": name} for name, given in rows.items()], tiny_processor, max_length=64
    )
    model = load_model(ModelConfig(str(tiny_model_dir), dtype="float32", tuning="full"))
    settings = {"max_steps": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = make_trainer(model, dataset, tiny_processor, tmp_path, report_to=["tensorboard"], **settings)
    weights = dict.fromkeys(rows, 0.0)
    for sample in (sample for number in range(len(dataset)) for sample in dataset[number]):
        is_target = sample.labels[1:] >= 0
        weights[[*rows][sample.source]] += float(sample.loss_weights[1:][is_target].sum())
    assert min(weights.values()) > 0
    trainer.train()

    (logged,) = [line for line in trainer.state.log_history if "loss" in line]
    parts = sum(logged[f"loss/{name}"] * weight for name, weight in weights.items())
    assert parts / sum(weights.values()) == pytest.approx(logged["loss"], rel=1e-5)
    assert logged["loss/plain"] != pytest.approx(logged["loss/weighted"], rel=1e-3)
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events.parent)).Reload()
    seen = {
        tag.removeprefix("train/"): accumulator.Scalars(tag)[0].value for tag in accumulator.Tags()["scalars"]
    }
    (entry,) = read_log(tmp_path)
    assert seen.keys() >= entry.keys() - {"step"}
    assert {name: seen[name] for name in entry if name != "step"} == pytest.approx(
        {name: value for name, value in entry.items() if name != "step"}, rel=1e-5
    )
    assert logged == entry


def test_trackers_get_the_losses_of_each_evaluation_and_of_each_source(tiny_model, tiny_processor, tmp_path):
    """Under the names that docs/log.md gives, with the steps and the values of the history."""
    rows = [{"path": FOUR, "name": name} for name in ("plain", "more")]
    dataset = CPTDataset(rows, tiny_processor, max_length=128)
    held = {"four": CPTDataset(FOUR, tiny_processor, max_length=128)}
    settings = {"eval_dataset": held, "max_steps": 2, "report_to": ["tensorboard"]}
    trainer = make_trainer(tiny_model, dataset, tiny_processor, tmp_path, **settings)
    trainer.train()

    (events,) = tmp_path.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events.parent)).Reload()
    for tag, name, steps in [
        *((f"eval/four_{one}", f"eval_four_{one}", [0, 2]) for one in ("loss", "perplexity", "targets")),
        *((f"train/loss/{one}", f"loss/{one}", [1, 2]) for one in ("plain", "more")),
    ]:
        seen = {one.step: one.value for one in accumulator.Scalars(tag)}
        logged = {line["step"]: line[name] for line in trainer.state.log_history if name in line}
        assert list(seen) == list(logged) == steps, tag
        assert seen == pytest.approx(logged, rel=1e-5), tag


def test_where_nothing_else_is_asked_for_a_run_is_evaluated_at_its_start_and_its_end(
    tiny_model, tiny_processor, tmp_path
):
    dataset = CPTDataset(FOUR, tiny_processor, max_length=128)
    trainer = make_trainer(
        tiny_model, dataset, tiny_processor, tmp_path, eval_dataset={"four": dataset}, max_steps=2
    )
    trainer.train()

    evaluated = [one["step"] for one in trainer.state.log_history if "eval_four_loss" in one]
    assert evaluated == [0, 2]


def test_evaluation_that_was_turned_off_stays_off(tiny_model, tiny_processor, tmp_path):
    dataset = CPTDataset(FOUR, tiny_processor, max_length=128)
    settings = {"eval_dataset": {"four": dataset}, "max_steps": 1, "eval_strategy": "no"}
    trainer = make_trainer(tiny_model, dataset, tiny_processor, tmp_path, **settings)
    trainer.train()

    assert not [one for one in trainer.state.log_history if "eval_four_loss" in one]


def test_every_name_of_the_log_is_listed_in_docs(tiny_model, tiny_processor, tmp_path):
    """Trackers show them, and people look them up."""
    dataset = CPTDataset(
        [{"path": FOUR, "name": "a"}, {"path": FOUR, "name": "b"}], tiny_processor, max_length=128
    )
    trainer = make_trainer(
        tiny_model, dataset, tiny_processor, tmp_path, eval_dataset={"s": dataset}, max_steps=1
    )
    trainer.train()

    names = {name for line in read_log(tmp_path) for name in line}
    assert {"loss/a", "eval_s_loss", "loss_mean"} <= names
    for page in LOG_PAGES:
        rows = "".join(re.findall(r"^\| (`.*?) \|", page.read_text("utf-8"), re.M))
        listed = re.findall(r"`([^`]+)`", rows)
        patterns = [re.sub(r"<\w+>|…", "[^/]+", re.escape(name).replace("/…", "/[^/]+")) for name in listed]
        missing = [name for name in {*names, "mfu"} if not any(re.fullmatch(one, name) for one in patterns)]
        assert missing == [], page.name
