"""The memory that a run's device needs, told from its configuration, its model's shape and its packs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from peft import PeftModel
from transformers import PreTrainedModel

from vlcpt.config_reading import Configs
from vlcpt.config_trainer import read_deepspeed
from vlcpt.model.adapters import base_model
from vlcpt.model.counting import adapter_of, count_towers
from vlcpt.model.loading import has_sliding_window
from vlcpt.report.activations import Attention
from vlcpt.report.memory import LargestBatch, MemoryEstimate, estimate_memory, shape_of
from vlcpt.report.states import Setup, TowerParameters

# Packs that may need most: so many of the longest, of those with most targets, and with most media.
_CANDIDATES = 20


def foresee(
    configs: Configs, model: PreTrainedModel | PeftModel, packs: np.ndarray, *, devices: int, merge: int
) -> dict[str, MemoryEstimate]:
    """The estimate for the run, and where activation checkpointing is off, also with it.

    Args:
        model: On the meta device, see :func:`vlcpt.model.counting.empty_model`.
        packs: int64 (packs, 3): tokens, targets and pad tokens of each.
        devices: Processes that share the work.
        merge: Patches that make a token.
    """
    setup = _setup(configs, model, devices)
    found = {"as configured": _largest(configs, model, packs, setup, merge)}
    if not setup.checkpointing:
        checkpointed = replace(setup, checkpointing=True)
        found["checkpointing"] = _largest(configs, model, packs, checkpointed, merge)
    return found


def _largest(
    configs: Configs, model: PreTrainedModel | PeftModel, packs: np.ndarray, setup: Setup, merge: int
) -> MemoryEstimate:
    """The estimate of the pack that needs most, in every row of a batch."""
    config = base_model(model).config
    shape = shape_of(config.text_config, config.vision_config)
    counts = count_towers(model, in_4_bits=configs.model.tuning == "qlora")
    towers: dict[str, TowerParameters] = {
        one.tower: TowerParameters(one.how, one.frozen, one.trained, one.packed, one.trained_head)
        for one in counts
    }
    rows = configs.training.per_device_train_batch_size
    tops = np.unique(np.argsort(-packs, axis=0, kind="stable")[:_CANDIDATES])
    estimates = []
    for tokens, targets, pads in packs[tops].tolist():
        batch = LargestBatch(rows, tokens, rows * targets, rows * pads * merge)
        estimates.append(estimate_memory(shape, towers, batch, setup))
    return max(estimates, key=lambda one: one.total)


def _setup(configs: Configs, model: PreTrainedModel | PeftModel, devices: int) -> Setup:
    training, base, adapter = configs.training, base_model(model), adapter_of(model)
    sharding = read_deepspeed(training.deepspeed) or {}
    zero = _section(sharding, "zero_optimization")
    mixed = bool(training.bf16 or training.fp16)
    wanted = configs.model.attn_implementation
    if wanted == "auto" and has_sliding_window(base.config):
        wanted = "sdpa"
    attention: Attention = wanted if wanted == "sdpa" or wanted == "eager" else "documents"
    return Setup(
        weight_bytes=4 if base.get_input_embeddings().weight.dtype.itemsize == 4 else 2,
        autocast=mixed and not sharding,
        checkpointing=bool(training.activation_checkpointing or training.gradient_checkpointing),
        attention=attention,
        masked=bool(training.packing or training.per_device_train_batch_size > 1),
        optimizer=str(training.optim.value if hasattr(training.optim, "value") else training.optim),
        accumulates=training.gradient_accumulation_steps > 1,
        rank=adapter.r if adapter else 0,
        dropout=bool(adapter and adapter.lora_dropout),
        devices=devices,
        stage=int(str(zero.get("stage", 0))) if sharding else None,
        narrow=bool(sharding) and mixed,
        offload_optimizer=_is_offloaded(zero, "offload_optimizer"),
        offload_weights=_is_offloaded(zero, "offload_param"),
        bucket=_number(zero, "reduce_bucket_size", 200_000_000),
        live=_number(zero, "stage3_max_live_parameters", 1_000_000_000),
    )


def _section(config: Mapping[str, object], name: str) -> Mapping[str, object]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _is_offloaded(zero: Mapping[str, object], name: str) -> bool:
    return _section(zero, name).get("device", "none") != "none"


def _number(zero: Mapping[str, object], name: str, default: int) -> int:
    """A number of the DeepSpeed configuration; ``auto`` is DeepSpeed's to choose."""
    found = zero.get(name, default)
    return int(found) if isinstance(found, int | float) else default
