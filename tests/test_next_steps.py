"""docs/next-steps.md: how to go on from a result runs as it stands there."""

import ast
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.support import write_run
from vlcpt import load_processor
from vlcpt.cli import app
from vlcpt.demo import base_path

PAGE = (Path(__file__).parents[1] / "docs/next-steps.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
# What needs TRL is run by tests/going_on_in_trl.py.
RUN = [block for block in BLOCKS if "from trl import" not in block]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with a run that was trained and merged, as the page says, with its base and a picture."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "base").symlink_to(base_path())
    options = ("max_steps: 1", "learning_rate: 0.01", "use_cpu: true", "dataloader_num_workers: 0")
    run = write_run(folder, *options, "report_to: none", "lora_r: 2")
    for command in (["train", str(run)], ["merge", str(folder / "out"), str(folder / "merged")]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
    (folder / "runs").mkdir()
    shutil.move(folder / "out", folder / "runs/manuals")
    (folder / "figures").mkdir()
    Image.new("RGB", (84, 56), "steelblue").save(folder / "figures/valve.png")
    return folder


@pytest.mark.parametrize("number", range(len(RUN)))
def test_a_document_is_continued(number, results, monkeypatch, capsys):
    monkeypatch.chdir(results)

    exec(compile(RUN[number], "docs/next-steps.md", "exec"), {})

    assert len(capsys.readouterr().out.strip()) > 3


def test_the_merged_model_is_a_trained_one(results):
    """Or the blocks would read what no run has changed."""
    (merged,), (base,) = (list((results / name).glob("*.safetensors")) for name in ("merged", "base"))
    before = load_file(base)

    assert [name for name, one in load_file(merged).items() if not torch.equal(one, before[name])]


def test_the_blocks_for_trl_are_those_that_a_script_with_trl_runs():
    trainers = [re.findall(r"from trl import .*?(\w+Trainer)", block) for block in BLOCKS if block not in RUN]

    assert len(RUN) == 3
    assert trainers == [["SFTTrainer"], ["DPOTrainer"]]
    assert all(ast.parse(block) for block in BLOCKS)
    assert "by_page" in (Path(__file__).parent / "going_on_in_trl.py").read_text("utf-8")


def test_a_prompt_ends_without_the_space_that_the_first_trained_token_has():
    """The reason that the page gives: the token has its space, and a prompt with it has other tokens."""
    tokenizer = load_processor(base_path()).tokenizer
    whole, prompt, spaced = (
        tokenizer(text)["input_ids"] for text in ("Fig. 1 shows it", "Fig. 1", "Fig. 1 ")
    )

    assert whole[: len(prompt)] == prompt
    assert whole[: len(spaced)] != spaced
