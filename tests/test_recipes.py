"""Rows and configurations on the pages of docs/ are read as they stand."""

import re
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from vlcpt import read_documents
from vlcpt.cli import app
from vlcpt.config.keys import known_types
from vlcpt.config.yaml import load_config
from vlcpt.data.documents import Image as ImageSegment
from vlcpt.data.documents import Text, Video
from vlcpt.demo import base_path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "README_zh.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.M | re.S)


def blocks(page: Path, language: str) -> list[str]:
    found = FENCE.findall(page.read_text("utf-8"))
    return [
        "".join(line.removeprefix(indent) for line in body.splitlines(keepends=True))
        for indent, name, body in found
        if name == language
    ]


CONFIGS = [
    pytest.param(text, id=f"{page.name}: {text.splitlines()[0]}")
    for page in PAGES
    for text in blocks(page, "yaml")
    if not text.startswith("# llamafactory.yaml")
]


def write_media(folder: Path, rows: str) -> None:
    """The files that rows name."""
    for name in re.findall(r'"([\w./-]+\.(?:png|jpg))"', rows):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (84, 56), "steelblue").save(folder / name)
    for name in re.findall(r'"([\w./-]+\.mp4)"', rows):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=4)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            for number in range(12):
                frame = np.full((64, 64, 3), number * 20, dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
            container.mux(stream.encode())


@pytest.mark.parametrize("text", CONFIGS)
def test_every_key_of_a_block_is_known_and_a_whole_configuration_is_read(text, tmp_path):
    values = yaml.safe_load(text)
    assert set(values) <= set(known_types())
    if not {"model_name_or_path", "train_data", "output_dir"} <= set(values):
        return
    (tmp_path / "run.yaml").write_text(text, "utf-8")
    for name in set(re.findall(r"[\w.]+\.jsonl", text)):
        (tmp_path / name).write_text('{"text": "one"}\n')
    (tmp_path / "merged").mkdir()

    configs = load_config(tmp_path / "run.yaml", ["--use_cpu", "--deepspeed", "null"])

    assert configs.data.train_data


def test_the_recipes_are_four_and_the_same_in_both_languages():
    english, here = (ROOT / "docs" / name for name in ("recipes.md", "recipes.zh.md"))

    assert list(map(yaml.safe_load, blocks(here, "yaml"))) == list(
        map(yaml.safe_load, blocks(english, "yaml"))
    )
    assert len(blocks(here, "yaml")) == len(blocks(here, "json")) == 4


NOT_MEASURED = {"recipes.md": "not measured", "recipes.zh.md": "没有测过"}


def items(name: str) -> list[tuple[int, str]]:
    """Each item of a page with the number of its recipe: what it says beside rows and configuration."""
    _, *recipes = re.split(r"^## ", FENCE.sub("", (ROOT / "docs" / name).read_text("utf-8")), flags=re.M)
    return [
        (number, " ".join(item.split()))
        for number, recipe in enumerate(recipes)
        for item in re.findall(r"^- (.*(?:\n  .*)*)$", recipe, re.M)
    ]


@pytest.mark.parametrize("name", NOT_MEASURED)
def test_each_item_of_a_recipe_has_its_source_or_says_that_it_is_not_measured(name):
    found = items(name)

    assert Counter(number for number, _ in found).keys() == {0, 1, 2, 3}
    assert len(found) > 15
    for _, item in found:
        links = re.findall(r"\]\(([^)\s]+)\)", item)
        files = [ROOT / "docs" / link.partition("#")[0] for link in links if "://" not in link]
        assert [file for file in files if not file.is_file()] == []
        assert links or NOT_MEASURED[name] in item, item


def test_both_languages_say_of_as_many_items_of_each_recipe_that_they_are_not_measured():
    english, chinese = (
        Counter(number for number, item in items(name) if words in item)
        for name, words in NOT_MEASURED.items()
    )

    assert english == chinese
    assert english.keys() == {0, 1, 2, 3}


def test_the_rows_of_a_recipe_show_what_they_say(tmp_path):
    """Each medium stands where its marker is, and each row has a span that is trained."""
    for number, rows in enumerate(blocks(ROOT / "docs/recipes.md", "json")):
        write_media(tmp_path, rows)
        (tmp_path / f"{number}.jsonl").write_text(rows, "utf-8")
        documents = list(read_documents(tmp_path / f"{number}.jsonl"))

        assert len(documents) == 2
        assert all(any(isinstance(one, Text) and one.trainable for one in doc.segments) for doc in documents)
        assert any(isinstance(one, ImageSegment | Video) for doc in documents for one in doc.segments)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_check_finds_nothing_to_repair_in_a_recipe(number, tmp_path, monkeypatch):
    rows, text = (blocks(ROOT / "docs/recipes.md", language)[number] for language in ("json", "yaml"))
    write_media(tmp_path, rows)
    monkeypatch.chdir(tmp_path)
    for name in set(re.findall(r"[\w.]+\.jsonl", text)):
        (tmp_path / name).write_text(rows if "general" not in name else '{"text": "one two"}\n', "utf-8")
    (tmp_path / "run.yaml").write_text(text, "utf-8")

    done = CliRunner().invoke(
        app,
        [
            "check",
            "run.yaml",
            "--model_name_or_path",
            base_path(),
            "--use_cpu",
            "--dataloader_num_workers",
            "0",
        ],
    )

    assert done.exit_code == 0, done.output
