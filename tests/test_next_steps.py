"""docs/next-steps.md: how to go on from a result runs as it stands there."""

import ast
import re
from pathlib import Path

import pytest
from PIL import Image

from vlcpt import ModelConfig, load_model, load_processor
from vlcpt.demo import base_path

PAGE = (Path(__file__).parents[1] / "docs/next-steps.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
RUN = [block for block in BLOCKS if "not run as it stands" not in block]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with a merged model, an adapter and its base, and a picture."""
    folder = tmp_path_factory.mktemp("results")
    for name in ("merged", "base"):
        (folder / name).symlink_to(base_path())
    model = load_model(ModelConfig(base_path(), tuning="lora", lora_r=2))
    model.save_pretrained(folder / "runs/manuals")
    load_processor(base_path()).save_pretrained(folder / "runs/manuals")
    (folder / "figures").mkdir()
    Image.new("RGB", (84, 56), "steelblue").save(folder / "figures/valve.png")
    return folder


@pytest.mark.parametrize("number", range(len(RUN)))
def test_a_document_is_continued(number, results, monkeypatch, capsys):
    monkeypatch.chdir(results)

    exec(compile(RUN[number], "docs/next-steps.md", "exec"), {})

    assert len(capsys.readouterr().out.strip()) > 3


def test_what_is_not_run_is_python_at_least_and_says_so():
    (block,) = set(BLOCKS) - set(RUN)

    assert len(RUN) == 3
    assert "SFTTrainer" in ast.unparse(ast.parse(block))


def test_a_prompt_ends_without_the_space_that_the_first_trained_token_has():
    """The reason that the page gives: the token has its space, and a prompt with it has other tokens."""
    tokenizer = load_processor(base_path()).tokenizer
    whole, prompt, spaced = (
        tokenizer(text)["input_ids"] for text in ("Fig. 1 shows it", "Fig. 1", "Fig. 1 ")
    )

    assert whole[: len(prompt)] == prompt
    assert whole[: len(spaced)] != spaced
