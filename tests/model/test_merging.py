"""Tests of vlcpt/model/merging.py."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from vlcpt.model import merging
from vlcpt.model.loading import load_processor
from vlcpt.model.merging import check_logits, merge_adapter
from vlcpt.model.tuning import apply_tuning

WAYS = [
    {},
    {"train_merger": True, "train_vision": True, "use_dora": True},
    {"train_merger": True, "train_vision": True, "lora_towers": ["language"]},
    {"train_embeddings": True},
    {"train_vision": True, "lora_towers": ["vision"]},
    {"lora_target_modules": ["q_proj", "up_proj"]},
]


def trained_adapter(model, processor, inputs, folder, **way):
    """Save base and adapter, trained for a step; returns the logits of both together."""
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    model = apply_tuning(model, **way)
    model(**inputs).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05).step()
    model.save_pretrained(folder / "adapter")
    return logits(model, inputs)


@torch.no_grad()
def logits(model, inputs):
    return model.eval()(**inputs).logits


@pytest.mark.parametrize("way", WAYS, ids=[str(way) for way in WAYS])
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_a_merged_model_gives_the_adapters_logits_without_peft(
    make_tiny_model, tiny_processor, tiny_inputs, tmp_path, way, tie
):
    model = make_tiny_model(tie=tie)
    untrained = logits(model, tiny_inputs)
    expected = trained_adapter(model, tiny_processor, tiny_inputs, tmp_path, **way)
    assert not torch.allclose(expected, untrained, atol=1e-2)

    merge_adapter(tmp_path / "adapter", tmp_path / "merged")

    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, tiny_inputs), expected, atol=1e-4, rtol=1e-4)
    assert merged.config.tie_word_embeddings is tie
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) is tie
    assert merged.config.text_config.use_cache is True
    assert load_processor(str(tmp_path / "merged")).image_token == "<|image_pad|>"
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


@pytest.mark.parametrize("way", WAYS, ids=[str(way) for way in WAYS])
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_a_merge_into_bfloat16_stays_bfloat16(
    make_tiny_model, tiny_processor, tiny_inputs, tmp_path, way, tie
):
    model = make_tiny_model(tie=tie, dtype=torch.bfloat16)
    trained_adapter(model, tiny_processor, tiny_inputs, tmp_path, **way)

    merge_adapter(tmp_path / "adapter", tmp_path / "merged")

    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}


def test_nothing_is_written_when_the_logits_differ(
    tiny_model, tiny_processor, tiny_inputs, tmp_path, monkeypatch
):
    trained_adapter(tiny_model, tiny_processor, tiny_inputs, tmp_path)
    # As if peft had dropped the adapter instead of merging it.
    monkeypatch.setattr("peft.PeftModel.merge_and_unload", lambda self, **_: self.unload(), raising=False)

    with pytest.raises(ValueError, match=r"differ from the adapter's by .* Nothing was written"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_the_checked_logits_depend_on_image_and_text(tiny_model):
    before = check_logits(tiny_model)
    with torch.no_grad():
        tiny_model.model.visual.merger.mlp[2].bias.add_(1.0)
    assert ((check_logits(tiny_model) - before).norm() / before.norm()) > max(merging.TOLERANCES.values())


def test_an_adapter_without_one_of_its_tensors_is_not_merged(
    tiny_model, tiny_processor, tiny_inputs, tmp_path
):
    trained_adapter(tiny_model, tiny_processor, tiny_inputs, tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(dict(list(load_file(file).items())[1:]), file)

    with pytest.raises(ValueError, match=r"1 missing \("):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")

    assert not (tmp_path / "merged").exists()


def test_a_folder_that_is_not_empty_is_not_overwritten(tiny_model, tiny_processor, tiny_inputs, tmp_path):
    trained_adapter(tiny_model, tiny_processor, tiny_inputs, tmp_path)

    with pytest.raises(ValueError, match="exists and is not empty"):
        merge_adapter(tmp_path / "adapter", tmp_path / "base")


def test_a_folder_without_an_adapter_is_refused(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"holds no adapter_config\.json"):
        merge_adapter(tiny_model_dir, tmp_path / "merged")


def test_a_base_that_has_moved_is_an_error_that_says_what_to_correct(
    tiny_model, tiny_processor, tiny_inputs, tmp_path
):
    trained_adapter(tiny_model, tiny_processor, tiny_inputs, tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "/gone"}))

    with pytest.raises(ValueError, match=r"adapter_config\.json.*correct base_model_name_or_path.*/gone"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")


def rename_base(adapter, name):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))


def test_a_base_named_relative_to_where_it_was_trained_is_found_from_elsewhere(
    tiny_model, tiny_processor, tiny_inputs, tmp_path, monkeypatch
):
    """As a run leaves it: the adapter's name starts at the directory of training, config.yaml's at itself."""
    trained_adapter(tiny_model, tiny_processor, tiny_inputs, tmp_path)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    shutil.copytree(tmp_path / "adapter", checkpoint)
    rename_base(checkpoint, "base")
    (tmp_path / "out" / "config.yaml").write_text("model_name_or_path: ../base\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    merge_adapter(checkpoint, "merged")

    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "elsewhere" / "merged")


def test_a_merge_does_not_take_flash_attention(
    make_tiny_model, tiny_processor, tiny_inputs, tmp_path, monkeypatch
):
    """It runs on the CPU, also on a machine with a GPU."""
    trained_adapter(make_tiny_model(dtype=torch.bfloat16), tiny_processor, tiny_inputs, tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("vlcpt.model.loading.is_flash_attn_2_available", lambda: True)

    merge_adapter(tmp_path / "adapter", tmp_path / "merged")

    assert (tmp_path / "merged" / "config.json").is_file()


def test_a_base_name_that_may_mean_two_folders_is_an_error_naming_both(
    tiny_model, tiny_processor, tiny_inputs, tmp_path, monkeypatch
):
    trained_adapter(tiny_model, tiny_processor, tiny_inputs, tmp_path)
    rename_base(tmp_path / "adapter", "base")
    shutil.copytree(tmp_path / "base", tmp_path / "elsewhere" / "base")
    monkeypatch.chdir(tmp_path / "elsewhere")

    with pytest.raises(ValueError, match=r"'base' may be .*elsewhere/base or .*/base.*absolute"):
        merge_adapter(tmp_path / "adapter", "merged")
