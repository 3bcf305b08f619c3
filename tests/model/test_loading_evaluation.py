"""Tests of vlcpt/model/loading.py."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from vlcpt.config.schema import ModelConfig
from vlcpt.model.loading import load_for_evaluation, load_model


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def trained(config, inputs, folder):
    """Train a step and save; returns the logits."""
    model = load_model(config).train()
    model(**inputs).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05).step()
    model.save_pretrained(folder)
    return logits(model.eval(), inputs)


# Nothing of how the checkpoint was trained: it is read from the checkpoint.
CONFIGS = [
    {},
    {"tuning": "full"},
    {"train_language": False, "train_vision": True, "lora_r": 3, "use_dora": True},
    {"train_embeddings": True, "lora_target_modules": ("q_proj",)},
]


@pytest.mark.parametrize("way", CONFIGS, ids=str)
def test_an_adapter_is_measured_whatever_the_configuration_trains(tiny_model_dir, tiny_inputs, tmp_path, way):
    how = {"train_merger": True, "train_embeddings": True, "lora_towers": ("language",)}
    expected = trained(ModelConfig(str(tiny_model_dir), **how), tiny_inputs, tmp_path)
    untrained = logits(AutoModelForImageTextToText.from_pretrained(tiny_model_dir).eval(), tiny_inputs)

    model, base = load_for_evaluation(ModelConfig(str(tiny_model_dir), **way), str(tmp_path))

    assert base is None
    assert torch.equal(logits(model, tiny_inputs), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, tiny_inputs), untrained)


@pytest.mark.parametrize("way", CONFIGS, ids=str)
def test_a_model_trained_in_full_is_measured_beside_its_base(tiny_model_dir, tiny_inputs, tmp_path, way):
    expected = trained(ModelConfig(str(tiny_model_dir), tuning="full"), tiny_inputs, tmp_path)
    untrained = logits(AutoModelForImageTextToText.from_pretrained(tiny_model_dir).eval(), tiny_inputs)

    model, base = load_for_evaluation(ModelConfig(str(tiny_model_dir), **way), str(tmp_path))

    assert torch.equal(logits(model, tiny_inputs), expected)
    assert torch.equal(logits(base, tiny_inputs), untrained)


def test_an_adapter_is_measured_with_the_float32_weights_that_were_trained(
    make_tiny_model, tiny_inputs, tmp_path
):
    """Copies of bfloat16 modules were float32 in training, and stay so."""
    make_tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    how = {"train_merger": True, "lora_towers": ("language",)}
    expected = trained(ModelConfig(str(tmp_path / "base"), **how), tiny_inputs, tmp_path / "adapter")

    model, _ = load_for_evaluation(ModelConfig(str(tmp_path / "base")), str(tmp_path / "adapter"))

    assert torch.equal(logits(model, tiny_inputs), expected)


@pytest.mark.parametrize("tuning", ["lora", "full", "qlora"])
def test_what_is_measured_is_frozen_in_evaluation_mode_and_without_a_cache(
    tiny_model_dir, tiny_inputs, tmp_path, tuning
):
    config = ModelConfig(str(tiny_model_dir), tuning=tuning)
    trained(config, tiny_inputs, tmp_path)

    for model in load_for_evaluation(config, str(tmp_path)):
        if model is not None:
            assert not any(p.requires_grad for p in model.parameters())
            assert not model.training
            assert model.config.use_cache is False
            assert model.config.text_config.use_cache is False


def test_an_adapter_of_qlora_is_measured_on_its_base_in_4_bits(tiny_model_dir, tiny_inputs, tmp_path):
    config = ModelConfig(str(tiny_model_dir), tuning="qlora")
    expected = trained(config, tiny_inputs, tmp_path)

    model, base = load_for_evaluation(config, str(tmp_path))

    assert base is None
    assert torch.equal(logits(model, tiny_inputs), expected)


def test_a_merged_model_of_qlora_is_measured_in_its_own_precision(tiny_model_dir, tiny_inputs):
    config = ModelConfig(str(tiny_model_dir), tuning="qlora")

    for model in load_for_evaluation(config, str(tiny_model_dir)):
        assert not any(hasattr(p, "quant_state") for p in model.parameters())


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([], r"neither .*adapter_config\.json.*nor .*config\.json"),
        (["config.json"], r"no model .*holds config.json.*model\.safetensors"),
        (["adapter_config.json"], r"no adapter .*holds adapter_config.json.*adapter_model\.safetensors"),
    ],
)
def test_a_folder_of_neither_model_nor_adapter_is_an_error_of_what_was_looked_for(
    tiny_model_dir, tmp_path, keep, message
):
    load_model(ModelConfig(str(tiny_model_dir))).save_pretrained(tmp_path / "adapter")
    (tmp_path / "checkpoint").mkdir()
    for name in keep:
        source = tiny_model_dir if name == "config.json" else tmp_path / "adapter"
        shutil.copy(source / name, tmp_path / "checkpoint")

    with pytest.raises(ValueError, match=message):
        load_for_evaluation(ModelConfig(str(tiny_model_dir)), str(tmp_path / "checkpoint"))


def test_a_checkpoint_that_is_not_there_is_an_error(tiny_model_dir):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        load_for_evaluation(ModelConfig(str(tiny_model_dir)), "nowhere")


def test_an_adapter_that_does_not_fit_is_not_measured(tiny_model_dir, tmp_path):
    load_model(ModelConfig(str(tiny_model_dir))).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(dict(list(load_file(file).items())[1:]), file)

    with pytest.raises(ValueError, match=r"1 missing \("):
        load_for_evaluation(ModelConfig(str(tiny_model_dir)), str(tmp_path))
