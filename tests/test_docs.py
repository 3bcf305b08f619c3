"""What docs/ says is run as it is written."""

import re
from pathlib import Path

import av
import numpy as np
import pytest
import yaml
from PIL import Image

from vlcpt import CPTDataset
from vlcpt.config import as_sources
from vlcpt.data.readers.files import open_source
from vlcpt.data.readers.schemas import SCHEMAS, detect_format

DATA = (Path(__file__).parents[1] / "docs/data.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", DATA, re.M | re.S))


def block(text: str, language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
    return found


@pytest.fixture
def media(tmp_path):
    """The files that the rows name."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (56, 28), "steelblue").save(tmp_path / name)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(8):
            frame = np.full((64, 64, 3), number * 20, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    return tmp_path


def test_every_format_has_a_section():
    assert list(SECTIONS) == list(SCHEMAS)


@pytest.mark.parametrize("format", SECTIONS)
def test_the_rows_of_each_format_are_recognised_and_train(format, media, tiny_processor):
    is_text = format == "text"
    path = media / ("rows.txt" if is_text else "rows.jsonl")
    path.write_text(block(SECTIONS[format], "text" if is_text else "json"), encoding="utf-8")
    source = open_source(path)

    assert detect_format(source.rows, "rows") == format
    dataset = CPTDataset(path, tiny_processor, max_length=512)
    assert dataset.ledger.total.documents["used"] == len(source) > 0
    assert sum(len(dataset[number]) for number in range(len(dataset))) == len(source)
    assert sum(dataset.targets(number) for number in range(len(dataset))) > 0


def test_the_sources_of_the_yaml_are_valid():
    entries = yaml.safe_load(block(DATA, "yaml"))["train_data"]
    sources = as_sources(entries)

    assert [source.name for source in sources] == ["pages", "chats", "captions", "web", "hub"]


def test_the_python_example_runs(media, monkeypatch, capsys):
    monkeypatch.chdir(media)
    (media / "pages.jsonl").write_text(block(SECTIONS["sharegpt"], "json"), encoding="utf-8")
    exec(compile(block(DATA, "python"), "docs/data.md", "exec"), {})

    printed = capsys.readouterr().out.splitlines()
    assert int(printed[0]) > 1
    assert printed[1].startswith("pages.jsonl:1 <image>")
