"""The estimate of memory against what autograd really saves, and what a process really holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vlcpt.config.schema import ModelConfig
from vlcpt.model.attention import attend_by_document
from vlcpt.model.counting import TowerParameters
from vlcpt.model.tuning import apply_tuning
from vlcpt.report import memory
from vlcpt.report.memory import (
    LargestBatch,
    ModelShape,
    Setup,
    TowerShape,
    estimate_memory,
    language_layer,
    shape_of,
    vision_layer,
)
from vlcpt.training.loss import target_losses

ROOT = Path(__file__).parents[2]
TOKENS = 256
SIDE = 16  # of an image, in patches, where the vision tower is looked at
TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def config(layers: int, blocks: int) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 1000,
            "hidden_size": 256,
            "intermediate_size": 640,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e4},
            "pad_token_id": 0,
        },
        vision_config={
            "depth": blocks,
            "hidden_size": 160,
            "intermediate_size": 420,
            "num_heads": 4,
            "out_hidden_size": 256,
            "fullatt_block_indexes": [1],
        },
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
    )


def batch(side: int) -> dict[str, object]:
    """Two images of ``side`` × ``side`` patches, and two documents in a row of 256 tokens."""
    ids = torch.randint(10, 1000, (1, TOKENS))
    pads = side**2 // 4
    for start in (1, 67):
        ids[0, start : start + pads + 2] = torch.tensor([7, *[5] * pads, 8])
    labels = torch.where(torch.arange(TOKENS) > 140, ids, -100)
    positions = torch.arange(TOKENS)[None, None].repeat(4, 1, 1)
    positions[0, :, 200:] -= 200
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions,
        "use_cache": False,
        "pixel_values": torch.randn(2 * side**2, 1176),
        "image_grid_thw": torch.tensor([[1, side, side]] * 2),
    }


def saved_bytes(
    layers: int, blocks: int, dtype: str, autocast: bool, attention: str, side: int, **tuning: object
) -> int:
    """What autograd keeps in one forward pass, each storage once, parameters apart."""
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config(layers, blocks)).to(TYPES[dtype])
    if attention == "documents":
        attend_by_document(model)
    else:
        model.set_attn_implementation(attention)
    model = apply_tuning(model, ModelConfig("base", **tuning)).train()
    own = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        loss = target_losses(model, batch(side)).nll.sum()
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


SHAPE = shape_of(config(1, 1).text_config, config(1, 1).vision_config)
HOWS = {
    "lora": {"tuning": "lora"},
    "full": {"tuning": "full"},
    "frozen": {"tuning": "full", "train_language": False, "train_merger": True},
}


@pytest.mark.parametrize("attention", ["documents", "sdpa", "eager"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("how", ["lora", "full", "frozen"])
def test_a_decoder_layer_keeps_what_the_formula_says(
    how: str, dtype: str, autocast: bool, attention: str
) -> None:
    one, two = (saved_bytes(layers, 1, dtype, autocast, attention, 4, **HOWS[how]) for layers in (1, 2))
    setup = Setup(weight_bytes=TYPES[dtype].itemsize, autocast=autocast, attention=attention, rank=16)
    expected = language_layer(SHAPE.language, how, setup, TOKENS)

    assert expected == pytest.approx(two - one, rel=0.001)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("how", ["lora", "full"])
def test_a_trained_vision_block_keeps_what_the_formula_says(how: str, dtype: str, autocast: bool) -> None:
    two, three = (
        saved_bytes(1, blocks, dtype, autocast, "sdpa", SIDE, tuning=how, train_vision=True)
        for blocks in (2, 3)
    )
    setup = Setup(weight_bytes=TYPES[dtype].itemsize, autocast=autocast, rank=16)
    expected = vision_layer(SHAPE.vision, how, setup, 2 * SIDE**2)

    assert expected == pytest.approx(three - two, rel=0.001)


def test_a_frozen_vision_tower_keeps_nothing() -> None:
    two, three = (saved_bytes(1, blocks, "bfloat16", False, "sdpa", SIDE, tuning="lora") for blocks in (2, 3))

    assert two == three
    assert vision_layer(SHAPE.vision, "frozen", Setup(), 2 * SIDE**2) == 0


# Without the instructions a product of bfloat16 takes minutes, and these cases have no end.
in_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no fast bfloat16"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(3, id="lora with checkpointing, float32"),
        pytest.param(9, id="full with checkpointing, float32"),
        pytest.param(2, id="lora with checkpointing, bfloat16", marks=in_bfloat16),
        pytest.param(8, id="full with checkpointing, bfloat16", marks=in_bfloat16),
    ],
)
def test_the_estimate_is_within_a_seventh_of_a_processs_real_peak(case: int) -> None:
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, str(ROOT / "benchmarks/memory.py"), "--case", str(case)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)

    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["peak"] > 500 * 2**20
    assert abs(found["off"]) < 0.15


@pytest.fixture(scope="module")
def large() -> Iterator[str]:
    """A folder for a gigabyte, which does not stay as pytest's own do."""
    with TemporaryDirectory() as folder:
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "qlora"])
def test_a_step_of_the_3bs_widths_takes_the_memory_that_is_foreseen(tuning: str, large: str) -> None:
    """With its vocabulary, but one layer and two vision blocks; benchmarks/real_shapes.py has all of them.

    The second case finds the base that the first has made.
    """
    command = [sys.executable, str(ROOT / "benchmarks/real_shapes.py"), "--tuning", tuning]
    command += ["--layers", "1", "--blocks", "2", "--folder", large]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    assert run.returncode == 0, run.stderr
    found = json.loads(run.stderr.splitlines()[-1])
    assert found["parameters"] > 450_000_000
    assert found["tokens"] == 256
    assert found["parts"]["weights"] > 2**30
    assert abs(found["off"]) < 0.15


# What grows with what

FROZEN = TowerParameters("frozen", 10_000_000, 0)
FULL = {"vision": FROZEN, "merger": FROZEN, "language": TowerParameters("full", 0, 100_000_000)}
LORA = {"vision": FROZEN, "merger": FROZEN, "language": TowerParameters("lora", 100_000_000, 1_000_000)}
TOWER = TowerShape(12, 768, 2048, 12, 768, 4 * 768**2 + 3 * 768 * 2048)
MODEL = ModelShape(TOWER, TOWER, vocabulary=32_000, patch=1176)
BATCH = LargestBatch(1, 2048, 1000, 1024)


def total(towers: dict[str, TowerParameters], batch: LargestBatch = BATCH, **setup: object) -> int:
    return estimate_memory(MODEL, towers, batch, Setup(**setup)).total


def test_adamw_without_deepspeed_takes_sixteen_bytes_a_trained_parameter() -> None:
    found = estimate_memory(MODEL, FULL, LargestBatch(1, 8, 4, 0), Setup())

    assert found.moment == "stepping"
    assert found.weights == 4 * 100_000_000 + 2 * 20_000_000
    assert (found.gradients, found.optimizer) == (400_000_000, 800_000_000)


def test_each_stage_shards_one_thing_more() -> None:
    few = LargestBatch(1, 8, 4, 0)
    setup = {"devices": 8, "narrow": True, "bucket": 1_000_000, "live": 1_000_000}
    by_stage = [total(FULL, few, stage=stage, **setup) for stage in (1, 2, 3)]

    assert total(FULL, few, devices=8) > by_stage[0] > by_stage[1] > by_stage[2]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_devices_never_need_more_each(stage: int) -> None:
    needs = [total(FULL, devices=devices, stage=stage, narrow=True) for devices in (1, 2, 8, 64)]

    assert needs == sorted(needs, reverse=True)
    assert needs[0] > needs[-1]


def test_what_is_offloaded_leaves_the_device_for_the_host() -> None:
    setup = {"devices": 2, "stage": 2, "narrow": True}
    here = estimate_memory(MODEL, FULL, BATCH, Setup(**setup))
    there = estimate_memory(MODEL, FULL, BATCH, Setup(**setup, offload_optimizer=True))

    assert (here.host, there.optimizer) == (0, 0)
    assert there.host == 50_000_000 * 16
    assert there.total < here.total


def test_checkpointing_keeps_less() -> None:
    assert total(LORA, checkpointing=True) < 0.7 * total(LORA, checkpointing=False)


def test_four_bits_take_a_quarter_of_two_bytes_and_their_scales() -> None:
    packed = {**LORA, "language": TowerParameters("lora", 100_000_000, 0, packed=100_000_000)}
    plain = {**LORA, "language": TowerParameters("lora", 100_000_000, 0)}
    saved = memory.weight_bytes(plain, Setup())[0] - memory.weight_bytes(packed, Setup())[0]

    assert saved == pytest.approx(100_000_000 * (2 - 0.516), rel=0.001)


@pytest.mark.parametrize(
    ("name", "bytes_each"), [("adamw_torch_fused", 8), ("adamw_bnb_8bit", 2.1), ("lion_32bit", 4), ("sgd", 0)]
)
def test_the_optimizers_name_decides_its_state(name: str, bytes_each: float) -> None:
    assert memory.optimizer_bytes(1_000_000, Setup(optimizer=name)) == bytes_each * 1_000_000


@pytest.mark.parametrize(("chunk", "bytes_a_target"), [(0, 12 * 32_000), (128, 2 * 768 * 2)])
def test_only_without_chunks_logits_grow_with_the_targets(chunk: int, bytes_a_target: int) -> None:
    few, many = (
        estimate_memory(
            MODEL, LORA, LargestBatch(1, 2048, targets, 0), Setup(checkpointing=False, loss_chunk=chunk)
        )
        for targets in (500, 1500)
    )

    assert many.logits - few.logits == 1000 * bytes_a_target


def test_gradients_that_wait_for_the_next_batch_add_to_activations() -> None:
    waits, goes = (total(FULL, checkpointing=False, accumulates=one) for one in (True, False))

    assert waits - goes == 400_000_000


def test_packs_keep_a_mask_a_layer_unless_attention_is_by_documents() -> None:
    setups = [Setup(checkpointing=False, attention=one) for one in ("sdpa", "documents")]
    sdpa, documents = (estimate_memory(MODEL, LORA, BATCH, setup).activations for setup in setups)

    assert sdpa - documents >= 12 * 2048 * 2048 * 2
