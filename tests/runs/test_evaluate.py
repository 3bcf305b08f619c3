"""Tests of vlcpt/runs/evaluate.py: on one process and on ranks."""

import json
import math
from io import StringIO
from pathlib import Path

import PIL.Image
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlcpt
from tests.processes import run_on_ranks, start_ranks
from tests.support import png
from vlcpt.config.yaml import Configs, load_config
from vlcpt.demo import base_path
from vlcpt.errors import ConfigError
from vlcpt.model.loading import load_for_evaluation
from vlcpt.report.screen import Screen
from vlcpt.report.verdict import CommandPaths
from vlcpt.runs.evaluate import eval_run
from vlcpt.runs.train import train_run

QUIET = Console(file=StringIO(), width=100)


def configs(folder: Path, *overrides: str) -> Configs:
    return load_config(folder / "my.yaml", overrides)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with a trained adapter in ``out``, and nine documents to measure it on."""
    rows = []
    for number in range(9):
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
@pytest.mark.alone
def test_two_ranks_write_and_print_once_what_one_process_finds(run: Path) -> None:
    expected = eval_run(configs(run), run / "out", console=QUIET)
    output = run / "eval.json"

    done = run_on_ranks(*eval_command(run, "--output", str(output), "--dataloader_num_workers", "1"))

    assert done.returncode == 0, done.stdout
    assert done.stdout.count("bits/byte") == done.stdout.count("what to change") == 1
    assert done.stdout.count("written to") == 1
    found = json.loads(output.read_text())["sets"]
    assert found.keys() == expected.keys() == {"held"}
    assert None not in expected["held"].values()
    intervals = expected["held"].pop("intervals")
    assert found["held"].pop("intervals") == {n: pytest.approx(i, rel=1e-9) for n, i in intervals.items()}
    assert found["held"].pop("reliance") == pytest.approx(expected["held"].pop("reliance"), rel=1e-9)
    assert found["held"] == pytest.approx(expected["held"], rel=1e-9)


@pytest.mark.slow
@pytest.mark.alone
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


def plain_loss(model, processor, text, images):
    """Nats per target of a document by transformers alone: its own processor, labels and mean, unpacked."""
    seen = "<|vision_start|><|image_pad|><|vision_end|>"
    files = [PIL.Image.open(one) for one in images] or None
    whole = text.replace("<image>", seen) + "<|endoftext|>"
    inputs = processor(text=[whole], images=files, return_tensors="pt")
    ids = inputs["input_ids"]
    media = processor.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"])
    with torch.no_grad():
        return float(model(**inputs, labels=ids.masked_fill(torch.isin(ids, torch.tensor(media)), -100)).loss)


def test_each_documents_loss_is_that_of_plain_transformers(tmp_path: Path) -> None:
    """And the base measured against itself is exactly itself, on held-out and retention data."""
    texts = [f"page {number} has {number * 7} lines" for number in range(8)]
    rows = []
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.png").write_bytes(png(number, 56, 56 + 28 * (number % 3)))
        with_image = number % 2 == 0
        rows.append({"text": f"<image>{text}" if with_image else text})
        rows[-1]["images"] = [f"{number}.png"] if with_image else []
    for name in ("held", "old"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my.yaml").write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: held.jsonl\neval_data: held.jsonl\nretention_data: "
        "old.jsonl\noutput_dir: out\nmax_length: 128\nuse_cpu: true\ndataloader_num_workers: 0\n"
    )

    found = eval_run(
        configs(tmp_path), Path(base_path()), console=QUIET, per_document=tmp_path / "documents.jsonl"
    )

    lines = [json.loads(line) for line in (tmp_path / "documents.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == sorted((line["loss"] for line in lines), reverse=True)
    model = AutoModelForImageTextToText.from_pretrained(base_path()).eval()
    processor = AutoProcessor.from_pretrained(base_path())
    held = [line for line in lines if line["set"] == "held"]
    assert len(held) == len(rows)
    for line in held:
        row = rows[int(line["source"].rpartition(":")[2]) - 1]
        expected = plain_loss(model, processor, row["text"], [tmp_path / one for one in row["images"]])
        assert line["loss"] == pytest.approx(expected, abs=1e-5)
        assert (line["blank_images_loss"] is None) == (not row["images"])
    nats = sum(line["loss"] * line["targets"] for line in held) / sum(line["targets"] for line in held)
    assert found["held"]["perplexity"] == pytest.approx(math.exp(nats))
    assert found.retention == ("old",)
    for name in ("held", "old"):
        assert found[name]["base_loss"] == found[name]["loss"]
        assert found[name]["intervals"]["learnt"] == [0.0, 0.0]


def test_the_command_says_its_verdict_and_continues_documents(run: Path) -> None:
    file = StringIO()

    found = eval_run(
        configs(run, "--eval_max_documents", "6"),
        run / "out",
        run / "eval.json",
        Screen(file=file, width=80),
        samples=2,
    )

    text = file.getvalue()
    assert "held: 6 of 9 documents are measured, drawn by seed (eval_max_documents)." in text
    assert text.index("held:") < text.index("what to change:") < text.index("perplexity  ")
    assert text.count("  model  ") == text.count("  truth  ") == 2
    written = json.loads((run / "eval.json").read_text())
    assert written["sets"] == found.sets
    assert written["retention"] == []
    assert [one["truth"].endswith(" lines") for one in written["samples"]["held"]] == [True, True]


@pytest.mark.slow
def test_evaluate_gives_in_python_what_the_command_shows(run: Path) -> None:
    """By the configuration that the run wrote, on data of one's own, or of a loaded model."""
    shown = eval_run(configs(run), run / "out", console=QUIET)

    by_run = vlcpt.evaluate(run / "out")
    by_source = vlcpt.evaluate(run / "out", [{"path": str(run / "held.jsonl"), "name": "held"}])
    processor = vlcpt.load_processor(base_path())
    # In the order in which the command reads them, or documents would be beside others in a batch.
    settings = {"max_length": 64, "packing": False, "seed": configs(run).training.seed}
    dataset = vlcpt.CPTDataset(run / "held.jsonl", processor, **settings)
    by_data = vlcpt.evaluate(run / "out", {"held": dataset})
    model, _ = load_for_evaluation(vlcpt.ModelConfig(base_path()), str(run / "out"))
    loaded = vlcpt.evaluate(model, {"held": dataset}, processor=processor)

    assert by_run == by_source == by_data == shown
    assert by_run.paths == by_data.paths == CommandPaths.of(run / "out/config.yaml", run / "out")
    assert shown.paths == CommandPaths.of(checkpoint=run / "out")
    assert loaded.paths == CommandPaths()  # nothing is known
    assert [one["set"] for one in by_run.documents()] == ["held"] * 9
    assert loaded["held"]["loss"] == pytest.approx(shown["held"]["loss"], rel=1e-6)
    assert "what to change:" in str(by_run)
    assert "perplexity" in repr(by_run)


@pytest.mark.slow
def test_the_python_example_of_the_docs_runs_as_written(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(vlcpt.__file__).parents[1] / "docs/evaluation.md").read_text(encoding="utf-8")
    (run / "runs").mkdir()
    (run / "out").rename(run / "runs/manuals")
    (run / "runs/manuals/config.yaml").write_text(
        (run / "runs/manuals/config.yaml").read_text().replace("../", "../../")
    )
    monkeypatch.chdir(run)

    names: dict[str, object] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)

    assert "held: " in capsys.readouterr().out
    assert list(names["found"]) == ["more"]
    assert len(names["worst"]) == 9


def test_evaluate_says_what_a_loaded_model_needs() -> None:
    with pytest.raises(ConfigError, match="several by name, and the processor"):
        vlcpt.evaluate(torch.nn.Linear(1, 1), "held.jsonl")
    with pytest.raises(ConfigError, match="the checkpoint's configuration: config="):
        vlcpt.evaluate(base_path())
