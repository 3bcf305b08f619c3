"""A saved adapter on its base model: exactly its tensors, on the right base, with the towers asked for."""

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_utils import set_zero3_state
from transformers.utils import cached_file

from vlcpt.errors import ConfigError
from vlcpt.model.adapter_settings import check_adapter_settings, read_adapter_shapes
from vlcpt.model.bases import is_same_base
from vlcpt.model.families import TOWERS, is_embedding, tower_of
from vlcpt.model.finite_weights import first_not_finite, not_finite, weight_files
from vlcpt.model.hub_lookup import only_cached
from vlcpt.model.saved_files import CONFIGS, WEIGHTS, first_few, not_loaded, without_advice
from vlcpt.model.tensor_files import UNREADABLE, Shapes
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
        # For an adapter on the Hub this also fetches it, so that its header can be looked at.
        weights = load_peft_weights(name_or_path, device="cpu") if _local(name_or_path) is None else None
        if (folder := _local(name_or_path)) is not None:
            # Before a layer is made: of what a forged rank would take, no memory can be had.
            check_adapter_tensors(
                skeleton(model, config, name_or_path), name_or_path, read_adapter_shapes(folder)
            )
        if weights is None:
            weights = load_peft_weights(name_or_path, device="cpu")
    except (HfHubHTTPError, SafetensorError, *UNREADABLE) as error:
        if isinstance(error, ValueError) and str(error).startswith(name_or_path):
            raise
        raise ValueError(not_loaded("adapter", name_or_path, error)) from error
    _warn_of_another_base(config, model, name_or_path)
    tuned = new_adapter(model, config, is_trainable=is_trainable, name_or_path=name_or_path)
    check_adapter_tensors(tuned, name_or_path, {key: tuple(one.shape) for key, one in weights.items()})
    if (broken := first_not_finite(weights.items())) is not None:
        held = weight_files(name_or_path, "adapter")
        raise not_finite(held[0] if held else name_or_path, broken)
    set_peft_model_state_dict(tuned, weights)
    return tuned


def skeleton(model: PreTrainedModel, config: PeftConfig, name_or_path: str = "the adapter") -> PeftModel:
    """The same adapter on the same model, without any numbers: its layers and their shapes.

    Example:
        >>> from importlib.resources import files
        >>> from peft import LoraConfig
        >>> from vlcpt.model.loading import load_base
        >>> model = load_base(str(files("vlcpt") / "demo/base"))
        >>> skeleton(model, LoraConfig(r=50_000, target_modules=["q_proj"])).device.type
        'meta'
    """
    bare = copy.deepcopy(model.config)
    vars(bare).pop("quantization_config", None)  # ranks and widths are those of the whole numbers
    bare._attn_implementation = "sdpa"
    # As if DeepSpeed stage 3 were at work already: else it partitions this model too, among the ranks.
    with torch.device("meta"), set_zero3_state():
        empty = AutoModelForImageTextToText.from_config(bare)
        assert isinstance(empty, PreTrainedModel)
        empty.name_or_path = model.name_or_path
        return new_adapter(empty, copy.deepcopy(config), is_trainable=False, name_or_path=name_or_path)


def check_adapter_tensors(tuned: PeftModel, name_or_path: str, found: Shapes | None) -> None:
    """Compare saved tensors with those that the adapter's configuration asks for on this model.

    Args:
        tuned: The adapter, with numbers or without.
        name_or_path: Where it was saved.
        found: The saved shapes; None: they are not known yet.

    Raises:
        ValueError: If a tensor is missing, unexpected or of another shape.
    """
    if found is None:
        return
    expected = {key: tuple(one.shape) for key, one in get_peft_model_state_dict(tuned).items()}
    wrong = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": sorted(
            key for key in expected.keys() & found.keys() if expected[key] != tuple(found[key])
        ),
    }
    if any(wrong.values()):
        raise ValueError(
            f"{name_or_path}: the adapter's tensors are not those that its adapter_config.json asks for on "
            f"{tuned.get_base_model().name_or_path}: {first_few(wrong)}. Use the base model it was trained "
            "on, and the versions of transformers and peft it was saved with, or save it anew."
        )


def _local(name_or_path: str) -> Path | None:
    """The folder of a saved adapter with weights, itself or in the Hub's cache; None before it is fetched."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        found = [try_to_load_from_cache(name_or_path, name) for name in WEIGHTS["adapter"]]
    except HFValidationError:
        return None
    held = next((one for one in found if isinstance(one, str)), None)
    return None if held is None else Path(held).parent


def read_adapter_config(name_or_path: str) -> PeftConfig:
    """The configuration of a saved adapter.

    Raises:
        ConfigError: If there is none, or it is none of LoRA with values that LoRA can have.

    Example:
        >>> read_adapter_config("/none")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: /none: no such folder, and no adapter of this id could be had ...
    """
    cached = only_cached("adapter", name_or_path)
    path: object = Path(name_or_path, CONFIGS["adapter"])
    try:
        if not Path(name_or_path).is_dir():
            path = cached_file(name_or_path, CONFIGS["adapter"], local_files_only=cached)
        if isinstance(path, Path | str) and Path(path).is_file():
            check_adapter_settings(Path(path))
        return PeftConfig.from_pretrained(name_or_path, local_files_only=cached)
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, KeyError, HfHubHTTPError) as error:
        raise ConfigError(not_loaded("adapter", name_or_path, error)) from error


def new_adapter(
    model: PreTrainedModel, config: PeftConfig, *, is_trainable: bool, name_or_path: str = "the adapter"
) -> PeftModel:
    """An adapter as a saved configuration describes it, its weights not loaded yet.

    Args:
        name_or_path: Where it was saved, for messages.

    Raises:
        ConfigError: If no such adapter can be made on this model.

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
    try:
        tuned = get_peft_model(model.requires_grad_(False), config)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise ConfigError(
            f"{name_or_path}: its adapter_config.json asks for an adapter that cannot be made on this model: "
            f"{without_advice(' '.join(str(error).split()))[:300]} Use the base model it was trained on, or "
            "save it anew."
        ) from error
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
