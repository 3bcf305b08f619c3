"""Whether a model's ``config.json`` can be that of its weights: looked at before memory is taken for it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig
from transformers.modeling_utils import set_zero3_state

from vlcpt.errors import ConfigError, wrong_config
from vlcpt.model.finite_weights import weight_files
from vlcpt.model.tensor_files import UNREADABLE, numbers_in, read_json, read_shapes

# A configuration makes lists as long as there are layers, and a model an object for each.
_MAX_LAYERS = 1_000
_LAYERS = ("num_hidden_layers", "depth", "num_layers", "n_layer")
# Above every size and token number that there is; below what a product of two of them can overflow.
_MAX_SIZE = 2**31


def check_config_file(path: Path) -> None:
    """Refuse a ``config.json`` that is none, or has sizes that no model has.

    Raises:
        ConfigError: With the file, the key, what was found and what to do.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp(), "config.json")
        >>> _ = path.write_text('{"text_config": {"num_hidden_layers": 1000000000}}')
        >>> check_config_file(path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: .../config.json: text_config.num_hidden_layers is 1000000000, ...
    """
    with wrong_config():
        found = read_json(path)
    for key, value in _entries(found):
        name = key.rpartition(".")[2]
        most = _MAX_LAYERS if name in _LAYERS else _MAX_SIZE
        if isinstance(value, int) and abs(value) > most:
            raise ConfigError(
                f"{path}: {key} is {str(value)[:40]}, and at most {most:,} can be. Get the file again from "
                "where the model is published."
            )
        if name in ("dtype", "torch_dtype") and value is not None and not _is_dtype(value):
            raise ConfigError(
                f"{path}: {key} is {str(value)[:40]!r}, and must be float32, bfloat16 or float16. Correct it."
            )


def check_parameters(found: PreTrainedConfig, name_or_path: str, *, times: int = 2) -> None:
    """Refuse a configuration whose model has far more parameters than the files of its weights hold.

    ``from_pretrained`` makes up what is missing, of whatever size. A model that is not on this machine yet is
    not looked at.

    Args:
        found: The configuration.
        name_or_path: Where it is from.
        times: How many times as many parameters are let through; 1 where nothing loads them afterwards.

    Raises:
        ConfigError: If no model can be made of the configuration, or one that is too large.
        ValueError: If a file of weights is cut or damaged.

    Example:
        >>> from vlcpt.demo import base_path
        >>> from vlcpt.model.loading import read_config
        >>> check_parameters(read_config(base_path()), base_path())
    """
    files = weight_files(name_or_path, "model", getattr(found, "_commit_hash", None))
    if not files:
        return
    held = sum(numbers_in(read_shapes(file)) for file in files)
    bare = copy.deepcopy(found)
    if getattr(bare, "quantization_config", None) is not None:
        held = 8 * sum(file.stat().st_size for file in files)  # several numbers share a byte
        del bare.quantization_config
    bare._attn_implementation = "sdpa"
    config = f"{name_or_path}/config.json" if Path(name_or_path).is_dir() else f"{name_or_path}: config.json"
    try:
        # As if DeepSpeed stage 3 were at work already: else it partitions this model too, among the ranks.
        with torch.device("meta"), set_zero3_state():
            model = AutoModelForImageTextToText.from_config(bare)
            needed = sum(one.numel() for one in model.parameters())
    except UNREADABLE as error:
        raise ConfigError(
            f"{config} describes a model that cannot be made ({type(error).__name__}). Get the file again "
            "from where the model is published."
        ) from error
    # A tensor that is missing is named where it is loaded; here is what would fill memory.
    if needed > times * held:
        raise ConfigError(
            f"{config} describes a model of {needed:,} parameters, but its weights hold {held:,}. Get both "
            "again from where the model is published."
        )


def _entries(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Each value that is no mapping, with the path of keys to it; lists by what is in them."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield from _entries(one, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for one in value:
            yield from _entries(one, key)
    else:
        yield key, value


def _is_dtype(value: object) -> bool:
    return isinstance(value, str) and isinstance(
        getattr(torch, value.removeprefix("torch."), None), torch.dtype
    )
