"""What a configuration trains, counted without loading a weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from vlcpt.errors import wrong_config
from vlcpt.model.adapter_loading import new_adapter, read_adapter_config
from vlcpt.model.adapters import base_model, is_tied
from vlcpt.model.early_checks import bare_model
from vlcpt.model.families import TOWERS, Tower, family_of, is_embedding, tower_of
from vlcpt.model.loading import read_config, resolve_dtype, tune

if TYPE_CHECKING:
    from vlcpt.config import ModelConfig


@dataclass(frozen=True)
class TowerCount:
    """Parameters of a tower.

    Args:
        how: How its blocks train.
        frozen: Those that do not train.
        trained: Those that do: its own, copies of them, or its adapters'.
        packed: Of the frozen ones, those held in 4 bits.
        trained_head: Of the trained ones, those of the output layer.
    """

    tower: Tower
    how: Literal["frozen", "lora", "full"]
    frozen: int
    trained: int
    packed: int
    trained_head: int


def empty_model(config: ModelConfig) -> PreTrainedModel | PeftModel:
    """The model as ``load_model`` gives it, but without a weight, on the meta device.

    ``qlora`` is not packed, and an adapter to go on with is taken for a new one of its configuration.

    Raises:
        ConfigError: As ``load_model`` does, for what can be told without weights.

    Example:
        >>> from vlcpt.config import ModelConfig
        >>> from vlcpt.demo import base_path
        >>> empty_model(ModelConfig(base_path(), lora_r=4)).device.type
        'meta'
    """
    found = read_config(config.model_name_or_path)
    dtype = resolve_dtype(config.dtype, found)
    with torch.device("meta"), wrong_config():
        # The weights are the same for all, and flash attention is refused where its package is missing.
        model = bare_model(found, "sdpa")
        nn.Module.to(model, dtype)  # transformers hides the type of its own
        if config.adapter_name_or_path is None:
            return tune(model, config)
        return new_adapter(model, read_adapter_config(config.adapter_name_or_path), is_trainable=True)


def count_towers(model: nn.Module, *, in_4_bits: bool = False) -> list[TowerCount]:
    """Parameters of each tower: trained, frozen and, where ``in_4_bits``, packed.

    Example:
        >>> from vlcpt.config import ModelConfig
        >>> from vlcpt.demo import base_path
        >>> counts = count_towers(empty_model(ModelConfig(base_path(), lora_r=4)))
        >>> [(count.tower, count.how) for count in counts]
        [('vision', 'frozen'), ('merger', 'frozen'), ('language', 'lora')]
    """
    packed = {id(weight) for weight in _packed_weights(model)} if in_4_bits else set()
    return [_count(model, tower, packed) for tower in TOWERS]


def _count(model: nn.Module, tower: Tower, packed: set[int]) -> TowerCount:
    own = [(name, one) for name, one in model.named_parameters() if tower_of(name) == tower]
    trained = [(name, one) for name, one in own if one.requires_grad]
    has_adapter = any(".lora_" in name for name, _ in trained)
    in_full = any(".lora_" not in name and not is_embedding(name) for name, _ in trained)
    frozen = [one for _, one in own if not one.requires_grad]
    return TowerCount(
        tower=tower,
        how="lora" if has_adapter else "full" if in_full else "frozen",
        frozen=sum(one.numel() for one in frozen),
        trained=sum(one.numel() for _, one in trained),
        packed=sum(one.numel() for one in frozen if id(one) in packed),
        trained_head=sum(one.numel() for name, one in trained if _is_head(model, name)),
    )


def _packed_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """The matrices that ``qlora`` holds in 4 bits: the language tower's, without the output layer."""
    for name, module in base_model(model).named_modules():
        is_own = isinstance(module, nn.Linear) and ".lora_" not in name
        if is_own and tower_of(name) == "language" and not is_embedding(f"{name}.weight"):
            yield module.weight


def _is_head(model: nn.Module, name: str) -> bool:
    """Whether a trained parameter makes the logits: the output layer, or embeddings tied to it."""
    if not is_embedding(name):
        return False
    # The tensors are asked, and not the configuration: as published it says for the whole model whether they
    # are tied, as this transformers saves it also for the text part, and a copy that trains may differ.
    base = base_model(model)
    return "lm_head" in name or is_tied(base, family_of(base.config.model_type))


def adapter_of(model: nn.Module) -> LoraConfig | None:
    """The configuration of the model's adapter, if it has one."""
    if not isinstance(model, PeftModel):
        return None
    config = model.peft_config[model.active_adapter]
    assert isinstance(config, LoraConfig)
    return config
