"""Tests of vlcpt/config/precision.py: devices are described, none is needed."""

import json

import pytest
import torch
import yaml

from vlcpt import CPTConfig, DataConfig, ModelConfig
from vlcpt.config.precision import DeviceFacts, choose_precision, slow_products
from vlcpt.config.yaml import Configs, dump_config, load_config
from vlcpt.model.loading import with_native_dtype

H100 = DeviceFacts(("NVIDIA H100",), ((9, 0),), torch_says=True)
A100 = DeviceFacts(("NVIDIA A100",), ((8, 0),), torch_says=True)
V100 = DeviceFacts(("Tesla V100",), ((7, 0),))
T4 = DeviceFacts(("Tesla T4",), ((7, 5),))
MI300 = DeviceFacts(("AMD Instinct MI300X",), ((9, 4),), is_hip=True, torch_says=True)
ROCM_ALONE = DeviceFacts(is_hip=True, torch_says=True)  # torch for ROCm on a machine without a GPU
MIXED = DeviceFacts(("NVIDIA A100", "Tesla V100"), ((8, 0), (7, 0)), torch_says=True)
NONE = DeviceFacts()


@pytest.mark.parametrize(
    ("facts", "used"),
    [
        (H100, "bf16"),
        (A100, "bf16"),
        (MI300, "bf16"),
        (V100, "float32"),
        (T4, "float32"),
        (MIXED, "float32"),  # torch looks at one card, and ranks on the other would emulate
        (ROCM_ALONE, "float32"),
        (NONE, "float32"),
    ],
)
def test_bf16_is_the_default_where_every_gpu_has_it_in_hardware(facts, used):
    assert choose_precision(facts) == used


@pytest.mark.parametrize(
    ("asked", "used"),
    [
        ({"bf16": False}, "float32"),
        ({"bf16": False, "fp16": True}, "fp16"),
        ({"fp16": True}, "fp16"),
        ({"use_cpu": True}, "float32"),
        ({"use_cpu": True, "bf16": True}, "bf16"),
        ({"launcher": "fp16"}, "fp16"),
        ({"launcher": "no"}, "bf16"),  # what accelerate launch says where nobody said anything
        ({"deepspeed": {"bf16": {"enabled": False}}}, "float32"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, "bf16"),
        ({"deepspeed": {"bfloat16": {"enabled": False}}}, "float32"),
        ({"deepspeed": {"fp16": {"enabled": True}}}, "fp16"),
        ({"deepspeed": {"fp16": {"enabled": False}}}, "bf16"),
        ({"deepspeed": {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}}, "bf16"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "bf16"),
    ],
)
def test_what_was_said_of_precision_wins_over_the_device(asked, used):
    assert choose_precision(A100, **asked) == used


def test_a_card_without_bf16_computes_in_it_only_when_asked(tmp_path):
    assert choose_precision(T4, bf16=True) == "bf16"
    assert choose_precision(T4, fp16=True) == "fp16"


@pytest.fixture
def on_gpu(monkeypatch):
    """Lets a configuration believe in a GPU, which no test computes on."""

    def believe(facts: DeviceFacts) -> None:
        monkeypatch.setattr("vlcpt.config.precision.device_facts", lambda: facts)
        monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)

    return believe


@pytest.mark.parametrize(("facts", "bf16"), [(A100, True), (V100, False), (NONE, False)])
def test_the_resolved_configuration_says_what_was_used_and_repeats_it_anywhere(on_gpu, tmp_path, facts, bf16):
    (tmp_path / "train.jsonl").touch()
    on_gpu(facts)
    data = DataConfig(str(tmp_path / "train.jsonl"))
    text = dump_config(Configs(ModelConfig("org/model"), data, CPTConfig(str(tmp_path / "out"))), tmp_path)

    assert yaml.safe_load(text)["bf16"] is bf16
    (tmp_path / "run.yaml").write_text(text)
    for other in (A100, V100):
        on_gpu(other)
        assert load_config(tmp_path / "run.yaml").training.bf16 is bf16


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_a_shipped_deepspeed_config_computes_as_the_run_does(on_gpu, tmp_path, name):
    for facts, expected in ((A100, torch.bfloat16), (V100, torch.float32)):
        on_gpu(facts)
        training = CPTConfig(str(tmp_path), deepspeed=name)

        assert training.hf_deepspeed_config.dtype() == expected
        assert training.bf16 is (expected == torch.bfloat16)


def test_a_deepspeed_config_without_a_precision_takes_that_of_the_run(on_gpu, tmp_path):
    """accelerate would turn bf16 on later, and until then it would be taken for float32."""
    on_gpu(A100)
    given = {"zero_optimization": {"stage": 2}}

    training = CPTConfig(str(tmp_path), deepspeed=given)

    assert training.hf_deepspeed_config.dtype() == torch.bfloat16
    assert training.deepspeed == {"zero_optimization": {"stage": 2}}


def test_a_deepspeed_config_that_says_bf16_need_not_be_said_twice(on_gpu, tmp_path):
    on_gpu(V100)
    (tmp_path / "own.json").write_text(
        json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}})
    )

    training = CPTConfig(str(tmp_path), deepspeed=str(tmp_path / "own.json"))

    assert training.bf16
    assert not training.hf_deepspeed_config.mismatches


def test_bf16_without_a_gpu_is_still_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ValueError, match="doesn't support bf16/gpu"):
        CPTConfig(str(tmp_path), bf16=True)


@pytest.mark.parametrize(
    ("facts", "settings", "said"),
    [
        (V100, {}, "float32 products on Tesla V100, which has no bfloat16 in hardware: slow. fp16: true is"),
        (
            V100,
            {"bf16": True},
            "bf16 on Tesla V100, which has no bfloat16 in hardware: products are emulated",
        ),
        (A100, {}, None),
        (A100, {"bf16": False}, "float32 products on NVIDIA A100: slow. tf32: true rounds"),
        (NONE, {}, None),
    ],
)
def test_slow_products_on_a_gpu_are_said_with_the_way_out(on_gpu, tmp_path, facts, settings, said):
    on_gpu(facts)
    found = slow_products(CPTConfig(str(tmp_path), **settings))

    assert found is None if said is None else found.startswith(said)
    on_cpu = CPTConfig(str(tmp_path), use_cpu=True)
    assert slow_products(on_cpu) is None


@pytest.mark.parametrize(
    ("facts", "dtype", "used"),
    [
        (T4, "auto", "float32"),
        (A100, "auto", "auto"),
        (NONE, "auto", "auto"),
        (T4, "bfloat16", "bfloat16"),
    ],
)
def test_frozen_bfloat16_weights_are_float32_where_bfloat16_is_emulated(
    make_tiny_model, tmp_path, facts, dtype, used
):
    make_tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    config = ModelConfig(str(tmp_path), dtype=dtype)

    assert with_native_dtype(config, emulates_bf16=facts.emulates_bf16).dtype == used
