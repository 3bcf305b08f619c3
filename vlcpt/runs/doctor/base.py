"""The model that doctor examines: the run's base, or one of its width with few layers and random weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from vlcpt.config.schema import ModelConfig
from vlcpt.file_writes import free_bytes
from vlcpt.model.counting import count_towers, empty_model
from vlcpt.model.loading import read_config, resolve_dtype
from vlcpt.model.weights import weight_files

SMALL = 100_000_000  # parameters that --quick has time for
_SHARE = 0.5  # of the memory that comparing may take
_FEW, _FEWEST = 4, 2  # layers of each tower where not all fit


@dataclass(frozen=True)
class Base:
    """What stands for the run's base.

    Args:
        folder: Where it is loaded from.
        weights: Whether they are the base's own.
        layers: Those of the language model and of the vision tower.
        all_layers: What the run's base has of them.
        parameters: In all.
    """

    folder: str
    weights: str
    layers: tuple[int, int]
    all_layers: tuple[int, int]
    parameters: int

    @property
    def has_all_layers(self) -> bool:
        """Whether it has all layers."""
        return self.layers == self.all_layers


def prepare_base(
    config: ModelConfig, processor: ProcessorMixin, folder: Path, device: torch.device, *, quick: bool
) -> Base:
    """The base itself where it is here and small enough; else one with random weights, written to a folder.

    Args:
        folder: For what is written.
        device: Where it will be examined, which says how much fits.
    """
    found = read_config(config.model_name_or_path)
    parameters, trained = _sizes(config)
    layers = _layers(found)
    if not _fits(parameters, trained, device, folder, quick=quick):
        few = _FEWEST if quick else _FEW
        found = with_few_layers(found, few)
    elif weight_files(config.model_name_or_path, getattr(found, "_commit_hash", None)):
        return Base(config.model_name_or_path, "its own", layers, layers, parameters)
    made = folder / "base"
    model = _random(found, resolve_dtype(config.dtype, found))
    model.save_pretrained(made)
    processor.save_pretrained(made)
    count = sum(one.numel() for one in model.parameters())
    return Base(str(made), "random", _layers(found), layers, count)


def with_few_layers(found: PreTrainedConfig, count: int) -> PreTrainedConfig:
    """A copy of a model's configuration with at most so many layers of each tower, at full width.

    The last vision block attends to whole images, those before it to windows, as in the model.

    Example:
        >>> from vlcpt.demo import base_path
        >>> few = with_few_layers(read_config(base_path()), 2)
        >>> few.text_config.num_hidden_layers, few.vision_config.depth
        (2, 2)
    """
    few = copy.deepcopy(found)
    text, vision = few.get_text_config(), few.vision_config
    text.num_hidden_layers = min(count, text.num_hidden_layers)
    if text.layer_types:
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    vision.depth = min(count, vision.depth)
    vision.fullatt_block_indexes = [vision.depth - 1]
    return few


def _layers(found: PreTrainedConfig) -> tuple[int, int]:
    return found.get_text_config().num_hidden_layers, found.vision_config.depth


def _sizes(config: ModelConfig) -> tuple[int, int]:
    """Parameters in all, and those that train."""
    towers = count_towers(empty_model(config), config).values()
    return sum(one.frozen + one.trained for one in towers), sum(one.trained for one in towers)


def _fits(parameters: int, trained: int, device: torch.device, folder: Path, *, quick: bool) -> bool:
    """Whether all of it can be compared with itself in float32, trained and saved."""
    if quick and parameters > SMALL:
        return False
    held = 4 * parameters + 12 * trained  # float32 weights; gradients and AdamW's state of what trains
    return held < _SHARE * _memory(device) and 12 * trained < _SHARE * free_bytes(folder)


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # no Linux: small models only
        return 8 * 2**30
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _random(found: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model with weights as a new one has them, the same on every machine."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(found, dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    return model
