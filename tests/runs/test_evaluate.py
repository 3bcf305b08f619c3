"""Tests of vlcpt/runs/evaluate.py: on one process and on ranks."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from tests.processes import run_on_ranks, start_ranks
from tests.support import png
from vlcpt.config.yaml import Configs, load_config
from vlcpt.demo import base_path
from vlcpt.runs.evaluate import eval_run
from vlcpt.runs.train import train_run

QUIET = Console(file=StringIO(), width=100)


def configs(folder: Path, *overrides: str) -> Configs:
    return load_config(folder / "my.yaml", overrides)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with a trained adapter in ``out``, and seven documents to measure it on."""
    rows = []
    for number in range(7):
        text, images = f"page {number} <trainable_text>{number * 7} lines</trainable_text>", []
        if number % 3 == 0:
            (tmp_path / f"{number}.png").write_bytes(png(number))
            text, images = f"<image>{text}", [f"{number}.png"]
        rows.append({"text": text, "images": images})
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my.yaml").write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: held.jsonl\neval_data: [{{path: held.jsonl, name: "
        "held}]\noutput_dir: out\nmax_length: 64\nmax_steps: 2\nuse_cpu: true\ndataloader_num_workers: 0\n"
        "learning_rate: 1e-3\npacking: false\nper_device_eval_batch_size: 2\nddp_timeout: 60\n"
    )
    train_run(configs(tmp_path), QUIET)
    return tmp_path


def eval_command(folder: Path, *more: str) -> list[str]:
    return ["vlcpt", "eval", str(folder / "my.yaml"), "--checkpoint", str(folder / "out"), *more]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_two_ranks_write_and_print_once_what_one_process_finds(run: Path) -> None:
    expected = eval_run(configs(run), run / "out", console=QUIET)
    output = run / "eval.json"

    done = run_on_ranks(*eval_command(run, "--output", str(output), "--dataloader_num_workers", "1"))

    assert done.returncode == 0, done.stdout
    assert done.stdout.count("perplexity") == done.stdout.count("written to") == 1
    found = json.loads(output.read_text())["sets"]
    assert found.keys() == expected.keys() == {"held"}
    assert found["held"] == pytest.approx(expected["held"], rel=1e-9)
    assert None not in expected["held"].values()


@pytest.mark.slow
def test_a_document_that_one_rank_cannot_read_ends_both_with_its_name(run: Path) -> None:
    image = run / "3.png"
    image.write_bytes(image.read_bytes()[:60])  # its header is whole
    ranks, store = start_ranks(eval_command(run), run / "output")
    try:
        codes = [rank.wait(120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
        del store
    text = (run / "output").read_text()

    assert codes == [1, 1], text
    assert [line.startswith("vlcpt: ") for line in text.splitlines() if "3.png" in line] == [True, True]
    assert "Traceback" not in text


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_a_run_with_deepspeed_is_measured_with_whole_models(run: Path, engine: str) -> None:
    """ZeRO-3's configuration would partition what is loaded after it."""
    expected = eval_run(configs(run), run / "out", console=QUIET)

    assert eval_run(configs(run, "--deepspeed", engine), run / "out", console=QUIET) == expected
