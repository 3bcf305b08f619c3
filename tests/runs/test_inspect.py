import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from tests.browser import page_lines
from tests.support import png
from vlcpt.cli import app
from vlcpt.config.yaml import load_config
from vlcpt.data.documents import DocumentError
from vlcpt.data.encode.tokens import RunTokenizer
from vlcpt.demo import base_path
from vlcpt.runs.inspect import inspect_run


def configs(folder: Path, rows, *overrides: str):
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "my.yaml").write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: train.jsonl\noutput_dir: out\nmax_length: 64\n"
        "use_cpu: true\nlearning_rate: 1e-3\n"
    )
    return load_config(folder / "my.yaml", overrides)


def page(folder: Path, rows, *overrides: str, numbers=None, **options):
    shown = StringIO()
    run = configs(folder, rows, *overrides)
    inspect_run(run, numbers, Console(file=shown, width=200), html=folder / "new/page.html", **options)
    return (folder / "new/page.html").read_text(), shown.getvalue()


ROWS = [{"id": f"row {n}", "text": f"one <trainable_text>two {n}</trainable_text>"} for n in range(130)]


def test_a_page_has_a_hundred_rows_unless_asked_for_others(tmp_path: Path) -> None:
    text, said = page(tmp_path, ROWS)

    assert [one["name"] for one in page_lines(text, "documents")] == [f"row {n}" for n in range(100)]
    assert (
        "page.html: 100 of 130 documents of train. Rows 0:100 of each source; --rows chooses others. " in said
    )
    assert said.endswith("kB.\n")
    text, _ = page(tmp_path, ROWS, numbers=slice(128, 200))
    assert [one["name"] for one in page_lines(text, "documents")] == ["row 128", "row 129"]


def test_rows_that_fail_are_on_the_page_with_their_error(tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(png(1)[:200])
    rows = [
        {"id": "open", "text": "<trainable_text>"},
        {"id": "missing", "text": "<image>", "images": ["none.png"]},
        {"id": "cut", "text": "<image>seen", "images": ["cut.png"]},
        {"id": "fine", "text": "seen"},
        {"id": "none", "text": "<trainable_text></trainable_text>seen"},
    ]
    text, _ = page(tmp_path, rows)
    first, missing, cut, fine, none = page_lines(text, "documents")

    assert first["name"] == "open" and first["place"].endswith("train.jsonl:1")
    assert "is not closed" in first["error"]["text"] and first["error"]["stops"]
    assert missing["name"] == "missing" and "none.png" in missing["error"]["text"]
    assert "cannot be decoded" in cut["media"][0]["error"]
    assert "error" not in fine and fine["parts"] == 1
    assert none["parts"] == 0
    assert 'rows with a problem</dt><dd><span class="big">4<' in text
    assert "No packs: the training data cannot be planned as it is." in text


def test_packs_name_the_documents_that_share_them(tmp_path: Path) -> None:
    text, _ = page(tmp_path, ROWS)
    packs = page_lines(text, "packs")

    rows = [row for pack in packs for row in pack["rows"]]
    assert sorted(row[1].rpartition(":")[2] for row in rows) == sorted(str(n + 1) for n in range(130))
    assert max(sum(row[3] for row in pack["rows"]) for pack in packs) <= 64
    assert sum(row[0] >= 0 for row in rows) == 100  # the others are not on the page
    assert f"{len(packs)} packs of 64 tokens" in text


@pytest.mark.parametrize(("options", "said"), [({"packs": False}, None), ({}, "packing is off")])
def test_a_page_without_packs(tmp_path: Path, options, said) -> None:
    off = () if options else ("--packing", "false")
    text, _ = page(tmp_path, ROWS[:3], *off, **options)

    assert page_lines(text, "packs") == []
    assert (said in text) if said else ('id="tab-packs"' not in text)


def test_what_an_image_gives_goes_into_the_page(tmp_path: Path) -> None:
    text, _ = page(tmp_path, ROWS[:2], nats_of=lambda document, stream, parts: np.full(len(stream), 0.5))

    assert all(set(one["nats"]) == {0.5} for one in page_lines(text, "documents"))
    assert 'id="reliance"' in text


def test_a_folder_is_not_overwritten_by_a_page(tmp_path: Path) -> None:
    configs(tmp_path, ROWS[:1])
    (tmp_path / "pages").mkdir()
    result = CliRunner().invoke(
        app, ["inspect", str(tmp_path / "my.yaml"), "--html", str(tmp_path / "pages")]
    )

    assert result.exit_code == 2
    assert "pages: not a file that can be written. Give a file's name." in result.output


def test_an_image_that_cannot_be_decoded_is_said_and_the_next_row_is_measured(tmp_path):
    def nats_of(document, stream, parts):
        if stream.media:
            raise DocumentError("cut.png is cut", kind="medium")
        return np.where(stream.labels >= 0, 1.0, np.nan)

    (tmp_path / "cut.png").write_bytes(png(1))
    rows = [{"id": "seen", "text": "<image>one", "images": ["cut.png"]}, {"id": "plain", "text": "two"}]
    shown = StringIO()

    inspect_run(configs(tmp_path, rows), slice(0, 5), Console(file=shown, width=200), nats_of=nats_of)

    text = shown.getvalue()
    assert "not measured: cut.png is cut" in text
    assert "plain  " in text and "seen  " not in text


class CountedTokenizer:
    """A tokenizer that notes the characters of each text it is given."""

    def __init__(self, inner, given: list[int]) -> None:
        self._inner, self._given = inner, given

    def encode(self, text):
        self._given.append(len(text))
        return self._inner.encode(text)

    def encode_batch_fast(self, texts):
        self._given.extend(map(len, texts))
        return self._inner.encode_batch_fast(texts)


@pytest.mark.parametrize("way", ["terminal", "page"])
def test_a_long_document_is_tokenised_once_though_it_has_many_parts(tmp_path, monkeypatch, way):
    text = "one two three " * 400
    run = configs(tmp_path, [{"id": "long", "text": f"<trainable_text>{text}</trainable_text>"}])
    given, shown, make, call = [], StringIO(), RunTokenizer.__init__, PreTrainedTokenizerFast.__call__

    def made(self, tokenizer):
        make(self, tokenizer)
        self._plain = CountedTokenizer(self._plain, given)

    def called(self, text, *args, **kwargs):
        given.append(len(text))
        return call(self, text, *args, **kwargs)

    monkeypatch.setattr(RunTokenizer, "__init__", made)
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", called)

    html = tmp_path / "page.html" if way == "page" else None
    inspect_run(run, None, Console(file=shown, width=200), html=html, packs=False)

    assert [length for length in given if length > 64] == [len(text)]
    if html is not None:
        (document,) = page_lines(html.read_text(), "documents")
        assert document["parts"] > 5
