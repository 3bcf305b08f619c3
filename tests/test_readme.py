"""What the READMEs say is run as it is written."""

import html
import json
import os
import re
from pathlib import Path

import av
import numpy as np
import pytest
import yaml
from PIL import Image

from tests.processes import run_module
from vlcpt.demo import base_path

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README_zh.md")


def blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / readme).read_text("utf-8"), re.M | re.S)


def commands(readme: str) -> list[str]:
    lines = [line for block in blocks(readme, "bash") for line in block.splitlines()]
    return [line.partition("  #")[0].rstrip() for line in lines]


def write_data(folder: Path, rows: str) -> None:
    """The README's rows as a file, with the media that they name."""
    (folder / "figures").mkdir()
    (folder / "clips").mkdir()
    Image.new("RGB", (84, 56), "steelblue").save(folder / "figures/valve.png")
    with av.open(str(folder / "clips/pump.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(12):
            frame = np.full((64, 64, 3), number * 20, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    for name in ("train", "general", "held_out"):
        (folder / f"{name}.jsonl").write_text(rows, encoding="utf-8")


@pytest.mark.parametrize("readme", READMES)
def test_the_two_commands_come_first(readme: str) -> None:
    assert commands(readme)[:2] == ["pip install -e . && vlcpt demo", 'pip install -e ".[test]" && pytest']


def test_ci_runs_the_readmes_test_command() -> None:
    script = (ROOT / ".ci/run").read_text()
    found = [line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line.endswith("pytest")]

    assert "grep -m1 'pytest$' README.md" in script
    assert found[0] == 'pip install -e ".[test]" && pytest'


def test_both_readmes_have_the_same_headings_blocks_and_files() -> None:
    english, chinese = ((ROOT / readme).read_text("utf-8") for readme in READMES)

    assert len(re.findall("^## ", english, re.M)) == len(re.findall("^## ", chinese, re.M))
    for language in ("bash", "json", "yaml", "python"):
        assert len(blocks(READMES[0], language)) == len(blocks(READMES[1], language)) > 0

    def code(text: str) -> set[str]:  # what stands in backticks
        return set(re.findall(r"`([^`\n]+)`", text))

    assert code(english) == code(chinese)
    # Without comments, the configuration and the commands are the same.
    assert yaml.safe_load(blocks(READMES[0], "yaml")[0]) == yaml.safe_load(blocks(READMES[1], "yaml")[0])
    assert commands(READMES[0]) == commands(READMES[1])


def test_a_reader_gets_to_the_limits_and_to_the_end() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()

    assert lines.index("## Limits") < 30
    assert sum(len(line.split()) for line in lines) < 900


@pytest.mark.parametrize("readme", READMES)
def test_the_rows_and_the_yaml_train_with_the_commands_given(
    readme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (rows,) = blocks(readme, "json")
    (config,) = blocks(readme, "yaml")
    write_data(tmp_path, rows)
    # The published model is out of reach here; everything else is as written.
    config = config.replace("Qwen/Qwen2.5-VL-3B-Instruct", base_path())
    (tmp_path / "my.yaml").write_text(config, encoding="utf-8")
    given = [command for command in commands(readme) if command.startswith("vlcpt")]
    assert [command.split()[1] for command in given] == ["check", "inspect", "train", "eval", "merge", "push"]

    for command in (*given[:-1], f"{given[-1]} --dry-run"):  # the Hub is out of reach
        result = run_module(*command.split(), cwd=tmp_path)
        assert result.returncode == 0, result.stderr

    ledger = json.loads((tmp_path / "runs/manuals/ledger.json").read_text())
    assert ledger["sources"]["manuals"]["documents"]["used"] == 3
    assert set(json.loads((tmp_path / "eval.json").read_text())["sets"]) == {"held_out"}
    assert (tmp_path / "merged/config.json").is_file()

    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(readme, "python")[0], readme, "exec"), {})
    shown = capsys.readouterr().out
    assert shown.strip() and "<|" not in shown and not shown.startswith("\nFig. 1")  # what was written only


@pytest.mark.parametrize("page", [*READMES, "docs/index.md", "docs/index.zh.md"])
def test_the_figures_said_to_be_in_the_picture_are_in_it(page: str) -> None:
    (text,) = re.findall(r"!\[(.*)\]\((?:docs/)?demo.svg\)", (ROOT / page).read_text("utf-8"))
    drawing = (ROOT / "docs/demo.svg").read_text("utf-8")
    picture = html.unescape(" ".join(re.findall(r">([^<>]+)</text>", drawing)))
    figures = re.findall(r"\d+(?:\.\d+)?", text)

    assert len(figures) == 5
    assert set(figures) <= set(re.findall(r"\d+(?:\.\d+)?", picture))


def test_every_key_of_the_yaml_is_a_field() -> None:
    keys = set(yaml.safe_load(blocks("README.md", "yaml")[0]))

    assert {"model_name_or_path", "train_data", "replay_share", "output_dir"} <= keys


@pytest.mark.parametrize("readme", READMES)
def test_every_file_that_is_linked_or_listed_is_there(readme: str) -> None:
    text = (ROOT / readme).read_text("utf-8")
    linked = re.findall(r"\]\(([^):]+)\)", text)
    listed = [
        path for path in re.findall(r"`([\w./]+/[\w./]*)`", text) if path.split("/")[0] in os.listdir(ROOT)
    ]

    assert linked and listed
    assert not [path for path in (*linked, *listed) if not (ROOT / path.partition("#")[0]).exists()]
