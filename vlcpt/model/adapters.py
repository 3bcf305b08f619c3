"""A saved adapter on its base model: checked, then exactly its tensors, with the towers asked for."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import AfterValidator, BaseModel, Field, ValidationError
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from vlcpt.data.families import TOWERS, is_embedding, tower_of
from vlcpt.errors import ConfigError, wrong_config
from vlcpt.model.base import bare_model, is_same_base, local_folder
from vlcpt.model.saved import CONFIGS, WEIGHTS, check_files, not_loaded, read_json, weights_in, without_advice
from vlcpt.model.tuning import finish_tuning
from vlcpt.model.weights import (
    UNREADABLE,
    Shapes,
    as_load_error,
    compare_shapes,
    first_few,
    first_not_finite,
    not_finite,
    read_shapes,
)

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from vlcpt.config.schema import ModelConfig

logger = logging.getLogger(__name__)

_MAX_RANK = 65_536  # above every rank in use, and small enough to be compared quickly
_QUOTED = 80  # characters of a value that a message quotes


def _check_pattern(value: str) -> str:
    """Refuse what is no regular expression, or may take for ever: its cost grows with what it repeats."""
    bare = re.sub(r"\\.|\[[^\]]*\]", "x", value)
    repeats = max(len(re.findall(r"[*+{]", one)) for one in bare.split("|"))
    if len(value) > 10_000 or re.search(r"\)[*+{]", bare) or repeats > 4:
        raise ValueError("It must be a short regular expression that repeats no group")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"It must be a regular expression: {error}") from error
    return value


_Pattern = Annotated[str, AfterValidator(_check_pattern)]
_Layers = list[str] | _Pattern | None
_Rank = Annotated[int, Field(ge=1, le=_MAX_RANK)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class AdapterSettings(BaseModel, strict=True):
    """What LoRA reads of an ``adapter_config.json``, with peft's defaults; other keys are not looked at."""

    r: _Rank = 8
    lora_alpha: _Number = 8
    lora_dropout: Annotated[_Number, Field(ge=0, lt=1)] = 0
    rank_pattern: dict[_Pattern, _Rank] | None = None
    alpha_pattern: dict[_Pattern, _Number] | None = None
    target_modules: _Layers = None
    exclude_modules: _Layers = None
    layers_pattern: _Layers = None
    modules_to_save: list[str] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    base_model_name_or_path: str | None = None
    revision: str | None = None
    use_dora: bool | None = None
    use_rslora: bool | None = None
    fan_in_fan_out: bool | None = None
    lora_bias: bool | None = None
    ensure_weight_tying: bool | None = None


# What makes other layers than LoRA's, changes the base, or names a module to import.
_UNUSED = (
    *("megatron_config", "layer_replication", "use_qalora", "alora_invocation_tokens", "arrow_config"),
    *("velora_config", "monteclora_config", "use_bdlora", "kasa_config", "target_parameters"),
)


def read_adapter_settings(path: Path) -> AdapterSettings:
    """An adapter's configuration, refused if it is not LoRA's or has values that LoRA cannot have.

    peft would make layers of whatever rank it says, import the module that it names, and try a regular
    expression of any cost on each layer.

    Args:
        path: That of ``adapter_config.json``.

    Raises:
        ConfigError: With the file, the key, what was found and what to do.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp(), "adapter_config.json")
        >>> _ = path.write_text('{"peft_type": "LORA", "r": 0}')
        >>> read_adapter_settings(path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: .../adapter_config.json: r is 0. Input should be greater than or equal ...
    """
    with wrong_config():
        found = read_json(path)
    if (kind := found.get("peft_type")) != "LORA":
        raise ConfigError(
            f"{path}: peft_type is {_quoted(kind)}, and only LoRA adapters (LORA) can be used here. Give an "
            "adapter of that kind, or merge this one into its base with peft and give the result."
        )
    for key in _UNUSED:
        if found.get(key):
            raise ConfigError(
                f"{path}: {key} is {_quoted(found[key])}, which is not supported. Merge the adapter into its "
                "base with peft, and give the result."
            )
    try:
        return AdapterSettings.model_validate(found)
    except ValidationError as error:
        wrong = error.errors()[-1]
        key = str(wrong["loc"][0])
        raise ConfigError(
            f"{path}: {key} is {_quoted(found[key])}. {wrong['msg'].removeprefix('Value error, ')}. Correct "
            "it, or get the file again from where the adapter was saved."
        ) from error


def _quoted(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}…"


def read_adapter_shapes(folder: Path) -> Shapes:
    """The shapes of a saved adapter's tensors.

    Raises:
        ValueError: If the file is cut or damaged, or its ranks are not those of the configuration.
    """
    path = weights_in(folder, "adapter")
    assert path is not None  # or there is no adapter
    shapes = read_shapes(path)
    settings = read_adapter_settings(folder / CONFIGS["adapter"])
    asked = {settings.r, *(settings.rank_pattern or {}).values()}
    ranks = {shape[0] for name, shape in shapes.items() if name.endswith(".lora_A.weight") and shape}
    if ranks and not ranks & asked:
        held = ", ".join(map(str, sorted(ranks)[:4]))
        raise ValueError(
            f"{folder / CONFIGS['adapter']}: r is {settings.r}, but the tensors in "
            f"{path.name} have rank {held}. Get both files from one save of the adapter."
        )
    return shapes


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

    folder = adapter_folder(name_or_path)
    # Before a layer is made: a forged rank could ask for more memory than there is.
    empty = bare_model(model.config)
    empty.name_or_path = model.name_or_path
    empty_adapter(empty, folder)
    try:
        weights = load_peft_weights(str(folder), device="cpu")
    except (SafetensorError, *UNREADABLE) as error:
        raise ValueError(not_loaded("adapter", str(folder), error)) from error
    config = read_adapter_config(str(folder))
    named, used = config.base_model_name_or_path, model.name_or_path
    if named and used and not is_same_base(named, used, folder):
        logger.warning(
            "%s was trained on the base model %s, and is used on %s, whose config.json is another or could "
            "not be compared. On another model an adapter gives wrong results; check model_name_or_path.",
            folder,
            named,
            used,
        )
    tuned = new_adapter(model, config, folder, is_trainable=is_trainable)
    if (broken := first_not_finite(weights.items())) is not None:
        raise not_finite(weights_in(folder, "adapter") or folder, broken)
    set_peft_model_state_dict(tuned, weights)
    return tuned


def adapter_folder(name_or_path: str) -> Path:
    """The folder of a saved adapter; one on the Hub is fetched into the cache.

    Raises:
        ConfigError: If it cannot be fetched, or a file of it is missing.
    """
    folder = local_folder("adapter", name_or_path, [CONFIGS["adapter"], *WEIGHTS["adapter"]])
    check_files("adapter", str(folder))
    return folder


def empty_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """A saved adapter to train, without numbers, on a model without numbers.

    Args:
        model: On the meta device.
        folder: Where the adapter was saved.

    Raises:
        ValueError: If it cannot be made on this model, or its tensors are not those of its configuration.
    """
    from peft import get_peft_model_state_dict

    with torch.device("meta"):
        tuned = new_adapter(model, read_adapter_config(str(folder)), folder, is_trainable=True)
    expected = {key: tuple(one.shape) for key, one in get_peft_model_state_dict(tuned).items()}
    if wrong := first_few(compare_shapes(expected, read_adapter_shapes(folder))):
        raise ValueError(
            f"{folder}: the adapter's tensors are not those that its adapter_config.json asks for on "
            f"{tuned.get_base_model().name_or_path}: {wrong}. Use the base model it was trained "
            "on, and the versions of transformers and peft it was saved with, or save it anew."
        )
    return tuned


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

    path = adapter_folder(name_or_path) / CONFIGS["adapter"]
    read_adapter_settings(path)
    with as_load_error("adapter", name_or_path):
        return PeftConfig.from_pretrained(str(path.parent))


def new_adapter(model: PreTrainedModel, config: PeftConfig, folder: Path, *, is_trainable: bool) -> PeftModel:
    """An adapter as a saved configuration describes it, its weights not loaded yet.

    Args:
        folder: Where it was saved, for messages.

    Raises:
        ConfigError: If no such adapter can be made on this model.

    Example:
        >>> from importlib.resources import files
        >>> from peft import LoraConfig
        >>> from vlcpt.model.loading import load_base
        >>> model = load_base(str(files("vlcpt") / "demo/base"))
        >>> tuned = new_adapter(model, LoraConfig(target_modules=["q_proj"]), Path("a"), is_trainable=False)
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
            f"{folder}: its adapter_config.json asks for an adapter that cannot be made on this model: "
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
    towers = {owner for _, owner in others}
    found = [(f"train_{tower}", f"the {tower} tower", tower in towers) for tower in TOWERS]
    # A language tower in full includes its embeddings, whatever train_embeddings says.
    if not any(owner == "language" and ".lora_" not in name for name, owner in others):
        found.append(("train_embeddings", "the embeddings in full", bool(embeddings)))
    for key, part, trains in found:
        if trains != getattr(config, key):
            raise ValueError(
                f"{config.adapter_name_or_path}: the adapter {'trains' if trains else 'does not train'} "
                f"{part}, but the configuration says otherwise, and a saved adapter keeps what it trains. "
                f"Set {key}: {str(trains).lower()}."
            )
