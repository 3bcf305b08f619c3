"""What a person does next with a result of the demo's base, or of a published one: generate."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.support import make_trainer
from vlcpt import CPTDataset, ModelConfig, load_model, merge_adapter
from vlcpt.demo import base_path
from vlcpt.demo.build import build_model

ROWS = [{"text": "<trainable_text>one two three</trainable_text>"}]


def train(base: str, processor: object, folder: Path, *, tuning: str, learning_rate: float = 1e-6) -> None:
    """A saved run of one step, which hardly changes what the base has learnt."""
    model = load_model(ModelConfig(base, tuning=tuning))
    dataset = CPTDataset(ROWS, processor, max_length=32, packing=False)
    trainer = make_trainer(model, dataset, processor, folder, max_steps=1, learning_rate=learning_rate)
    trainer.train()
    trainer.save_model()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the demo's base: ``lora``, ``merged`` and ``full``."""
    folder = tmp_path_factory.mktemp("results")
    processor = AutoProcessor.from_pretrained(base_path())
    for tuning in ("lora", "full"):
        train(base_path(), processor, folder / tuning, tuning=tuning)
    merge_adapter(folder / "lora", folder / "merged")
    return folder


@pytest.mark.parametrize("way", ["base", "lora", "merged", "full"])
@torch.no_grad()
def test_generation_stops_at_the_end_of_a_document(results: Path, way: str) -> None:
    saved = base_path() if way in ("base", "lora") else results / way
    model = AutoModelForImageTextToText.from_pretrained(saved)
    if way == "lora":
        model = PeftModel.from_pretrained(model, results / "lora")
    tokenizer = AutoProcessor.from_pretrained(saved).tokenizer
    prompt = tokenizer("One two three", return_tensors="pt")

    ids = model.generate(**prompt, max_new_tokens=60, do_sample=False)[0].tolist()

    assert ids.index(tokenizer.convert_tokens_to_ids("<|endoftext|>")) == len(ids) - 1
    assert len(ids) < 60  # or it stopped for another reason


def test_the_shipped_settings_of_generation_are_those_that_the_build_writes(tmp_path: Path) -> None:
    model = build_model(AutoProcessor.from_pretrained(base_path()))
    model.generation_config.save_pretrained(tmp_path)

    written, shipped = (read_settings(folder) for folder in (tmp_path, Path(base_path())))
    assert written == shipped
    assert shipped["eos_token_id"] == [1004, 1002]  # <|im_end|>, <|endoftext|>


@pytest.mark.parametrize("layout", ["saved", "3B"], indirect=True)
@pytest.mark.parametrize("way", ["merged", "full"])
def test_a_result_keeps_its_bases_settings_of_generation(
    tiny_model_dir: Path, tiny_processor: object, tmp_path: Path, way: str
) -> None:
    train(str(tiny_model_dir), tiny_processor, tmp_path / "run", tuning="full" if way == "full" else "lora")
    if way == "merged":
        merge_adapter(tmp_path / "run", tmp_path / "merged")

    expected = read_settings(tiny_model_dir)
    assert expected["eos_token_id"]
    assert read_settings(tmp_path / ("merged" if way == "merged" else "run")) == expected


def read_settings(folder: Path) -> dict[str, object]:
    """What generation_config.json says, but for the version that wrote it."""
    found = json.loads((folder / "generation_config.json").read_text())
    return {key: value for key, value in found.items() if key != "transformers_version"}
