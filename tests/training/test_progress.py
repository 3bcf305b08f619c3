"""Tests of vlcpt/training/progress.py."""

import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from tests.support import FOUR, FOUR_TARGETS, make_trainer
from vlcpt import CPTDataset, ModelConfig, load_model
from vlcpt.data.plan.balance import PackCost
from vlcpt.training.cost import PeakShare
from vlcpt.training.progress import RunProgress


def read_log(folder):
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def make_progress(max_length=8):
    screen = io.StringIO()
    return RunProgress(max_length, Console(file=screen, width=40)), screen


@pytest.fixture
def arguments(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none")


LABELS = torch.tensor([[-100, 5, -100, 7, -100, -100], [-100, -100, -100, -100, -100, 3]])


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

    progress.on_log(arguments, state, TrainerControl(), logs={"loss": 2.34567, "learning_rate": 1e-4})

    line = screen.getvalue()
    assert line.count("\n") == 1  # not wrapped, however narrow the terminal
    assert re.fullmatch(r"step   7/120  loss 2\.3457  [\d,]+ targets/s  fill 62%  lr *\n", line)
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

    assert screen.getvalue() == "step  7/10  eval_new_loss 1.2500\n"
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
    progress.on_log(arguments, state, TrainerControl(), logs={"loss": 1.0})

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

    progress.on_log(arguments, state, TrainerControl(), logs={"loss": 1.0})

    seconds = {key.partition("/")[2]: value for key, value in read_log(progress_folder(arguments))[0].items()
               if key.startswith("seconds/")}  # fmt: skip
    assert seconds == {"data_wait": 1.0, "forward": 2.0, "backward": 4.0, "optimizer": 1.0}  # a step
    assert "  wait 12% forward 25% backward 50% optimizer 12%  " in screen.getvalue()


def test_where_the_peak_is_known_a_line_says_its_share(arguments):
    progress, screen = make_progress()
    cost = PackCost(token=100, pair=0, target=0, media=0, frame_pair=0)
    progress.peak_share = PeakShare(cost, peak=1e6, merge=4)
    state = TrainerState(global_step=2, max_steps=10, is_world_process_zero=True)
    progress.count([{"labels": LABELS, "document_lengths": [4, 2, 6]}])

    progress.on_log(arguments, state, TrainerControl(), logs={"loss": 1.0})

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
    times = r"wait \d+% forward \d+% backward \d+% optimizer \d+%"
    pattern = (
        rf"step \d/4  loss \d+\.\d{{4}}  [\d,]+ targets/s  {times}  fill \d+%  lr merger \S+ language \S+"
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
