"""A saved adapter on its base model: exactly its tensors, on the right base, with the towers asked for."""

import logging
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

from huggingface_hub.errors import HfHubHTTPError
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from vlcpt.errors import ConfigError
from vlcpt.model.bases import is_same_base
from vlcpt.model.families import TOWERS, is_embedding, tower_of
from vlcpt.model.finite_weights import first_not_finite, not_finite, weight_files
from vlcpt.model.hub_lookup import only_cached
from vlcpt.model.saved_files import first_few, not_loaded
from vlcpt.model.tuning import finish_tuning

if TYPE_CHECKING:
    from vlcpt.config import ModelConfig

logger = logging.getLogger(__name__)


def load_adapter(model: PreTrainedModel, name_or_path: str, *, is_trainable: bool) -> PeftModel:
    """Put a saved adapter on its base model: exactly the tensors that its configuration asks for.

    ``PeftModel.from_pretrained`` only warns about others, and then trains or merges random ones.
    Another base than the adapter names is only warned of: it may be the same under a new name.

    Raises:
        ValueError: If there is no adapter there, or a tensor is missing, unexpected, of another shape or not
            finite.

    Example:
        >>> from importlib.resources import files
        >>> from tempfile import mkdtemp
        >>> from vlcpt.model.loading import load_base
        >>> from vlcpt.model.tuning import apply_tuning
        >>> base, folder = str(files("vlcpt") / "demo/base"), mkdtemp()
        >>> apply_tuning(load_base(base)).save_pretrained(folder)
        >>> load_adapter(load_base(base), folder, is_trainable=False).active_adapter
        'default'
    """
    config = read_adapter_config(name_or_path)
    try:
        weights = load_peft_weights(name_or_path, device="cpu")
    except (OSError, ValueError, HfHubHTTPError, SafetensorError, UnpicklingError) as error:
        raise ValueError(not_loaded("adapter", name_or_path, error)) from error
    _warn_of_another_base(config, model, name_or_path)
    tuned = new_adapter(model, config, is_trainable=is_trainable)
    expected = get_peft_model_state_dict(tuned)
    wrong = {
        "missing": sorted(expected.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - expected.keys()),
        "of another shape": sorted(
            key for key in expected.keys() & weights.keys() if expected[key].shape != weights[key].shape
        ),
    }
    if any(wrong.values()):
        raise ValueError(
            f"{name_or_path}: the adapter's tensors are not those that its adapter_config.json asks for on "
            f"{model.name_or_path}: {first_few(wrong)}. Use the base model it was trained on, and the "
            "versions of transformers and peft it was saved with, or save it anew."
        )
    if (broken := first_not_finite(weights.items())) is not None:
        held = weight_files(name_or_path, "adapter")
        raise not_finite(held[0] if held else name_or_path, broken)
    set_peft_model_state_dict(tuned, weights)
    return tuned


def read_adapter_config(name_or_path: str) -> PeftConfig:
    """The configuration of a saved adapter.

    Raises:
        ConfigError: If there is none.

    Example:
        >>> read_adapter_config("/none")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: /none: no such folder, and no adapter of this id could be had ...
    """
    cached = only_cached("adapter", name_or_path)
    try:
        return PeftConfig.from_pretrained(name_or_path, local_files_only=cached)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ConfigError(not_loaded("adapter", name_or_path, error)) from error


def new_adapter(model: PreTrainedModel, config: PeftConfig, *, is_trainable: bool) -> PeftModel:
    """An adapter as a saved configuration describes it, its weights not loaded yet.

    Example:
        >>> from importlib.resources import files
        >>> from peft import LoraConfig
        >>> from vlcpt.model.loading import load_base
        >>> model = load_base(str(files("vlcpt") / "demo/base"))
        >>> tuned = new_adapter(model, LoraConfig(target_modules=["q_proj"]), is_trainable=False)
        >>> any(parameter.requires_grad for parameter in tuned.parameters())
        False
    """
    config.inference_mode = not is_trainable
    config.base_model_name_or_path = model.name_or_path  # or peft warns of any other spelling, and does this
    tuned = get_peft_model(model.requires_grad_(False), config)
    assert isinstance(tuned, PeftModel)
    if is_trainable:
        # Before the weights come in: float32 values do not survive a stay in a bfloat16 copy.
        finish_tuning(tuned)
    return tuned


def check_trained_parts(model: nn.Module, config: "ModelConfig") -> None:
    """An adapter brings its own towers and embeddings: the configuration must not say something else.

    Raises:
        ValueError: If it does, with the key to set.

    Example:
        >>> from importlib.resources import files
        >>> from vlcpt.config import ModelConfig
        >>> from vlcpt.model.loading import load_model
        >>> config = ModelConfig(str(files("vlcpt") / "demo/base"), train_merger=True)
        >>> check_trained_parts(load_model(config), config)
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    # A LoRA on an embedding is a layer of the language tower like any other.
    embeddings = [name for name in trained if is_embedding(name) and ".lora_" not in name]
    others = [(name, tower_of(name)) for name in trained if name not in embeddings]
    wanted = {"vision": config.train_vision, "merger": config.train_merger, "language": config.train_language}
    for tower in TOWERS:
        trains = any(owner == tower for _, owner in others)
        if trains != wanted[tower]:
            raise _other_parts(config, f"the {tower} tower", f"train_{tower}", trains)
    # A language tower in full includes its embeddings, whatever train_embeddings says.
    in_full = any(owner == "language" and ".lora_" not in name for name, owner in others)
    if not in_full and bool(embeddings) != config.train_embeddings:
        raise _other_parts(config, "the embeddings in full", "train_embeddings", bool(embeddings))


def _other_parts(config: "ModelConfig", part: str, key: str, trains: bool) -> ValueError:
    return ValueError(
        f"{config.adapter_name_or_path}: the adapter {'trains' if trains else 'does not train'} {part}, but "
        "the configuration says otherwise, and a saved adapter keeps what it trains. "
        f"Set {key}: {str(trains).lower()}."
    )


def _warn_of_another_base(config: PeftConfig, model: PreTrainedModel, name_or_path: str) -> None:
    """Say it where an adapter is put on a base that does not seem to be its own."""
    named, used = config.base_model_name_or_path, model.name_or_path
    if named and used and not is_same_base(named, used, Path(name_or_path)):
        logger.warning(
            "%s was trained on the base model %s, and is used on %s, whose config.json is another or could "
            "not be compared. On another model an adapter gives wrong results; check model_name_or_path.",
            name_or_path,
            named,
            used,
        )
