"""Tests of vlcpt/data/families.py."""

import re
from collections import Counter

import pytest
from torch import nn

from vlcpt.data.families import FAMILIES, TOWERS, family_of, is_embedding, tower_of


def test_an_unsupported_model_type_is_refused_by_naming_the_supported():
    with pytest.raises(ValueError, match=r"'qwen3_vl' is not supported; supported: qwen2_5_vl"):
        family_of("qwen3_vl")


def test_each_parameter_of_the_model_is_in_a_tower(tiny_model):
    counts = Counter(tower_of(name) for name, _ in tiny_model.named_parameters())

    assert set(counts) == set(TOWERS)
    assert counts["merger"] == len(list(tiny_model.model.visual.merger.parameters()))
    assert counts["vision"] + counts["merger"] == len(list(tiny_model.model.visual.parameters()))


@pytest.mark.parametrize(
    "prefix", ["", "base_model.model.", "module.", "module.base_model.model.", "_orig_mod."]
)
def test_a_tower_is_found_behind_the_prefixes_of_peft_and_others(prefix):
    assert tower_of(f"{prefix}model.visual.blocks.0.attn.qkv.lora_A.default.weight") == "vision"
    assert tower_of(f"{prefix}model.visual.merger.modules_to_save.default.mlp.0.weight") == "merger"
    assert tower_of(f"{prefix}lm_head.weight") == "language"


def test_a_name_of_no_tower_is_an_error():
    with pytest.raises(ValueError, match=r"'model\.audio\.weight' is in none of the towers"):
        tower_of("model.audio.weight")


def test_only_input_and_output_embeddings_are_embeddings(tiny_model):
    found = [name for name, _ in tiny_model.named_parameters() if is_embedding(name)]

    assert found == ["model.language_model.embed_tokens.weight", "lm_head.weight"]


@pytest.mark.parametrize("tower", TOWERS)
def test_default_lora_targets_are_all_linear_layers_of_their_tower_only(tiny_model, tower):
    pattern = FAMILIES["qwen2_5_vl"].lora_targets[tower]
    linear = [n for n, m in tiny_model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]

    matched = [name for name in linear if re.fullmatch(pattern, name)]

    assert matched == [name for name in linear if tower_of(name) == tower]
