"""A saved adapter on its base model: checked, then exactly its tensors, with the towers asked for."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from vlcpt.data.families import TOWERS, is_embedding, tower_of
from vlcpt.errors import ConfigError, wrong_config
from vlcpt.model.base import bare_model, is_same_base, only_cached
from vlcpt.model.tuning import finish_tuning
from vlcpt.model.weights import (
    CONFIGS,
    UNREADABLE,
    WEIGHTS,
    Shapes,
    compare_shapes,
    damaged,
    first_few,
    first_not_finite,
    not_finite,
    not_loaded,
    read_json,
    read_shapes,
    weights_in,
    without_advice,
)

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from vlcpt.config.schema import ModelConfig

logger = logging.getLogger(__name__)

# Above every rank in use, and small enough to be compared quickly.
MAX_RANK = 65_536
_QUOTED = 80  # characters of a value that a message quotes


def read_adapter_settings(path: Path) -> dict[str, object]:
    """An adapter's configuration, refused if it is not LoRA's or has values that LoRA cannot have.

    peft would make layers of whatever rank it says, import the module that it names, and try a regular
    expression of any cost on each layer.

    Args:
        path: Of ``adapter_config.json``.

    Raises:
        ConfigError: With the file, the key, what was found and what to do.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp(), "adapter_config.json")
        >>> _ = path.write_text('{"peft_type": "LORA", "r": 0}')
        >>> read_adapter_settings(path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: .../adapter_config.json: r is 0, and must be a whole number from 1 to ...
    """
    with wrong_config():
        found = read_json(path)
    if (kind := found.get("peft_type")) != "LORA":
        raise ConfigError(
            f"{path}: peft_type is {_quoted(kind)}, and only LoRA adapters (LORA) can be used here. Give an "
            "adapter of that kind, or merge this one into its base with peft and give the result."
        )
    for key, (is_right, expected) in _EXPECTED.items():
        may_be_null = key not in _NEEDED and found.get(key) is None
        if key in found and not may_be_null and not is_right(found[key]):
            raise ConfigError(
                f"{path}: {key} is {_quoted(found[key])}, and must be {expected}. Correct it, or get the "
                "file again from where the adapter was saved."
            )
    for key in _UNUSED:
        if found.get(key):
            raise ConfigError(
                f"{path}: {key} is {_quoted(found[key])}, which is not supported. Merge the adapter into its "
                "base with peft, and give the result."
            )
    return found


def read_adapter_shapes(folder: Path) -> Shapes:
    """The shapes of a saved adapter's tensors.

    Raises:
        ValueError: If there are none, the file is cut or damaged, or its ranks are not those of the
            configuration.
    """
    path = weights_in(folder, "adapter")
    if path is None:
        raise damaged(folder / WEIGHTS["adapter"][0], "there is no such file")
    shapes = read_shapes(path)
    found = read_json(folder / CONFIGS["adapter"])
    pattern = found.get("rank_pattern") or {}
    asked = {found.get("r", 8), *(pattern.values() if isinstance(pattern, Mapping) else ())}
    ranks = {shape[0] for name, shape in shapes.items() if name.endswith(".lora_A.weight") and shape}
    if ranks and not ranks & asked:
        held = ", ".join(map(str, sorted(ranks)[:4]))
        raise ValueError(
            f"{folder / CONFIGS['adapter']}: r is {_quoted(found.get('r', 8))}, but the tensors in "
            f"{path.name} have rank {held}. Get both files from one save of the adapter."
        )
    return shapes


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK


def _is_fraction(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def _is_pattern(value: object) -> bool:
    """Whether a text is a regular expression that ends soon: its cost grows with what it repeats."""
    if not isinstance(value, str) or len(value) > 10_000:
        return False
    bare = re.sub(r"\\.|\[[^\]]*\]", "x", value)
    if re.search(r"\)[*+{]", bare) or max(len(re.findall(r"[*+{]", one)) for one in bare.split("|")) > 4:
        return False
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_layers(value: object) -> bool:
    return _are_names(value) or _is_pattern(value)


def _are_ranks(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_pattern, value)) and all(map(_is_rank, value.values()))


def _are_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_pattern, value)) and all(map(_is_number, value.values()))


def _is_bias(value: object) -> bool:
    return value in ("none", "all", "lora_only")


def _is_switch(value: object) -> bool:
    return isinstance(value, bool)


_LAYERS = (_are_layers, "a list of layers' names, or a regular expression that repeats no group")
_RANK = f"a whole number from 1 to {MAX_RANK:,}"
_SWITCHES = ("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias", "ensure_weight_tying")
_EXPECTED: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (_is_rank, _RANK),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (_is_fraction, "a number from 0 to below 1"),
    "rank_pattern": (_are_ranks, f"a mapping of layers' names to ranks, each {_RANK}"),
    "alpha_pattern": (_are_numbers, "a mapping of layers' names to numbers"),
    "target_modules": _LAYERS,
    "exclude_modules": _LAYERS,
    "layers_pattern": _LAYERS,
    "modules_to_save": (_are_names, "a list of modules' names"),
    "bias": (_is_bias, "none, all or lora_only"),
    "base_model_name_or_path": (_is_text, "a folder or a Hub id"),
    "revision": (_is_text, "the name of a branch or commit"),
    **dict.fromkeys(_SWITCHES, (_is_switch, "true or false")),
}
_NEEDED = ("r", "lora_alpha", "lora_dropout", "bias")  # the others may be null
# What makes other layers than LoRA's, changes the base, or names a module to import.
_UNUSED = (
    *("megatron_config", "layer_replication", "use_qalora", "alora_invocation_tokens", "arrow_config"),
    *("velora_config", "monteclora_config", "use_bdlora", "kasa_config", "target_parameters"),
)


def _quoted(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}…"


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
        >>> from vlcpt.config.schema import ModelConfig
        >>> from vlcpt.model.loading import load_base, load_model
        >>> base, folder = str(files("vlcpt") / "demo/base"), mkdtemp()
        >>> load_model(ModelConfig(base)).save_pretrained(folder)
        >>> load_adapter(load_base(base), folder, is_trainable=False).active_adapter
        'default'
    """
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    config = read_adapter_config(name_or_path)
    try:
        folder = adapter_folder(name_or_path)
        # Before a layer is made: a forged rank could ask for more memory than there is.
        empty = bare_model(model.config)
        empty.name_or_path = model.name_or_path
        with torch.device("meta"):
            bare = new_adapter(empty, copy.deepcopy(config), is_trainable=False, name_or_path=name_or_path)
        check_adapter_tensors(bare, name_or_path, read_adapter_shapes(folder))
        weights = load_peft_weights(str(folder), device="cpu")
    except (HfHubHTTPError, SafetensorError, *UNREADABLE) as error:
        if isinstance(error, ValueError) and str(error).startswith(name_or_path):
            raise
        raise ValueError(not_loaded("adapter", name_or_path, error)) from error
    _warn_of_another_base(config, model, name_or_path)
    tuned = new_adapter(model, config, is_trainable=is_trainable, name_or_path=name_or_path)
    if (broken := first_not_finite(weights.items())) is not None:
        raise not_finite(weights_in(folder, "adapter") or folder, broken)
    set_peft_model_state_dict(tuned, weights)
    return tuned


def adapter_folder(name_or_path: str) -> Path:
    """The folder of a saved adapter; one on the Hub is fetched into the cache.

    Raises:
        ConfigError: If it cannot be fetched.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    wanted = [CONFIGS["adapter"], *WEIGHTS["adapter"]]
    cached = only_cached("adapter", name_or_path)
    try:
        return Path(snapshot_download(name_or_path, allow_patterns=wanted, local_files_only=cached))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ConfigError(not_loaded("adapter", name_or_path, error)) from error


def check_adapter_tensors(tuned: PeftModel, name_or_path: str, found: Shapes) -> None:
    """Compare saved tensors with those that the adapter's configuration asks for on this model.

    Args:
        tuned: The adapter, with numbers or without.
        name_or_path: Where it was saved.
        found: The saved shapes.

    Raises:
        ValueError: If a tensor is missing, unexpected or of another shape.
    """
    from peft import get_peft_model_state_dict

    expected = {key: tuple(one.shape) for key, one in get_peft_model_state_dict(tuned).items()}
    wrong = compare_shapes(expected, found)
    if any(wrong.values()):
        raise ValueError(
            f"{name_or_path}: the adapter's tensors are not those that its adapter_config.json asks for on "
            f"{tuned.get_base_model().name_or_path}: {first_few(wrong)}. Use the base model it was trained "
            "on, and the versions of transformers and peft it was saved with, or save it anew."
        )


def read_adapter_config(name_or_path: str) -> PeftConfig:
    """The configuration of a saved adapter.

    Raises:
        ConfigError: If there is none, it is not LoRA's, or it has values that LoRA cannot have.

    Example:
        >>> read_adapter_config("/none")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: /none: no such folder, and no adapter of this id was found ...
    """
    from peft import PeftConfig

    cached = only_cached("adapter", name_or_path)
    try:
        path = Path(str(cached_file(name_or_path, CONFIGS["adapter"], local_files_only=cached)))
        read_adapter_settings(path)
        return PeftConfig.from_pretrained(str(path.parent))
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
    from peft import PeftModel, get_peft_model

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
        # Before the weights are copied: a bfloat16 copy would round the saved float32 values.
        finish_tuning(tuned)
    return tuned


def check_trained_parts(model: nn.Module, config: ModelConfig) -> None:
    """An adapter brings its own towers and embeddings: the configuration must not say something else.

    Raises:
        ValueError: If it does, with the key to set.

    Example:
        >>> from importlib.resources import files
        >>> from vlcpt.config.schema import ModelConfig
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


def _other_parts(config: ModelConfig, part: str, key: str, trains: bool) -> ValueError:
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
