"""Tests of vlcpt/model/weights.py."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlcpt import ModelConfig, load_model, merge_adapter
from vlcpt.model.loading import load_base, load_for_evaluation
from vlcpt.model.weights import first_not_finite


def put(file: Path, tensor: str, value: float) -> None:
    """Write one number into a saved tensor."""
    held = load_file(file)
    held[tensor].view(-1)[-1] = value
    save_file(held, file, metadata={"format": "pt"})


@pytest.fixture
def base(tiny_model_dir, tmp_path):
    """A copy of the tiny model, in one file, that a test may break."""
    return shutil.copytree(tiny_model_dir, tmp_path / "base")


@pytest.fixture
def adapter(tiny_model_dir, tmp_path):
    """A saved adapter with a merger that was trained in full."""
    config = ModelConfig(str(tiny_model_dir), lora_r=4, train_merger=True, lora_towers=("language",))
    load_model(config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def key(file: Path, part: str) -> str:
    return next(name for name in load_file(file) if part in name)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_number_that_is_not_finite_is_found_wherever_it_stands(value, dtype):
    for place in (0, 4_999, 9_999):
        tensor = torch.randn(100, 100).to(dtype)
        tensor.view(-1)[place] = value
        assert first_not_finite([("good", torch.ones(3, dtype=dtype)), ("bad", tensor)]) == "bad"


def test_the_largest_finite_numbers_are_passed():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        most = torch.finfo(dtype).max
        assert first_not_finite([("a", torch.full((64,), most, dtype=dtype)), ("b", torch.empty(0))]) is None


@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_base_that_is_not_finite_is_named_by_file_and_tensor(base, tuning, value):
    """In 4 bits the number is gone: the model would train from another one."""
    file = base / "model.safetensors"
    name = key(file, "layers.1.mlp.up_proj.weight")
    put(file, name, value)

    with pytest.raises(ValueError, match=rf"model\.safetensors: {name} holds numbers that are not finite"):
        load_model(ModelConfig(str(base), tuning=tuning))


def test_of_several_files_the_one_that_is_not_finite_is_named(make_tiny_model, tmp_path):
    make_tiny_model().save_pretrained(tmp_path, max_shard_size="200KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    name = next(iter(load_file(files[1])))
    put(files[1], name, math.nan)

    with pytest.raises(ValueError, match=rf"{files[1].name}: {name} holds numbers that are not finite"):
        load_base(str(tmp_path))


def test_a_weight_that_float16_cannot_hold_is_named_with_the_types_that_can(base):
    file = base / "model.safetensors"
    put(file, key(file, "visual.merger.mlp.0.weight"), 1e6)

    load_base(str(base))
    with pytest.raises(ValueError, match=r"merger\.mlp\.0\.weight is finite in its file and not as float16"):
        load_base(str(base), dtype="float16")


@pytest.mark.parametrize("part", ["lora_B", "merger.mlp"])
def test_an_adapter_that_is_not_finite_is_named_before_it_is_used(tiny_model_dir, adapter, tmp_path, part):
    file = adapter / "adapter_model.safetensors"
    name = key(file, part)
    put(file, name, math.nan)
    message = rf"adapter_model\.safetensors: {name} holds numbers that are not finite"
    config = {"lora_r": 4, "train_merger": True, "lora_towers": ("language",)}

    with pytest.raises(ValueError, match=message):
        load_model(
            ModelConfig(
                str(tiny_model_dir),
                train_merger=True,
                lora_towers=("language",),
                adapter_name_or_path=str(adapter),
            )
        )
    with pytest.raises(ValueError, match=message):
        load_for_evaluation(ModelConfig(str(tiny_model_dir), **config), checkpoint=str(adapter))
    with pytest.raises(ValueError, match=message):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
