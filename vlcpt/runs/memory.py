"""The memory that a run needs, from its configuration, its packs and the model's shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

from vlcpt.config.yaml import Configs
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.families import Tower
from vlcpt.model.attention import attention_for
from vlcpt.model.counting import TowerParameters, adapter_shape, count_towers, empty_model
from vlcpt.report.memory import (
    CONTEXT,
    LargestBatch,
    MemoryEstimate,
    Setup,
    estimate_memory,
    shape_of,
)
from vlcpt.training.guards import asked_stage

T = TypeVar("T")

# Packs that may need most: so many of the longest, of those with most targets, and with most media.
_CANDIDATES = 20


def foresee(
    configs: Configs,
    model: PreTrainedModel,
    towers: Mapping[Tower, TowerParameters],
    packs: np.ndarray,
    *,
    devices: int,
    merge: int,
) -> dict[str, MemoryEstimate]:
    """The estimate for the pack that needs most, and where activation checkpointing is off, also with it.

    Args:
        model: On the meta device, see :func:`vlcpt.model.counting.empty_model`.
        towers: What trains of it.
        packs: int64 (packs, 3): tokens, targets and pad tokens of each.
        devices: Processes that share the work.
        merge: Patches that make a token.
    """
    setup = _setup(configs, model, devices)
    ways = {"as configured": setup}
    if not setup.checkpointing:
        ways["checkpointing"] = replace(setup, checkpointing=True)
    return {name: _largest(configs, model, towers, packs, way, merge) for name, way in ways.items()}


def _largest(
    configs: Configs,
    model: PreTrainedModel,
    towers: Mapping[Tower, TowerParameters],
    packs: np.ndarray,
    setup: Setup,
    merge: int,
) -> MemoryEstimate:
    """The estimate for the pack that needs most."""
    shape = shape_of(model.config.text_config, model.config.vision_config)
    rows = configs.training.per_device_train_batch_size
    tops = np.unique(np.argsort(-packs, axis=0, kind="stable")[:_CANDIDATES])
    batches = [
        LargestBatch(rows, tokens, rows * targets, rows * pads * merge)
        for tokens, targets, pads in packs[tops].tolist()
    ]
    estimates = (estimate_memory(shape, towers, one, setup) for one in batches)
    return max(estimates, key=attrgetter("total"))


def _setup(configs: Configs, model: PreTrainedModel, devices: int) -> Setup:
    training = configs.training
    rank, dropout, dora = adapter_shape(configs.model)
    stage = asked_stage(training)

    def zero(key: str, default: T) -> T:
        """A value of the DeepSpeed config; the default too where DeepSpeed is to choose."""
        if stage is None:
            return default
        value: T = training.hf_deepspeed_config.get_value(f"zero_optimization.{key}", default)
        return default if value == "auto" else value

    mixed = bool(training.bf16 or training.fp16)
    return Setup(
        weight_bytes=4 if model.get_input_embeddings().weight.dtype.itemsize == 4 else 2,
        autocast=mixed and stage is None,
        checkpointing=training.recomputes_activations,
        attention=attention_for(model.config, configs.model.attn_implementation),
        masked=bool(training.packing or training.per_device_train_batch_size > 1),
        optimizer=str(training.optim.value if hasattr(training.optim, "value") else training.optim),
        accumulates=training.gradient_accumulation_steps > 1,
        rank=rank,
        dropout=dropout,
        dora=dora,
        loss_chunk=training.loss_chunk,
        devices=devices,
        stage=stage,
        narrow=stage is not None and mixed,
        offload_optimizer=zero("offload_optimizer.device", "none") != "none",
        offload_weights=zero("offload_param.device", "none") != "none",
        bucket=int(zero("reduce_bucket_size", Setup.bucket)),
        overlaps=bool(zero("overlap_comm", False)),  # as DeepSpeed has it
        live=int(zero("stage3_max_live_parameters", Setup.live)),
    )


# Of a GPU's memory: what an estimate is off, what the allocator loses to fragments, and other processes.
ROOM = 0.7


def keeps_activations(
    configs: Configs,
    model: PreTrainedModel,
    towers: Mapping[Tower, TowerParameters],
    dataset: CPTDataset,
    total: int,
    merge: int,
) -> bool:
    """Whether a GPU of ``total`` bytes holds all activations, with room left."""
    needed = _needed(configs, model, towers, dataset, merge, checkpointing=False)
    return needed.total + CONTEXT < ROOM * total


def _needed(
    configs: Configs,
    model: PreTrainedModel,
    towers: Mapping[Tower, TowerParameters],
    dataset: CPTDataset,
    merge: int,
    *,
    checkpointing: bool,
) -> MemoryEstimate:
    """The estimate with activation checkpointing, or with all activations kept."""
    setup = replace(_setup(configs, model, configs.training.world_size), checkpointing=checkpointing)
    return _largest(configs, model, towers, dataset.pack_sizes(), setup, merge)


@dataclass(frozen=True)
class Choice:
    """Whether activations are kept.

    Args:
        said: What was chosen, and why.
        foreseen_gib: What the run will then need of a device, as ``vlcpt check`` estimates it.
    """

    said: str
    foreseen_gib: float


def choose_checkpointing(configs: Configs, dataset: CPTDataset, merge: int) -> Choice | None:
    """Keep activations where they fit, unless the configuration says how: computing them again takes a third
    of a step's time.

    Args:
        configs: Their ``activation_checkpointing`` is set.
        dataset: What is trained on.
        merge: Patches that make a token.

    Returns:
        None where there was nothing to choose.
    """
    training = configs.training
    if not training.chooses_checkpointing or training.device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(training.device).total_memory
    model = empty_model(configs.model)
    towers = count_towers(model, configs.model)
    kept = _needed(configs, model, towers, dataset, merge, checkpointing=False)
    fits = kept.total + CONTEXT < ROOM * total
    training.activation_checkpointing = training.gradient_checkpointing = not fits
    needed = kept if fits else _needed(configs, model, towers, dataset, merge, checkpointing=True)
    said = (
        f"activation checkpointing is {'off' if fits else 'on'}: without it a device needs about "
        f"{kept.total / 2**30:,.1f} of its {total / 2**30:,.0f} GiB, and {ROOM:.0%} is the limit"
    )
    return Choice(said, round(needed.total / 2**30, 3))
