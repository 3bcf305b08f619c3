"""What a configuration trains, and what would stop it, told without loading a weight."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import set_zero3_state

from vlcpt.errors import ConfigError, wrong_config
from vlcpt.model.adapters import (
    check_adapter_tensors,
    check_trained_parts,
    new_adapter,
    read_adapter_config,
    read_adapter_shapes,
)
from vlcpt.model.base import check_parameters
from vlcpt.model.loading import not_supported_here, read_config
from vlcpt.model.weights import check_checkpoint, check_files

if TYPE_CHECKING:
    from vlcpt.config.schema import ModelConfig
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from peft import LoraConfig
from torch import nn

from vlcpt.data.families import TOWERS, Tower, family_of, is_embedding, tower_of
from vlcpt.model.loading import resolve_dtype
from vlcpt.model.tuning import apply_tuning, base_model, is_tied


def check_model(config: ModelConfig) -> None:
    """Load and tune the model without its weights, to find what would fail after the data is read.

    Layers are those of the model itself, without any numbers (on PyTorch's meta device): a second or two
    also for the largest. Of folders it is checked that their files are there. From the Hub only
    configurations are fetched.

    Raises:
        ConfigError: If the model or the adapter is not there, or of another family; if towers, layer names
            or attention are refused; if the adapter trains something else than ``config`` says. The
            messages are those of :func:`vlcpt.model.loading.load_model`.

    Example:
        >>> from importlib.resources import files
        >>> from vlcpt.config.schema import ModelConfig
        >>> base = str(files("vlcpt") / "demo/base")
        >>> check_model(ModelConfig(base, lora_target_modules=("q_porj",)))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: lora_target_modules names 'q_porj', which matches no layer of language, ...
    """
    adapter = config.adapter_name_or_path
    if adapter is not None and Path(adapter).is_dir():
        check_files("adapter", adapter)
    model = _checked_base(config)
    with torch.device("meta"), wrong_config():
        if adapter is None:
            apply_tuning(model, config)
        else:
            tuned = new_adapter(model, read_adapter_config(adapter), is_trainable=True, name_or_path=adapter)
            _check_tensors(tuned, adapter)
            check_trained_parts(tuned, config)


def check_evaluated(config: ModelConfig, checkpoint: str) -> None:
    """Look for what would keep a checkpoint, or its base, from being loaded after the data is read.

    Raises:
        ConfigError: If there is neither an adapter nor a model in the folder, or something of the base, of
            those that :func:`check_model` tells.

    Example:
        >>> from importlib.resources import files
        >>> from vlcpt.config.schema import ModelConfig
        >>> base = str(files("vlcpt") / "demo/base")
        >>> check_evaluated(ModelConfig(base), checkpoint=base)
    """
    if check_checkpoint(checkpoint) == "model":
        _checked_model(read_config(checkpoint), checkpoint, config.attn_implementation)
        _checked_base(config)
        return
    adapter = read_adapter_config(checkpoint)
    model = _checked_base(config)
    with torch.device("meta"), wrong_config():
        tuned = new_adapter(model, adapter, is_trainable=False, name_or_path=checkpoint)
        _check_tensors(tuned, checkpoint)


def _check_tensors(tuned: PeftModel, adapter: str) -> None:
    """Compare an adapter without numbers with the header of its file, where that is a folder's."""
    if Path(adapter).is_dir():
        check_adapter_tensors(tuned, adapter, read_adapter_shapes(Path(adapter)))


def _checked_base(config: ModelConfig) -> PreTrainedModel:
    """The model that training starts from, without weights."""
    found = read_config(config.model_name_or_path)
    if Path(config.model_name_or_path).is_dir():
        check_files("model", config.model_name_or_path)
    return _checked_model(found, config.model_name_or_path, config.attn_implementation)


def _checked_model(found: PreTrainedConfig, name_or_path: str, attn_implementation: str) -> PreTrainedModel:
    with wrong_config():
        check_parameters(found, name_or_path)
    with torch.device("meta"):
        try:
            return bare_model(found, attn_implementation)
        except (ImportError, ValueError) as error:
            raise ConfigError(not_supported_here(name_or_path, attn_implementation, error)) from error


def bare_model(found: PreTrainedConfig, attn_implementation: str) -> PreTrainedModel:
    """The model that a configuration describes, to be made inside ``torch.device("meta")``.

    Example:
        >>> from importlib.resources import files
        >>> with torch.device("meta"):
        ...     bare_model(read_config(str(files("vlcpt") / "demo/base")), "auto").device.type
        'meta'
    """
    if attn_implementation != "auto":
        found._attn_implementation = attn_implementation
    # As if DeepSpeed stage 3 were at work already: else it partitions this model too, among the ranks.
    with set_zero3_state():
        model = AutoModelForImageTextToText.from_config(found)
    assert isinstance(model, PreTrainedModel)
    return model


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
        >>> from vlcpt.config.schema import ModelConfig
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
            return apply_tuning(model, config)
        return new_adapter(model, read_adapter_config(config.adapter_name_or_path), is_trainable=True)


def count_towers(model: nn.Module, *, in_4_bits: bool = False) -> list[TowerCount]:
    """Parameters of each tower: trained, frozen and, where ``in_4_bits``, packed.

    Example:
        >>> from vlcpt.config.schema import ModelConfig
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
