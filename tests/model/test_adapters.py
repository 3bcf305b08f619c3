"""Tests of vlcpt/model/adapters.py."""

import logging
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from tests.model.changing import logits, name_base, one_step, rewrite
from vlcpt.config.schema import ModelConfig
from vlcpt.model.adapters import load_adapter
from vlcpt.model.loading import load_base, load_for_evaluation, load_model
from vlcpt.model.tuning import apply_tuning, tower_table


@pytest.fixture
def adapter_dir(tiny_model_dir, tiny_inputs, tmp_path):
    """An adapter on language tower and merger that has been trained for a step."""
    model = load_model(ModelConfig(str(tiny_model_dir), train_merger=True, lora_r=4))
    one_step(model, tiny_inputs)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_training_of_a_saved_adapter_continues_from_its_weights(tiny_model_dir, adapter_dir, tiny_inputs):
    base = AutoModelForImageTextToText.from_pretrained(tiny_model_dir)
    expected = logits(PeftModel.from_pretrained(base, adapter_dir), tiny_inputs)

    model = load_model(
        ModelConfig(str(tiny_model_dir), adapter_name_or_path=str(adapter_dir), train_merger=True)
    )

    assert torch.equal(logits(model, tiny_inputs), expected)
    assert [row.how for row in tower_table(model)] == ["frozen", "LoRA r=4", "LoRA r=4"]
    one_step(model, tiny_inputs)
    assert not torch.equal(logits(model, tiny_inputs), expected)


def test_a_full_copy_in_a_saved_adapter_trains_in_float32_on_a_bfloat16_base(
    make_tiny_model, tiny_inputs, tmp_path
):
    make_tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    way = {"train_merger": True, "train_embeddings": True, "lora_towers": ("language",)}
    model = load_model(ModelConfig(str(tmp_path / "base"), **way))
    one_step(model, tiny_inputs)
    model.save_pretrained(tmp_path / "adapter")

    again = load_model(
        ModelConfig(
            str(tmp_path / "base"),
            adapter_name_or_path=str(tmp_path / "adapter"),
            train_merger=True,
            train_embeddings=True,
        )
    )

    before = {name: p for name, p in model.named_parameters() if p.requires_grad}
    after = {name: p for name, p in again.named_parameters() if p.requires_grad}
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_an_adapter_with_other_towers_than_the_configuration_is_refused(tiny_model_dir, adapter_dir):
    with pytest.raises(ValueError, match=r"the adapter trains the merger tower.*Set train_merger: true"):
        load_model(ModelConfig(str(tiny_model_dir), adapter_name_or_path=str(adapter_dir)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: dict(list(found.items())[1:]), r"1 missing \("),
        (lambda found: found | {"base_model.model.extra.lora_A.weight": torch.ones(1)}, r"1 unexpected \("),
        # What peft itself loads as nothing, with a warning.
        (lambda found: {k.replace("language_model.", ""): v for k, v in found.items()}, r"28 missing.*28 un"),
        (lambda found: {k: v[..., :1].clone() for k, v in found.items()}, r"of another shape"),
    ],
    ids=["missing", "unexpected", "old prefix", "shape"],
)  # fmt: skip
def test_an_adapter_whose_tensors_do_not_fit_is_refused(tiny_model_dir, adapter_dir, change, message):
    rewrite(adapter_dir / "adapter_model.safetensors", change)

    with pytest.raises(ValueError, match=message):
        load_adapter(load_base(str(tiny_model_dir)), str(adapter_dir), is_trainable=True)
    config = ModelConfig(str(tiny_model_dir), adapter_name_or_path=str(adapter_dir), train_merger=True)
    with pytest.raises(ValueError, match=message):  # to go on with
        load_model(config)
    with pytest.raises(ValueError, match=message):  # to be measured
        load_for_evaluation(ModelConfig(str(tiny_model_dir)), str(adapter_dir))


def test_an_adapter_with_a_full_module_missing_is_refused(tiny_model_dir, tmp_path):
    model = apply_tuning(
        load_base(str(tiny_model_dir)), ModelConfig("base", train_merger=True, lora_towers=["language"])
    )
    model.save_pretrained(tmp_path)
    rewrite(
        tmp_path / "adapter_model.safetensors",
        lambda found: {k: v for k, v in found.items() if "merger.mlp.2.bias" not in k},
    )

    with pytest.raises(ValueError, match=r"1 missing \(.*merger.mlp.2.bias\)"):
        load_adapter(load_base(str(tiny_model_dir)), str(tmp_path), is_trainable=True)


def test_a_folder_without_an_adapter_is_an_error(tiny_model_dir):
    with pytest.raises(ValueError, match="no adapter could be loaded from this folder"):
        load_adapter(load_base(str(tiny_model_dir)), str(tiny_model_dir), is_trainable=True)


def saved_adapter(base, folder, **way):
    """A new adapter, saved without training."""
    load_model(ModelConfig(str(base), lora_r=2, **way)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("trains", [True, False])
def test_an_adapter_with_embeddings_other_than_the_configuration_is_refused(tiny_model_dir, tmp_path, trains):
    adapter = saved_adapter(tiny_model_dir, tmp_path, train_embeddings=trains)
    found = "trains" if trains else "does not train"

    with pytest.raises(
        ValueError,
        match=f"adapter {found} the embeddings in full.*Set train_embeddings: {str(trains).lower()}",
    ):
        load_model(
            ModelConfig(str(tiny_model_dir), adapter_name_or_path=adapter, train_embeddings=not trains)
        )


def test_embeddings_alone_are_not_a_trained_language_tower(tiny_model_dir, tmp_path):
    way = {"train_language": False, "train_merger": True, "train_embeddings": True}
    adapter = saved_adapter(tiny_model_dir, tmp_path, **way)

    with pytest.raises(ValueError, match=r"does not train the language tower.*Set train_language: false"):
        load_model(
            ModelConfig(
                str(tiny_model_dir),
                adapter_name_or_path=adapter,
                **way | {"train_language": True},
            )
        )
    assert load_model(ModelConfig(str(tiny_model_dir), adapter_name_or_path=adapter, **way))


@pytest.mark.parametrize("train_embeddings", [True, False])
def test_the_embeddings_of_a_language_tower_in_full_belong_to_it(tiny_model_dir, tmp_path, train_embeddings):
    adapter = saved_adapter(tiny_model_dir, tmp_path, train_vision=True, lora_towers=("vision",))

    again = load_model(
        ModelConfig(
            str(tiny_model_dir),
            adapter_name_or_path=adapter,
            train_vision=True,
            train_embeddings=train_embeddings,
        )
    )

    assert [row.how for row in tower_table(again)] == ["LoRA r=2", "frozen", "full"]


def test_an_adapter_on_the_output_layer_is_no_embedding_trained_in_full(tiny_model_dir, tmp_path):
    adapter = saved_adapter(tiny_model_dir, tmp_path, lora_target_modules=("q_proj", "lm_head"))

    again = load_model(ModelConfig(str(tiny_model_dir), adapter_name_or_path=adapter))

    assert tower_table(again)[2].how == "LoRA r=2"


def test_an_adapter_on_another_base_than_its_own_is_warned_of_by_naming_both(
    tiny_model_dir, adapter_dir, caplog
):
    name_base(adapter_dir, "some/other-model")

    with caplog.at_level(logging.WARNING):
        load_adapter(load_base(str(tiny_model_dir)), str(adapter_dir), is_trainable=False)

    (record,) = [r for r in caplog.records if r.name.startswith("vlcpt")]
    assert "some/other-model" in record.message
    assert str(tiny_model_dir) in record.message


@pytest.mark.parametrize("where", ["itself", "link", "relative", "copy"])
def test_the_base_of_an_adapter_is_known_by_another_path_too(
    tiny_model_dir, adapter_dir, tmp_path, caplog, monkeypatch, where
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tiny_model_dir)
    shutil.copytree(tiny_model_dir, tmp_path / "copy")  # on another machine, say: its config.json is the same
    names = {
        "itself": str(tiny_model_dir),
        "link": str(tmp_path / "link"),
        "relative": "link",
        "copy": "copy",
    }
    name_base(adapter_dir, names[where])

    with caplog.at_level(logging.WARNING):
        load_adapter(load_base(str(tiny_model_dir)), str(adapter_dir), is_trainable=False)

    assert not [r for r in caplog.records if r.name.startswith("vlcpt")]
