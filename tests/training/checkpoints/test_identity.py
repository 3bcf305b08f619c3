"""Tests of vlcpt/training/checkpoints/identity.py: which runs may go on from whose checkpoints."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support import FOUR
from vlcpt import CPTConfig, CPTDataset, ModelConfig, load_model
from vlcpt.training.checkpoints.files import CheckpointError
from vlcpt.training.checkpoints.identity import frozen_digest, require_same_run, run_facts

FOLDER = Path("out/checkpoint-2")


@pytest.fixture(scope="module")
def facts(tiny_model_dir, tiny_processor):
    """A function that gives the facts of a run."""

    def make(rows=FOUR, data=None, model=None, edit=None, **training):
        dataset = CPTDataset(rows, tiny_processor, **({"max_length": 256} | (data or {})))
        made = load_model(ModelConfig(str(tiny_model_dir), **({"lora_r": 4} | (model or {}))))
        if edit:
            edit(made)
        return run_facts(made, CPTConfig("out", use_cpu=True, **training), dataset)

    return make


@pytest.fixture(scope="module")
def usual(facts):
    return facts()


def test_the_same_run_again_is_the_same_run(facts, usual):
    require_same_run(FOLDER, usual, facts())


def test_what_does_not_change_a_run_may_change(facts, usual):
    changed = facts(max_steps=900, save_steps=7, logging_steps=3, dataloader_num_workers=1)

    require_same_run(FOLDER, usual, changed)


def test_the_same_rows_per_step_may_be_cut_otherwise(facts):
    one = facts(per_device_train_batch_size=4)
    other = facts(gradient_accumulation_steps=4)

    require_same_run(FOLDER, one, {**other, "processes": 2})


def bigger_base(model):
    name = "base_model.model.model.visual.blocks.0.attn.proj.weight"
    with torch.no_grad():
        dict(model.named_parameters())[name][3, 5] += 1e-3


# As many tokens as before.
CHANGED = {**FOUR[0], "text": FOUR[0]["text"].replace("a <image> b", "b <image> a")}
OTHERS = {
    r"the plan of the training data": {"rows": [*FOUR[1:], FOUR[0]]},
    r"the plan of the training data: ": {"rows": [CHANGED, *FOUR[1:]]},
    r"the plan of .*max_length, packing": {"data": {"max_length": 100}},
    r"the plan of the training data.*data_seed": {"data": {"seed": 5, "packing": False}},
    r"seed: saved with 42, now 43": {"seed": 43},
    r"data_seed: saved with none, now 3": {"data_seed": 3},
    r"train_sampling_strategy: saved with none, now seq": {"train_sampling_strategy": "sequential"},
    r"packs in a step: saved with 1, now 2": {"gradient_accumulation_steps": 2},
    r"optim: saved with adamw_torch_fused, now sgd": {"optim": "sgd"},
    r"LoRA: saved with r 4, now r 8 \(keep": {"model": {"lora_r": 8}},
    r"LoRA: saved with lora_alpha 32, now lora_alpha 3": {"model": {"lora_alpha": 3}},
    r"LoRA: saved with use_dora False, now use_dora True": {"model": {"use_dora": True}},
    r"LoRA: saved with target_modules .*the tensors that train": {
        "model": {"lora_target_modules": ["q_proj"]}
    },
    r"LoRA: saved with .*now none.*the tensors that train": {"model": {"tuning": "full", "lora_r": 16}},
    r"the tensors that train": {"model": {"train_merger": True}},
    r"the weights that do not train": {"edit": bigger_base},
    r"the weights that do not train.*dtype": {"model": {"dtype": "bfloat16"}},
}


@pytest.mark.parametrize("message", OTHERS)
def test_another_run_is_refused_and_the_difference_named(facts, usual, message):
    with pytest.raises(
        CheckpointError, match=rf"^checkpoint-2 is of another run\. .*{message}.*config\.yaml"
    ):
        require_same_run(FOLDER, usual, facts(**OTHERS[message]))


def test_every_difference_is_named_at_once(facts, usual):
    with pytest.raises(CheckpointError, match=r"seed: .*optim: .*LoRA: "):
        require_same_run(FOLDER, usual, facts(seed=1, optim="sgd", model={"lora_r": 2}))


@pytest.mark.parametrize("engine", ["ZeRO-2", "ZeRO-3"])
def test_states_of_deepspeed_need_the_same_engine_and_number_of_processes(usual, engine):
    saved = {**usual, "engine": engine, "processes": 8}

    with pytest.raises(CheckpointError, match=r"processes: saved with 8, now 1 \(states of this engine"):
        require_same_run(FOLDER, saved, {**saved, "processes": 1})
    with pytest.raises(CheckpointError, match=rf"the format of the states: saved with {engine}, now plain"):
        require_same_run(FOLDER, saved, usual)


def test_facts_hold_no_path(usual, tiny_model_dir):
    assert str(tiny_model_dir) not in str(usual)


def test_one_bit_of_any_frozen_weight_changes_the_digest(make_tiny_model):
    model = make_tiny_model(dtype=torch.bfloat16).requires_grad_(False)
    seen = {frozen_digest(model)}

    for parameter in model.parameters():
        parameter.data.view(torch.int16).view(-1)[-1] ^= 1
        seen.add(frozen_digest(model))

    assert len(seen) == 1 + len(list(model.parameters()))


def test_what_trains_is_not_in_the_digest(make_tiny_model):
    model = make_tiny_model().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    before = frozen_digest(model)
    model.lm_head.weight.data.add_(1)

    assert frozen_digest(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_conversion_by_the_engine_does_not_change_the_digest_and_a_weight_does(make_tiny_model, dtype):
    model = make_tiny_model().requires_grad_(False)
    before = frozen_digest(model, dtype)

    assert frozen_digest(model) != frozen_digest(model.to(dtype))  # or it converts nothing
    assert frozen_digest(model, dtype) == before
    model.lm_head.weight.data[0, 0] += 1
    assert frozen_digest(model, dtype) != before


def test_bytes_of_4_bit_weights_are_hashed_as_they_are():
    packed = nn.ParameterDict({"w": nn.Parameter(torch.arange(8, dtype=torch.uint8), requires_grad=False)})
    before = frozen_digest(packed, torch.bfloat16)

    packed["w"].data[0] = 255

    assert frozen_digest(packed, torch.bfloat16) != before


def test_a_save_does_not_make_it_another_run(facts, tmp_path):
    def without_architectures(model):
        model.get_base_model().config.architectures = None

    def saved(model):
        without_architectures(model)
        model.get_base_model().save_pretrained(tmp_path)

    require_same_run(FOLDER, facts(edit=without_architectures), facts(edit=saved))
