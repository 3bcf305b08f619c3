"""Rows that would fill memory are refused before they are read."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import PIL.Image
import pytest

from tests.support import opened
from vlcpt import DocumentError
from vlcpt.data.plan.kept_scans import source_key

MB = 2**20
LONG = b'{"text": "' + b"a" * (64 * MB) + b'"}'
SHORT = b'{"text": "b"}'

# Imports what reads each kind, and reads each long row in a process of its own that has done so.
_READS = """
import json, os, sys
from pathlib import Path
from vlcpt.data.documents import DocumentError
from vlcpt.data.rows.open import SourceConfig
from vlcpt.data.sources import open_source
def peak():
    return next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
rows = json.loads(sys.argv[1])
open_source(SourceConfig("rows"), [{"text": "a"}]).document(0)
for path in rows:
    open_source(SourceConfig(f"small/{path}")).document(0)
for path, row in rows.items():
    if not (child := os.fork()):
        open_source(SourceConfig(f"small/{path}")).document(0)
        before = peak()
        try:
            open_source(SourceConfig(path), max_row_bytes=8 << 20).document(row)
            said = ""
        except DocumentError as error:
            said = str(error)
        Path(f"{path} said").write_text(json.dumps([said, peak() - before]))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, path
"""


def tar(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


# Of each: a small file of the kind, one with a long row, and which row that is.
KINDS = {
    "a.jsonl": (SHORT, SHORT + b"\n" + LONG + b"\n" + SHORT, 1),
    "a.jsonl.gz": (gzip.compress(SHORT), gzip.compress(SHORT + b"\n" + LONG, compresslevel=1), 1),
    "list.json": (b"[" + SHORT + b"]", b"[" + SHORT + b"," + LONG + b"]", 1),
    "line.json": (SHORT, LONG, 0),
    "a.txt": (b"a", LONG, 0),
    "a.csv": (b"text\nb\n", b"text\nb\n" + b"a" * (64 * MB) + b"\nb\n", 1),
    "a.tar": (tar(("a.json", SHORT)), tar(("a.json", SHORT), ("b.json", LONG)), 1),
    "texts.tar": (tar(("a.txt", b"a"), ("a.json", SHORT)), tar(("a.json", SHORT), ("b.txt", LONG)), 1),
}


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what was said of each kind, and by how many MB memory grew."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "small").mkdir()
    for name, (small, large, _) in KINDS.items():
        (folder / "small" / name).write_bytes(small)
        (folder / name).write_bytes(large)
    command = [sys.executable, "-c", _READS, json.dumps({name: row for name, (*_, row) in KINDS.items()})]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")}
    subprocess.run(command, cwd=folder, env=environment, check=True)
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_a_long_row_is_refused_without_the_memory_for_it(read: Path, name: str) -> None:
    said, grown = json.loads((read / f"{name} said").read_text())
    assert "max_row_bytes = 8,388,608. Split it into several rows, or raise the limit." in said
    assert name in said
    assert grown < 24, "MB"


def test_without_a_word_the_limit_is_256_mb_and_other_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:  # a hole takes no disk
        file.write(SHORT + b"\n")
        file.seek(256 * MB, io.SEEK_CUR)
        file.write(b"\n\n" + SHORT)
    source = opened(path)
    assert [source.document(row).segments[0].text for row in (0, 2)] == ["b", "b"]
    with pytest.raises(
        DocumentError,
        match=r"^.*a\.jsonl:2: the row has 268,435,457 bytes, above max_row_bytes = 268,435,456\.",
    ):
        source.document(1)


def test_a_row_of_exactly_the_limit_is_read_and_a_plan_made_with_another_limit_is_not_used(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(SHORT)
    exact, less = (opened(path, max_row_bytes=len(SHORT) - by) for by in (0, 1))
    assert exact.document(0).segments[0].text == "b"
    with pytest.raises(DocumentError, match="the row has 13 bytes, above max_row_bytes = 12"):
        less.document(0)
    assert source_key(exact) != source_key(less)


def test_a_list_with_many_short_texts_may_be_larger_than_the_limit_of_a_row(tmp_path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a" * 100}] * 50))
    assert len(opened(path, max_row_bytes=120)) == 50


def test_a_quote_that_is_not_closed_ends_the_reading_of_a_csv_at_the_limit(tmp_path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text\nb\n"' + "a line\n" * 50)
    with pytest.raises(
        DocumentError, match=r"a\.csv:3: the row has more bytes than max_row_bytes = 120\..*is not closed"
    ):
        opened(path, max_row_bytes=120)


def test_rows_of_exactly_the_limit_are_read_from_a_csv_also_where_they_have_several_lines(tmp_path) -> None:
    path = tmp_path / "a.csv"
    row = b'"a\nb""c"\n'
    path.write_bytes(b"text\n" + row * 3)
    assert opened(path, max_row_bytes=len(row)).document(2).segments[0].text == 'a\nb"c'
    with pytest.raises(DocumentError, match=r"a\.csv:2: the row has more bytes than max_row_bytes = 8\."):
        opened(path, max_row_bytes=len(row) - 1)


# Of each: what is opened, and the file whose row is too long.
FOLDERS = {
    "texts beside their pictures": (".", "0.txt", b"a" * 200),
    "fields beside their pictures": (".", "0.json", b'{"caption": "' + b"a" * 200 + b'"}'),
    "ImageFolder": (".", "metadata.jsonl", b'{"file_name": "0.png", "text": "' + b"a" * 200 + b'"}'),
    "ImageFolder of CSV": (".", "metadata.csv", b"file_name,text\n0.png," + b"a" * 200),
    "a folder of CSV": (".", "b.csv", b"text\n" + b"a" * 200),
    "a pattern of CSV": ("*.csv", "b.csv", b"text\n" + b"a" * 200),
    "a pattern of JSON": ("*.json", "b.json", b'[{"text": "' + b"a" * 200 + b'"}]'),
    "a pattern of JSONL": ("*.jsonl", "b.jsonl", b'{"text": "' + b"a" * 200 + b'"}'),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_limit_holds_in_folders_and_patterns_too(tmp_path, kind: str) -> None:
    what, name, content = FOLDERS[kind]
    PIL.Image.new("RGB", (60, 60)).save(tmp_path / "0.png")
    (tmp_path / name).write_bytes(content)
    path = tmp_path / what
    assert "a" * 200 in opened(path, max_row_bytes=300).document(0).to_markup()
    with pytest.raises(DocumentError, match="max_row_bytes = 150") as found:
        opened(path, max_row_bytes=150).document(0)
    assert name in str(found.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("depth", [300, 900, 100_000])
def test_a_deeply_nested_row_is_an_error_about_that_row_or_file(tmp_path, name: str, depth: int) -> None:
    nested = b'{"text": "a", "x": ' + b"[" * depth + b"]" * depth + b"}"
    rows = [SHORT, nested, SHORT]
    path = tmp_path / name
    path.write_bytes(b"\n".join(rows) if name == "a.jsonl" else b"[" + b",".join(rows) + b"]")
    if depth < 1000:
        assert opened(path).document(1).segments[0].text == "a"
        return
    with pytest.raises(DocumentError, match=r"nested too deeply|depth limit exceeded"):
        opened(path).document(1)
