"""Tests of vlcpt/report/summary.py."""

from pathlib import Path

import pytest
from rich.console import Console

from vlcpt.report.summary import RunSummary, next_commands, summarise, summary_table

LOG = [
    {"step": 0, "eval_new_loss": 6.0, "eval_new_perplexity": 400.0, "eval_old_loss": 1.0},
    *({"step": step, "loss": 5.0 - step / 10} for step in range(1, 41)),
    {"step": 40, "eval_new_loss": 2.0, "eval_old_loss": 1.25},
    {"step": 40, "train_runtime": 61.5},
]


def test_losses_are_those_of_the_first_and_the_last_ten_lines():
    summary = summarise(LOG)

    assert summary.loss == pytest.approx((5.0 - 0.55, 5.0 - 3.55))
    assert summary.sets == {"new": (6.0, 2.0), "old": (1.0, 1.25)}
    assert (summary.steps, summary.seconds) == (40, 61.5)


def test_reliance_stands_below_its_set():
    lines = [{"step": step, "eval_new_loss": 2.0, "eval_new_reliance": step / 10} for step in (0, 5, 9)]

    table = summary_table(summarise([*LOG, *lines]))

    labels = [label for label, _ in table.rows]
    assert labels == ["training", "new", "  reliance", "old"]
    assert table.rows[2][1] == ["0.0000", "0.9000", "+0.9000"]
    assert table.caption.endswith("; reliance: cost of blank images")


def test_a_run_that_logged_nothing_has_no_loss():
    assert summarise([]) == RunSummary(steps=0, loss=None, sets={}, seconds=None)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_the_terminal(width):
    console = Console(width=width)
    with console.capture() as shown:
        console.print(summary_table(summarise(LOG)))
    lines = shown.get().splitlines()

    assert max(map(len, lines)) <= width
    assert [line.split() for line in lines if "old" in line] == [["old", "1.0000", "1.2500", "+0.2500"]]


def test_commands_are_as_one_would_type_them():
    evaluate, merge, push = next_commands(Path("a b.yaml"), Path("runs/the run"), evaluates=True)

    assert evaluate == "vlcpt eval 'a b.yaml' --checkpoint 'runs/the run' --output 'runs/the run/eval.json'"
    assert merge == "vlcpt merge 'runs/the run' 'runs/the run-merged'"
    assert push == "vlcpt push 'runs/the run' OWNER/NAME --dry-run"


def test_without_anything_to_measure_no_evaluation_is_proposed():
    assert len(next_commands(None, Path("out"), evaluates=False)) == 2


def test_what_the_run_has_measured_is_not_proposed_again():
    evaluate, *_ = next_commands(Path("my.yaml"), Path("out"), evaluates=True, is_judged=True)

    assert evaluate == "vlcpt eval my.yaml --checkpoint out --samples 5 --tokens tokens.html"


def test_an_adapter_whose_base_nobody_else_has_is_pushed_merged():
    _, merge, push = next_commands(Path("my.yaml"), Path("out"), evaluates=True, merges_first=True)

    assert merge == "vlcpt merge out out-merged"
    assert push == "vlcpt push out-merged OWNER/NAME --run out --dry-run"


def test_the_table_says_what_training_from_is():
    caption = "training: mean of the first and last log lines"

    assert summary_table(summarise(LOG)).caption == caption
    assert not summary_table(summarise([])).caption
