"""What trains: towers in full or through adapters, in which type, at which learning rate."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from vlcpt.data.families import TOWERS, Family, Tower, family_of, is_embedding, tower_of

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    from vlcpt.config.schema import ModelConfig


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model, with or without adapters inside it.

    Example:
        >>> from importlib.resources import files
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import AutoModelForImageTextToText
        >>> model = AutoModelForImageTextToText.from_pretrained(str(files("vlcpt") / "demo/base"))
        >>> base_model(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))) is model
        True
    """
    if isinstance(model, PreTrainedModel):
        return model
    from peft import PeftModel

    assert isinstance(model, PeftModel)
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    return base


def unwrapped(model: nn.Module) -> nn.Module:
    """A model without DDP or DeepSpeed around it.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> unwrapped(nn.DataParallel(layer)) is layer
        True
    """
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def trained_towers(model: nn.Module) -> set[Tower]:
    """The towers of which a parameter trains, its own or an adapter's.

    Example:
        >>> from vlcpt import ModelConfig, load_model
        >>> from vlcpt.demo import base_path
        >>> sorted(trained_towers(load_model(ModelConfig(base_path(), lora_r=4, train_merger=True))))
        ['language', 'merger']
    """
    return {tower_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapted_layers(model: PreTrainedModel, config: ModelConfig) -> str:
    """One regular expression for peft that matches the layers to adapt, and none of another tower.

    Raises:
        ValueError: If a name of ``lora_target_modules`` matches no layer of the adapted towers or is that of
            tied embeddings, or a tower is left without any layer.

    Example:
        >>> from vlcpt.config.schema import ModelConfig
        >>> from vlcpt.demo import base_path
        >>> from vlcpt.model.loading import load_base
        >>> way = {"train_merger": True, "lora_towers": ["merger"], "lora_target_modules": ["mlp.2"]}
        >>> adapted_layers(load_base(base_path()), ModelConfig(base_path(), **way))
        'model\\\\.visual\\\\.merger\\\\.(?:.+\\\\.)?(?:mlp\\\\.2)'
    """
    family, towers = family_of(model.config.model_type), config.adapter_towers
    names = config.lora_target_modules
    if names is None:
        return "|".join(family.lora_targets[tower] for tower in towers)
    layers = {
        name: family.tower_of(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and name
    }
    candidates = [path for path, tower in layers.items() if tower in towers]
    matched = set()
    for name in names:
        found = [path for path in candidates if f".{path}".endswith(f".{name}")]
        if not found:
            raise ValueError(_no_match(name, candidates, towers))
        if is_tied(model) and any(path in family.embeddings for path in found):
            raise ValueError(
                f"lora_target_modules names {name!r}, which shares its weight with the "
                "other embedding: an adapter on one of them gives wrong merged weights. "
                "Take it out; train_embeddings: true trains both in full and keeps them tied."
            )
        matched |= {layers[path] for path in found}
    for tower in towers:
        if tower not in matched:
            one = next(path for path, owner in layers.items() if owner == tower)
            raise ValueError(
                f"lora_target_modules {list(names)} match no layer of the {tower} tower, so it would not "
                f"train. Name one of its layers, such as {one!r}, or set train_{tower}: false."
            )
    return "|".join(_anchored(family, tower, names) for tower in towers)


def copied_modules(model: PreTrainedModel, config: ModelConfig) -> list[str]:
    """Paths of the modules that train in full beside adapters, each of which peft can copy.

    Example:
        >>> from vlcpt.config.schema import ModelConfig
        >>> from vlcpt.demo import base_path
        >>> from vlcpt.model.loading import load_base
        >>> config = ModelConfig(base_path(), train_vision=True, lora_towers=["language"])
        >>> copied_modules(load_base(base_path()), config)[:2]
        ['model.visual.patch_embed', 'model.visual.blocks.0']
    """
    family = family_of(model.config.model_type)

    def descend(path: str, tower: Tower) -> Iterator[str]:
        module = model.get_submodule(path)
        owners = {family.tower_of(f"{path}.{name}") for name, _ in module.named_parameters()}
        # peft refuses lists of modules; a model is also called by other methods than forward.
        if owners == {tower} and not isinstance(module, nn.ModuleList | PreTrainedModel):
            yield path
        elif tower in owners:
            for name, _ in module.named_children():
                yield from descend(f"{path}.{name}", tower)

    in_full = [tower for tower in config.trained_towers if tower not in config.adapter_towers]
    copies = [found for tower in in_full for path in family.towers[tower] for found in descend(path, tower)]
    if config.train_embeddings:
        copies += [path for path in family.embeddings if path not in copies]
    return copies


def is_tied(model: PreTrainedModel) -> bool:
    """Whether input and output embeddings are one tensor, whatever the configuration says.

    Example:
        >>> from transformers import AutoModelForImageTextToText
        >>> from vlcpt.demo import base_path
        >>> model = AutoModelForImageTextToText.from_pretrained(base_path())
        >>> is_tied(model) == model.config.tie_word_embeddings
        True
    """
    first, second = map(model.get_submodule, family_of(model.config.model_type).embeddings)
    return first.weight is second.weight


def _anchored(family: Family, tower: Tower, names: Sequence[str]) -> str:
    """A regular expression for the layers of one tower whose path ends with one of ``names``."""
    ends = "|".join(re.escape(name) for name in names)
    patterns = []
    for path in family.towers[tower]:
        inner = [p[len(path) + 1 :] for ps in family.towers.values() for p in ps if p.startswith(f"{path}.")]
        elsewhere = "".join(rf"(?!{re.escape(p)}\.)" for p in inner)
        patterns.append(rf"{re.escape(path)}\.{elsewhere}(?:.+\.)?(?:{ends})")
        if any(f".{path}".endswith(f".{name}") for name in names):
            patterns.append(re.escape(path))
    return "|".join(patterns)


def _no_match(name: str, paths: Sequence[str], towers: Sequence[Tower]) -> str:
    """The message for a layer name that matches nothing, with the nearest that would."""
    known = sorted({".".join(path.split(".")[-depth:]) for path in paths for depth in (1, 2)})
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return (
        f"lora_target_modules names {name!r}, which matches no layer of {', '.join(towers)}, the towers "
        f"that get adapters. The nearest is {near[0]!r}."
    )


def apply_tuning(model: PreTrainedModel, config: ModelConfig) -> PreTrainedModel | PeftModel:
    """Freeze the model but for what is to train, and put new adapters where they belong.

    A tower that trains in full beside adapters does so as peft's ``modules_to_save``: a copy, saved with
    the adapter, so that the base stays as it was. Trained parameters become float32, because small
    updates vanish in bfloat16; frozen ones keep their type. A language tower that trains in full
    includes its embeddings. Tied embeddings stay tied.

    Args:
        model: A model of a supported family; in 4 bits for ``qlora``. Changed in place.
        config: What trains, and how; it has checked itself.

    Raises:
        ValueError: If ``lora_target_modules`` match nothing, or an adapter is asked for on tied embeddings.

    Example:
        >>> from transformers import AutoModelForImageTextToText
        >>> from vlcpt.config.schema import ModelConfig
        >>> from vlcpt.demo import base_path
        >>> model = AutoModelForImageTextToText.from_pretrained(base_path())
        >>> model = apply_tuning(model, ModelConfig(base_path(), train_merger=True, lora_r=4))
        >>> [row.how for row in tower_table(model)]
        ['frozen', 'LoRA r=4', 'LoRA r=4']
    """
    family = family_of(model.config.model_type)
    model.requires_grad_(False)
    if config.tuning == "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(
                family.tower_of(name) in config.trained_towers
                or (config.train_embeddings and is_embedding(name))
            )
        return finish_tuning(model)

    from peft import LoraConfig, get_peft_model

    copies = copied_modules(model, config)
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft only divides by it
        lora_dropout=config.lora_dropout,
        target_modules=adapted_layers(model, config),
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        modules_to_save=copies or None,
        # peft warns when this is asked for and no tied module is among the copies.
        ensure_weight_tying=is_tied(model) and any(path in copies for path in family.embeddings),
    )
    return finish_tuning(get_peft_model(model, lora))


def finish_tuning(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """Make trained parameters float32, and let layers of different types stand side by side.

    Done by ``apply_tuning``, and when a saved adapter is loaded to train further.

    Example:
        >>> from importlib.resources import files
        >>> import torch
        >>> from transformers import AutoModelForImageTextToText
        >>> model = AutoModelForImageTextToText.from_pretrained(
        ...     str(files("vlcpt") / "demo/base"), dtype=torch.bfloat16
        ... ).requires_grad_(False)
        >>> model.lm_head.requires_grad_(True).weight.dtype
        torch.bfloat16
        >>> finish_tuning(model).lm_head.weight.dtype
        torch.float32
    """
    for parameter in model.parameters():
        # What ZeRO-3 has partitioned holds no data here; DeepSpeed keeps its float32 master.
        if parameter.requires_grad and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.float()
    base = base_model(model)
    # Without autocast a layer refuses an input of another type than its weight's.
    for path, inner in family_of(base.config.model_type).seams.items():
        base.get_submodule(path).register_forward_pre_hook(partial(_cast_inputs, inner), with_kwargs=True)
    leave_inputs_to_autocast(model)
    return model


def leave_inputs_to_autocast(model: nn.Module) -> None:
    """Keep adapters from widening inputs that autocast narrows again.

    peft gives an adapter in float32 its input in float32 (``_cast_input_dtype``, peft 0.21), of which
    autocast then makes 16 bits: two copies of each layer's input, forward and backward, that change no bit,
    and a third that is kept for the backward pass, once for each layer, where several could keep one.
    Dropout draws by the type of its input: with ``lora_dropout`` other numbers are dropped than peft would.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> layers = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
        >>> leave_inputs_to_autocast(layers)
        >>> narrow = torch.ones(1, 2, dtype=torch.bfloat16)
        >>> with torch.autocast("cpu"):
        ...     layers.base_model.model[0]._cast_input_dtype(narrow, torch.float32).dtype
        torch.bfloat16
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        # Variants such as DoRA also compute with the input's type elsewhere.
        if isinstance(module, LoraLayer) and not module.lora_variant:
            vars(module)["_cast_input_dtype"] = partial(_cast_outside_autocast, module)


def _cast_outside_autocast(
    layer: LoraLayer, value: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor | None:
    if value is not None and torch.is_autocast_enabled(value.device.type):
        return value
    found: torch.Tensor | None = type(layer)._cast_input_dtype(layer, value, dtype)
    return found


def _cast_inputs(
    inner: str, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """A forward hook: hidden states in the type of the weight of the layer ``inner``."""
    # Through peft's wrappers this is the weight in use: the trained copy, or with adapters off the original.
    weight = module.get_submodule(inner).weight
    assert isinstance(weight, torch.Tensor)
    dtype = weight.dtype

    def cast(value: object) -> object:
        return value.to(dtype) if isinstance(value, torch.Tensor) else value

    cast_kwargs = {key: cast(value) if key == "inputs_embeds" else value for key, value in kwargs.items()}
    return tuple(cast(value) for value in args), cast_kwargs


def limit_checkpointing(model: nn.Module) -> None:
    """Keep activation checkpointing off a frozen vision tower. Call it after checkpointing was turned on.

    transformers then makes every tower's input require gradients, so that a frozen tower would run a
    second time and backward for nothing. Only the reentrant kind of checkpointing needs that, which
    ``CPTConfig`` refuses.

    Example:
        >>> from vlcpt.config.schema import ModelConfig
        >>> from vlcpt.demo import base_path
        >>> from vlcpt.model.loading import load_model
        >>> model = load_model(ModelConfig(base_path()))
        >>> model.activation_checkpointing_enable()
        >>> limit_checkpointing(model)
        >>> base_model(model).model.visual.blocks[0].gradient_checkpointing
        False
    """
    trained = trained_towers(model)
    for name, module in model.named_modules():
        # Gradients pass through the language tower on their way down even when it is frozen.
        is_frozen = "vision" not in trained and isinstance(module, GradientCheckpointingLayer)
        if is_frozen and tower_of(name) == "vision":
            module.gradient_checkpointing = False
    base_model(model).disable_input_require_grads()


@dataclass(frozen=True)
class TowerRow:
    """One line of the table at the start of a run.

    Args:
        total: Parameters of the base model in this tower; shared ones once.
        trained: Parameters that train: the tower's own, copies of them, or its adapters'.
        how: ``frozen``, ``full``, ``embeddings``, ``LoRA r=16``, or ``LoRA r=16 + embeddings``.
        dtype: How the tower's own weights are held, such as ``bfloat16`` or ``4-bit``.
    """

    tower: Tower
    total: int
    trained: int
    how: str
    dtype: str


def tower_table(model: nn.Module) -> list[TowerRow]:
    """What trains in each tower, and how, as the parameters say.

    Example:
        >>> from vlcpt.config.schema import ModelConfig
        >>> from vlcpt.demo import base_path
        >>> from vlcpt.model.loading import load_model
        >>> rows = tower_table(load_model(ModelConfig(base_path(), tuning="full")))
        >>> [(row.tower, row.how, row.trained == row.total) for row in rows]
        [('vision', 'frozen', False), ('merger', 'frozen', False), ('language', 'full', True)]
    """
    return [_row(model, tower) for tower in TOWERS]


def _row(model: nn.Module, tower: Tower) -> TowerRow:
    own = [(name, p) for name, p in model.named_parameters() if tower_of(name) == tower]
    base = {name: p for name, p in own if "modules_to_save" not in name and ".lora_" not in name}
    trained = {name: p for name, p in own if p.requires_grad}
    how = []
    if any(".lora_" in name for name in trained):
        from peft import LoraConfig, PeftModel

        assert isinstance(model, PeftModel)
        config = model.peft_config[model.active_adapter]
        assert isinstance(config, LoraConfig)
        how.append(f"{'DoRA' if config.use_dora else 'LoRA'} r={config.r}")
    in_full = [name for name in trained if ".lora_" not in name]
    if in_full:
        how.append("embeddings" if all(is_embedding(name) for name in in_full) else "full")
    types = {
        "4-bit" if hasattr(p, "quant_state") else str(p.dtype).removeprefix("torch.") for p in base.values()
    }
    return TowerRow(
        tower=tower,
        total=sum(_size(p) for p in base.values()),
        trained=sum(_size(p) for p in trained.values()),
        how=" + ".join(how) or "frozen",
        dtype=", ".join(sorted(types)),
    )


def _size(parameter: nn.Parameter) -> int:
    """Numbers in a parameter, also if it is packed in 4 bits or partitioned by ZeRO-3."""
    if (state := getattr(parameter, "quant_state", None)) is not None:
        return int(torch.Size(state.shape).numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    vision_learning_rate: float | None = None,
    merger_learning_rate: float | None = None,
    embedding_learning_rate: float | None = None,
    weight_decay: float = 0.0,
    decay_names: Collection[str] = (),
) -> list[dict[str, object]]:
    """Groups for the optimizer: each trained parameter once, at its tower's learning rate.

    Args:
        learning_rate: For the language tower, and for each other that has none of its own.
        decay_names: Names of the parameters that get ``weight_decay``, as ``named_parameters`` gives them.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay`` and, to log, ``name``: a tower or ``embeddings``;
        two groups of one name where only some of its parameters decay.

    Example:
        >>> from vlcpt.config.schema import ModelConfig
        >>> from vlcpt.demo import base_path
        >>> from vlcpt.model.loading import load_model
        >>> model = load_model(ModelConfig(base_path(), train_merger=True))
        >>> groups = parameter_groups(model, learning_rate=1e-4, merger_learning_rate=2e-5)
        >>> [(group["name"], group["lr"]) for group in groups]
        [('merger', 2e-05), ('language', 0.0001)]
    """
    rates = {
        "vision": vision_learning_rate,
        "merger": merger_learning_rate,
        "language": learning_rate,
        "embeddings": embedding_learning_rate,
    }
    groups: list[dict[str, object]] = []
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for group, rate in rates.items():
        members = [(n, p) for n, p in trained if group == ("embeddings" if is_embedding(n) else tower_of(n))]
        for decays in (True, False):
            parameters = [p for n, p in members if (n in decay_names) == decays]
            if parameters:
                groups.append(
                    {
                        "name": group,
                        "params": parameters,
                        "lr": learning_rate if rate is None else rate,
                        "weight_decay": weight_decay if decays else 0.0,
                    }
                )
    return groups
