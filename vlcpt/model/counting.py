"""Parameters of each tower as training would hold them, counted without a weight and without peft."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn
from transformers import PreTrainedModel

from vlcpt.data.families import TOWERS, Tower, base_name, is_embedding, tower_of
from vlcpt.errors import wrong_config
from vlcpt.model.adapters import adapter_folder, read_adapter_settings, read_adapter_shapes
from vlcpt.model.base import bare_model
from vlcpt.model.loading import read_config, resolve_dtype
from vlcpt.model.saved import CONFIGS
from vlcpt.model.tuning import adapted_layers, apply_tuning, copied_modules, is_tied

if TYPE_CHECKING:
    from vlcpt.config.schema import ModelConfig


@dataclass(frozen=True)
class TowerParameters:
    """Parameters of a tower.

    Args:
        how: How it trains.
        frozen: Those that do not train.
        trained: Those that do: its own, copies of them, or its adapters'.
        packed: The frozen ones that are held in 4 bits.
        trained_head: The trained ones of the output layer.
    """

    how: Literal["frozen", "lora", "full"]
    frozen: int
    trained: int
    packed: int = 0
    trained_head: int = 0


def empty_model(config: ModelConfig) -> PreTrainedModel:
    """The model that training starts from in its type, without a weight and before anything is tuned.

    Raises:
        ConfigError: As ``load_model`` does, for what shows without weights.

    Example:
        >>> from vlcpt.config.schema import ModelConfig
        >>> from vlcpt.demo import base_path
        >>> empty_model(ModelConfig(base_path(), dtype="bfloat16")).dtype
        torch.bfloat16
    """
    found = read_config(config.model_name_or_path)
    # Attention makes no parameters, and flash attention is refused where its package is missing.
    model = bare_model(found)
    nn.Module.to(model, resolve_dtype(config.dtype, found))  # transformers hides the type of its own
    return model


def count_towers(model: PreTrainedModel, config: ModelConfig) -> dict[Tower, TowerParameters]:
    """Parameters of each tower as training would hold them, counted without peft, which takes long to import.

    Args:
        model: The base, on the meta device.
        config: What trains of it, and how.

    Raises:
        ConfigError: For layers that cannot be adapted, or a saved adapter that cannot be read.

    Example:
        >>> from vlcpt.config.schema import ModelConfig
        >>> from vlcpt.demo import base_path
        >>> config = ModelConfig(base_path(), lora_r=4)
        >>> {tower: found.how for tower, found in count_towers(empty_model(config), config).items()}
        {'vision': 'frozen', 'merger': 'frozen', 'language': 'lora'}
    """
    if config.tuning == "full":
        apply_tuning(model, config)
    else:
        model.requires_grad_(False)
    frozen = [(name, one.numel()) for name, one in model.named_parameters() if not one.requires_grad]
    trained = [(name, one.numel()) for name, one in model.named_parameters() if one.requires_grad]
    with wrong_config():
        trained += _added_parameters(model, config)
    linear = {f"{name}.weight" for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    tied = is_tied(model)
    counts: dict[Tower, TowerParameters] = {}
    for tower in TOWERS:
        held = [(name, count) for name, count in frozen if tower_of(name) == tower]
        learnt = [(name, count) for name, count in trained if tower_of(name) == tower]
        has_adapter = any(".lora_" in name for name, _ in learnt)
        in_full = any(".lora_" not in name and not is_embedding(name) for name, _ in learnt)
        is_packed = config.tuning == "qlora" and tower == "language"
        counts[tower] = TowerParameters(
            how="lora" if has_adapter else "full" if in_full else "frozen",
            frozen=sum(count for _, count in held),
            trained=sum(count for _, count in learnt),
            packed=sum(n for name, n in held if is_packed and name in linear and not is_embedding(name)),
            # The output layer makes the logits, or the embeddings that are tied to it.
            trained_head=sum(n for name, n in learnt if is_embedding(name) and (tied or "lm_head" in name)),
        )
    return counts


def _added_parameters(model: PreTrainedModel, config: ModelConfig) -> Iterator[tuple[str, int]]:
    """Names and numbers of what peft puts beside the base: adapters, and copies of what trains in full."""
    if config.tuning == "full":
        return
    if config.adapter_name_or_path is not None:
        for name, shape in read_adapter_shapes(adapter_folder(config.adapter_name_or_path)).items():
            is_head = base_name(name).startswith("lm_head.") and ".lora_" not in name
            if not (is_head and is_tied(model)):  # saved twice, and held once
                yield name, math.prod(shape)
        return
    pattern = re.compile(adapted_layers(model, config))
    for path, module in model.named_modules():
        if pattern.fullmatch(path):
            rows, columns = module.get_parameter("weight").shape
            magnitudes = rows if isinstance(module, nn.Linear) else columns
            yield f"{path}.lora_A", config.lora_r * (rows + columns) + config.use_dora * magnitudes
    copied = {
        parameter: f"{path}.{name}"
        for path in copied_modules(model, config)
        for name, parameter in model.get_submodule(path).named_parameters()
    }
    for parameter, name in copied.items():
        yield name, parameter.numel()


def adapter_shape(config: ModelConfig) -> tuple[int, bool, bool]:
    """The rank of a run's adapters, whether they drop some of their input, and whether they are DoRA's.

    The rank is 0 without adapters.

    Example:
        >>> from vlcpt.config.schema import ModelConfig
        >>> adapter_shape(ModelConfig("base", lora_r=4)), adapter_shape(ModelConfig("base", tuning="full"))
        ((4, False, False), (0, False, False))
    """
    if config.tuning == "full":
        return 0, False, False
    if config.adapter_name_or_path is None:
        return config.lora_r, config.lora_dropout > 0, config.use_dora
    saved = read_adapter_settings(adapter_folder(config.adapter_name_or_path) / CONFIGS["adapter"])
    return saved.r, saved.lora_dropout > 0, bool(saved.use_dora)
