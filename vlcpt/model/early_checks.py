"""What would stop a model from being loaded and tuned, told before data or weights are read."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import set_zero3_state

from vlcpt.errors import ConfigError, wrong_config
from vlcpt.model.adapter_loading import (
    check_adapter_tensors,
    check_trained_parts,
    new_adapter,
    read_adapter_config,
)
from vlcpt.model.adapter_settings import read_adapter_shapes
from vlcpt.model.loading import not_supported_here, read_config, tune
from vlcpt.model.model_settings import check_parameters
from vlcpt.model.saved_files import check_checkpoint, check_files

if TYPE_CHECKING:
    from vlcpt.config import ModelConfig


def check_model(config: "ModelConfig") -> None:
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
        >>> from vlcpt.config import ModelConfig
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
            tune(model, config)
        else:
            tuned = new_adapter(model, read_adapter_config(adapter), is_trainable=True, name_or_path=adapter)
            _check_tensors(tuned, adapter)
            check_trained_parts(tuned, config)


def check_evaluated(config: "ModelConfig", checkpoint: str) -> None:
    """Look for what would keep a checkpoint, or its base, from being loaded after the data is read.

    Raises:
        ConfigError: If there is neither an adapter nor a model in the folder, or something of the base, of
            those that :func:`check_model` tells.

    Example:
        >>> from importlib.resources import files
        >>> from vlcpt.config import ModelConfig
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


def _checked_base(config: "ModelConfig") -> PreTrainedModel:
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
