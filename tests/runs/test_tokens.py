"""Tests of vlcpt/runs/tokens.py: which tokens need the picture, in files and in the terminal."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.browser import page_lines
from tests.support import png
from vlcpt.cli import app
from vlcpt.config.yaml import Configs, load_config
from vlcpt.demo import base_path
from vlcpt.runs.evaluate import eval_run
from vlcpt.runs.inspect import inspect_run

BASE = Path(base_path())  # a checkpoint like any other


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Configs:
    """Two documents with an image, one without; held out, and for training."""
    folder = tmp_path_factory.mktemp("run")
    rows = [
        {"id": "card", "text": "<image>Reading:<trainable_text> one</trainable_text>", "images": ["a.png"]},
        {"id": "text", "text": "one <trainable_text>two three</trainable_text>"},
        {"id": "end", "text": "<image>says<trainable_text> 一二</trainable_text>", "images": ["a.png"]},
    ]
    (folder / "a.png").write_bytes(png(1))
    (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (folder / "my.yaml").write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: rows.jsonl\neval_data: [{{path: rows.jsonl, name: "
        "held}]\noutput_dir: out\nmax_length: 64\nuse_cpu: true\ndataloader_num_workers: 0\n"
        "learning_rate: 1e-3\n"
    )
    return load_config(folder / "my.yaml")


@pytest.fixture(scope="module")
def lines(run: Configs, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """What ``--tokens`` writes, a line a document."""
    path = tmp_path_factory.mktemp("tokens") / "held.jsonl"
    eval_run(run, BASE, console=Console(file=StringIO()), tokens=path)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_has_each_target_with_its_nats_and_context_without(lines) -> None:
    assert [one["id"] for one in lines] == ["card", "text", "end"]
    first, text, _ = lines
    (before, none), *targets = first["tokens"]
    assert before == "[a.png]Reading:" and none is None
    assert [token for token, _ in targets] == [" one", "<|endoftext|>"]
    assert first["nats"] == pytest.approx(sum(nats for _, nats in targets), abs=1e-3)
    assert first["set"] == "held" and first["source"].endswith("rows.jsonl:1")
    assert text["nats"] == 0 and text["targets"] == 3


def test_a_page_of_the_same_documents_has_the_same_nats(run: Configs, lines, tmp_path: Path) -> None:
    eval_run(run, BASE, console=Console(file=StringIO()), tokens=tmp_path / "held.html")

    text = (tmp_path / "held.html").read_text()
    for shown, line in zip(page_lines(text, "documents"), lines, strict=True):
        assert sum(shown["nats"]) == pytest.approx(line["nats"], abs=1e-2)
    assert "Which tokens need the picture" in text and 'id="reliance"' in text


def test_inspect_asks_a_checkpoint_about_training_rows(run: Configs, lines, tmp_path: Path) -> None:
    console = Console(file=StringIO(), width=200)
    inspect_run(run, None, console, html=tmp_path / "a.html", reliance=BASE, packs=False)

    found = page_lines((tmp_path / "a.html").read_text(), "documents")
    for one, line in zip(found, lines, strict=True):
        assert sum(one["nats"]) == pytest.approx(line["nats"], abs=1e-2)


def test_in_the_terminal_a_number_follows_words_that_need_their_image(run: Configs, lines) -> None:
    shown = StringIO()
    inspect_run(run, None, Console(file=shown, width=200), reliance=BASE)

    text = shown.getvalue()
    assert "behind a word that gets over 0.1" in text
    nats = lines[0]["tokens"][1][1]
    assert (f"« one»(+{nats:.1f})" in text) == (nats > 0.1)
    assert "one« two three<|endoftext|>»" in text.replace("one «two", "one« two")
    assert "nats from images" in text


def test_a_name_that_says_neither_page_nor_lines_is_refused_at_once(tmp_path: Path) -> None:
    options = ["--checkpoint", str(BASE), "--tokens", "held.txt"]
    result = CliRunner().invoke(app, ["eval", str(tmp_path / "none.yaml"), *options])

    assert result.exit_code == 2
    assert "ends in .html, for a page, or in .jsonl" in result.output


def test_a_checkpoint_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "none.yaml"), "--reliance", "nowhere"])

    assert result.exit_code == 2
    assert "--reliance nowhere: no such folder" in result.output
