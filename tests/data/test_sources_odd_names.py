"""Names of files as they come: emoji that JSON escapes, halves of characters, newlines and quotes."""

import gzip
import json
import os
from pathlib import Path

import datasets
import pytest

from tests.support import opened, png
from vlcpt import DocumentError, read_documents
from vlcpt.data.media.open import MediaError, image_size
from vlcpt.data.plan.ledger import Dropped, Ledger
from vlcpt.file_writes import write_json

# The last is what Python makes of a byte that is not UTF-8.
ODD = [
    "😀.png",
    "two\nlines.png",
    "\"quoted\" 'name'.png",
    "tab\there \\ back.png",
    os.fsdecode(b"a\xff.png"),
]


@pytest.mark.parametrize("name", ODD[:4], ids=ascii)
@pytest.mark.parametrize("escaped", [True, False])
def test_a_picture_with_an_odd_name_is_read_however_json_writes_it(
    tmp_path: Path, name: str, escaped: bool
) -> None:
    (tmp_path / name).write_bytes(png(1))
    row = json.dumps({"text": "<image>a", "images": [name]}, ensure_ascii=escaped)
    assert ("\\ud83d\\ude00" in row) == (escaped and "😀" in name)
    (tmp_path / "a.jsonl").write_text(row + "\n", encoding="utf-8")

    (document,) = read_documents(tmp_path / "a.jsonl")

    assert image_size(document.images[0], media_root=tmp_path) == (56, 56)


@pytest.mark.parametrize("field", ["text", "images", "id"])
def test_half_of_a_character_in_json_is_an_error_that_names_the_row(tmp_path: Path, field: str) -> None:
    values = {"text": '"a"', "images": "[]", "id": '"b"'} | {
        field: '["\\ud83d.png"]' if field == "images" else '"\\ud83d"'
    }
    odd = ", ".join(f'"{name}": {value}' for name, value in values.items())
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{' + odd + "}\n")

    documents = read_documents(tmp_path / "a.jsonl")

    next(documents)
    with pytest.raises(DocumentError, match=r"a\.jsonl:2: .*surrogate"):
        next(documents)


def test_half_of_a_character_in_a_path_in_memory_is_an_error_about_the_path(tmp_path: Path) -> None:
    document = opened([{"text": "<image>a", "images": ["\ud83d.png"]}], media_root=tmp_path).document(0)
    with pytest.raises(MediaError, match=r"'\\ud83d\.png' is not a path: .*Correct it\."):
        image_size(document.images[0], media_root=tmp_path)


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_data_with_an_odd_name_are_read_and_their_account_is_written(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for suffix, data in (
        (".jsonl", b'{"text": "a"}\n{\n'),
        (".jsonl.gz", gzip.compress(b'{"text": "a"}\n{\n')),
    ):
        path = tmp_path / (name + suffix)
        path.write_bytes(data)
        documents = read_documents(path)
        assert next(documents).source.line == 1
        with pytest.raises(DocumentError, match="not JSON") as caught:
            next(documents)
        ledger = Ledger([name])
        ledger.dropped.append(Dropped(str(path), 2, None, "json", str(caught.value)))
        ledger.write(tmp_path / "out")
        (line,) = (tmp_path / "out/dropped.jsonl").read_text("utf-8").splitlines()
        assert json.loads(line)["source"] == str(path)
        assert list(json.loads((tmp_path / "out/ledger.json").read_text("utf-8"))["sources"]) == [name]
        write_json(tmp_path / "out/numbers.json", {"sets": {name: 1}})
        assert json.loads((tmp_path / "out/numbers.json").read_text("utf-8")) == {"sets": {name: 1}}
