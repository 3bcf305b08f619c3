"""Tests of vlcpt/model/shared_features.py."""

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.support import TEN, encode_rows
from vlcpt import CPTDataCollator, ModelConfig, load_model
from vlcpt.model.shared_features import kept_features, see_alike, with_features

TEXT_ALONE, BOTH = [TEN[1]], TEN[2:5]


@pytest.fixture
def batch(tiny_processor):
    def make(rows):
        made = CPTDataCollator(tiny_processor)(encode_rows(rows, tiny_processor))
        return {name: value for name, value in made.items() if name not in ("labels", "loss_weights")}

    return make


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "rows", [TEXT_ALONE, TEN[:1], TEN[4:5], BOTH], ids=["text", "image", "video", "both"]
)
def test_logits_of_kept_features_are_those_of_the_pixels_to_the_bit(tiny_model, batch, rows, autocast):
    inputs, model = batch(rows), tiny_model.eval()

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with kept_features(model) as features:
            expected = model(**inputs).logits
        found = model(**with_features(inputs, features)).logits

    names = {"image": "pixel_values", "video": "pixel_values_videos"}
    assert {names[one] for one in features} == {*names.values()} & inputs.keys()
    assert torch.equal(found, expected)


def test_the_tower_is_not_called_for_features_that_are_given(tiny_model, batch):
    inputs, calls = batch(BOTH), []
    with torch.no_grad(), kept_features(tiny_model) as features:
        tiny_model(**inputs)
    tiny_model.model.visual.register_forward_hook(lambda *_: calls.append("called"))

    tiny_model(**with_features(inputs, features))
    assert not calls
    tiny_model(**inputs)
    assert len(calls) == 2  # image and video: the hook counts


def test_nothing_is_kept_once_the_context_is_left(tiny_model, batch):
    with torch.no_grad():
        with kept_features(tiny_model) as features:
            pass
        tiny_model(**batch(BOTH))

    assert features == {}


@pytest.mark.parametrize(
    ("way", "alike"),
    [
        ({}, True),
        ({"tuning": "qlora"}, True),
        ({"train_embeddings": True}, True),
        ({"train_merger": True}, False),
        ({"train_merger": True, "lora_towers": ["language"]}, False),  # a copy that trains in full
        ({"train_vision": True}, False),
        ({"train_vision": True, "lora_towers": ["language"]}, False),
    ],
    ids=str,
)
def test_adapters_on_and_off_see_alike_where_none_is_in_a_tower_that_sees(tiny_model_dir, way, alike):
    model = load_model(ModelConfig(str(tiny_model_dir), lora_r=4, **way))

    assert see_alike(model, model) == alike


@pytest.mark.parametrize(
    ("name", "alike"),
    [
        ("model.visual.patch_embed.proj.weight", False),
        ("model.visual.merger.mlp.2.bias", False),
        ("model.language_model.norm.weight", True),
    ],
)
def test_two_models_see_alike_where_their_towers_have_equal_weights(make_tiny_model, name, alike):
    first, second = make_tiny_model(), make_tiny_model()
    assert see_alike(first, second)
    with torch.no_grad():
        second.get_parameter(name).view(-1)[-1] += 1e-3

    assert see_alike(first, second) == alike


def test_two_models_of_another_type_do_not_see_alike(make_tiny_model):
    narrow: Qwen2_5_VLForConditionalGeneration = make_tiny_model().to(torch.bfloat16)
    wide = make_tiny_model().to(torch.bfloat16).to(torch.float32)  # the same numbers

    assert not see_alike(narrow, wide)
