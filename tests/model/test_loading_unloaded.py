"""Tests of what vlcpt/model/loading.py says without loading a weight."""

import json
import shutil
import time

import pytest
import torch
from transformers import BertConfig, Qwen2_5_VLConfig
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from vlcpt.config.schema import ModelConfig
from vlcpt.errors import ConfigError
from vlcpt.model.loading import check_evaluated, check_model, load_model


@pytest.fixture
def model_copy(tiny_model_dir, tmp_path):
    """A folder with the tiny model that a test may break."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


@pytest.fixture
def adapter_dir(tiny_model_dir, tmp_path):
    load_model(ModelConfig(str(tiny_model_dir), lora_r=4)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def only_config(folder, **changes):
    """A folder with a model's configuration and a file of weights that has a header and no numbers."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(Qwen2_5_VLConfig(**changes).to_dict()))
    count = 2 * 10**11
    header = json.dumps({"all": {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + count)  # a hole: it takes no room
    return str(folder)


@pytest.mark.parametrize(
    "way",
    [
        {"tuning": "full", "train_embeddings": True},
        {"tuning": "qlora", "train_merger": True},
        {"train_vision": True, "lora_towers": ("language",), "use_dora": True},
        {"lora_target_modules": ("q_proj", "lm_head")},
    ],
    ids=str,
)
def test_a_configuration_that_trains_is_passed(tiny_model_dir, way):
    check_model(ModelConfig(str(tiny_model_dir), **way))


@pytest.mark.parametrize(
    ("tie", "way", "message"),
    [
        (False, {"lora_target_modules": ("nope",)}, r"'nope', which matches no layer of language"),
        (False, {"lora_target_modules": ("attn.qkv",)}, r"'attn\.qkv', which matches no layer of language"),
        (False, {"lora_target_modules": ("q_proj",), "train_merger": True}, "no layer of the merger tower"),
        (True, {"lora_target_modules": ("lm_head",)}, r"'lm_head', which shares its weight"),
    ],
)
def test_what_tuning_refuses_is_said_without_weights(tmp_path, tie, way, message):
    folder = only_config(tmp_path / "model", tie_word_embeddings=tie)

    with pytest.raises(ConfigError, match=message):
        check_model(ModelConfig(folder, **way))


def test_a_model_that_is_not_there_is_an_error():
    with pytest.raises(ConfigError, match=r"nowhere/at-all: no such folder, and no model of this id"):
        check_model(ModelConfig("nowhere/at-all"))


def test_another_family_is_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path)

    with pytest.raises(ConfigError, match="'bert' is not supported"):
        check_model(ModelConfig(str(tmp_path)))


def test_a_model_folder_without_weights_is_an_error_of_what_is_missing(model_copy):
    (model_copy / "model.safetensors").unlink()

    with pytest.raises(ConfigError, match=r"no model could be loaded from this folder.*model\.safetensors"):
        check_model(ModelConfig(str(model_copy)))


def test_a_model_folder_without_one_of_its_shards_is_an_error_naming_it(model_copy):
    (model_copy / "model.safetensors").rename(model_copy / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model_copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))

    with pytest.raises(ConfigError, match=r"lists model-00002-of-00002\.safetensors, which is not there"):
        check_model(ModelConfig(str(model_copy)))


def test_attention_that_cannot_run_here_is_an_error_that_names_it(tiny_model_dir):
    if torch.cuda.is_available():
        pytest.skip("flash attention may run here")

    with pytest.raises(ConfigError, match="cannot be loaded with attn_implementation flash_attention_2"):
        check_model(ModelConfig(str(tiny_model_dir), attn_implementation="flash_attention_2"))


def test_an_adapter_that_training_can_continue_from_is_passed(tiny_model_dir, adapter_dir):
    check_model(ModelConfig(str(tiny_model_dir), adapter_name_or_path=str(adapter_dir)))


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_an_adapter_is_an_error_of_what_is_missing(tiny_model_dir, adapter_dir, missing):
    (adapter_dir / missing).unlink()

    with pytest.raises(ConfigError, match=f"no adapter could be loaded from this folder.*{missing}"):
        check_model(ModelConfig(str(tiny_model_dir), adapter_name_or_path=str(adapter_dir)))


def test_an_adapter_that_is_nowhere_is_an_error(tiny_model_dir):
    with pytest.raises(ConfigError, match=r"nowhere/at-all: no such folder, and no adapter of this id"):
        check_model(ModelConfig(str(tiny_model_dir), adapter_name_or_path="nowhere/at-all"))


def test_an_adapter_with_other_towers_than_the_configuration_is_refused(tiny_model_dir, adapter_dir):
    with pytest.raises(ConfigError, match=r"does not train the merger tower.*Set train_merger: false"):
        check_model(
            ModelConfig(str(tiny_model_dir), adapter_name_or_path=str(adapter_dir), train_merger=True)
        )


@pytest.fixture
def seven_b(tmp_path):
    """The shapes of Qwen2.5-VL-7B."""
    return only_config(
        tmp_path / "7b",
        text_config={"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
                     "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
        vision_config={"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                       "out_hidden_size": 3584},
    )  # fmt: skip


def test_seven_billion_parameters_are_checked_in_seconds(seven_b):
    before = time.monotonic()

    check_model(ModelConfig(seven_b, train_vision=True, train_merger=True, train_embeddings=True))

    assert time.monotonic() - before < 8


@pytest.fixture
def stage_3():
    """As a configuration with deepspeed: zero3 leaves it; all of it is gone after the test."""
    set_hf_deepspeed_config(
        active := HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    )
    yield active
    unset_hf_deepspeed_config()


def test_deepspeed_stage_3_does_not_partition_the_model_that_is_only_checked(seven_b, stage_3, monkeypatch):
    """It would hold weights, and wait for the other ranks."""

    def refuse(*args, **kwargs):
        raise AssertionError("deepspeed.zero.Init was entered")

    monkeypatch.setattr("deepspeed.zero.Init", refuse)
    assert is_deepspeed_zero3_enabled()

    check_model(ModelConfig(seven_b, use_dora=True, train_merger=True, lora_towers=("language",)))


def test_a_checkpoint_that_can_be_measured_is_passed(tiny_model_dir, adapter_dir):
    for checkpoint in (tiny_model_dir, adapter_dir):
        check_evaluated(ModelConfig(str(tiny_model_dir)), str(checkpoint))


def test_what_is_no_checkpoint_to_measure_is_an_error(tiny_model_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"neither an adapter .* nor a model"):
        check_evaluated(ModelConfig(str(tiny_model_dir)), str(tmp_path))


def test_the_base_of_what_is_measured_is_looked_at(tiny_model_dir, tmp_path):
    with pytest.raises(ConfigError, match="no model could be loaded from this folder"):
        check_evaluated(ModelConfig(str(tmp_path)), str(tiny_model_dir))
