"""Which layers of a model get adapters, and which modules peft copies to train them in full."""

import difflib
import re
from collections.abc import Iterator, Sequence

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from vlcpt.model.families import TOWERS, Family, Tower


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
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return base


def adapted_towers(trained: Sequence[Tower], lora_towers: Sequence[str] | None) -> list[Tower]:
    """The towers that get adapters: all the trained ones, or the user's choice among them.

    Raises:
        ValueError: If no tower is left, or a chosen one is unknown or does not train.

    Example:
        >>> adapted_towers(["vision", "language"], lora_towers=None)
        ['vision', 'language']
        >>> adapted_towers(["vision", "language"], lora_towers=["language"])
        ['language']
    """
    if not trained:
        raise ValueError(
            "No tower trains, so there is nothing to put an adapter on. "
            "To train the embeddings alone, set tuning: full with train_language: false."
        )
    if lora_towers is None:
        return list(trained)
    for name in lora_towers:
        if name not in trained:
            remedy = f"set train_{name}: true" if name in TOWERS else f"choose from {', '.join(TOWERS)}"
            raise ValueError(
                f"lora_towers names {name!r}, but the towers that train are {', '.join(trained)}. "
                f"Take it out, or {remedy}."
            )
    if not lora_towers:
        raise ValueError(
            "lora_towers is empty, so there would be no adapter. Name a tower, or set tuning: full."
        )
    return [tower for tower in trained if tower in lora_towers]


def target_pattern(
    model: PreTrainedModel, family: Family, towers: Sequence[Tower], names: Sequence[str] | None
) -> str:
    """One regular expression for peft that matches the layers to adapt, and none of another tower.

    Args:
        names: Ends of module paths, such as ``q_proj`` or ``mlp.0``. None is the family's default.

    Raises:
        ValueError: If a name matches no layer of ``towers``, a tower is left without any layer, or a name
            is that of tied embeddings.

    Example:
        >>> from importlib.resources import files
        >>> from transformers import AutoModelForImageTextToText
        >>> from vlcpt.model.families import family_of
        >>> model = AutoModelForImageTextToText.from_pretrained(str(files("vlcpt") / "demo/base"))
        >>> target_pattern(model, family_of("qwen2_5_vl"), ["merger"], names=["mlp.2"])
        'model\\\\.visual\\\\.merger\\\\.(?:.+\\\\.)?(?:mlp\\\\.2)'
    """
    if names is None:
        return "|".join(family.lora_targets[tower] for tower in towers)
    layers = [
        (name, family.tower_of(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and name
    ]
    candidates = [(path, tower) for path, tower in layers if tower in towers]
    matches = {name: [(p, t) for p, t in candidates if f".{p}".endswith(f".{name}")] for name in names}
    for name, found in matches.items():
        if not found:
            raise ValueError(_no_match(name, [path for path, _ in candidates], towers))
        if is_tied(model, family) and any(path in family.embeddings for path, _ in found):
            raise ValueError(
                f"lora_target_modules names {name!r}, which shares its weight with the "
                "other embedding: an adapter on one of them gives wrong merged weights. "
                "Take it out; train_embeddings: true trains both in full and keeps them tied."
            )
    for tower in towers:
        if not any(tower == owner for found in matches.values() for _, owner in found):
            raise ValueError(
                f"lora_target_modules {list(names)} match no layer of the {tower} tower, so it would not "
                f"train. Name one of its layers, such as {next(p for p, t in layers if t == tower)!r}, "
                f"or set train_{tower}: false."
            )
    return "|".join(_anchored(family, tower, names) for tower in towers)


def trainable_modules(model: PreTrainedModel, family: Family, tower: Tower) -> Iterator[str]:
    """Paths of modules that together hold each parameter of a tower once, and that peft can copy.

    Example:
        >>> from importlib.resources import files
        >>> from transformers import AutoModelForImageTextToText
        >>> from vlcpt.model.families import family_of
        >>> model = AutoModelForImageTextToText.from_pretrained(str(files("vlcpt") / "demo/base"))
        >>> list(trainable_modules(model, family_of("qwen2_5_vl"), "vision"))[:2]
        ['model.visual.patch_embed', 'model.visual.blocks.0']
    """

    def descend(path: str) -> Iterator[str]:
        module = model.get_submodule(path)
        owners = {family.tower_of(f"{path}.{name}") for name, _ in module.named_parameters()}
        # peft refuses lists of modules; a whole model is also called by other ways than its forward.
        if owners == {tower} and not isinstance(module, nn.ModuleList | PreTrainedModel):
            yield path
        elif tower in owners:
            for name, _ in module.named_children():
                yield from descend(f"{path}.{name}")

    for path in family.towers[tower]:
        yield from descend(path)


def is_tied(model: PreTrainedModel, family: Family) -> bool:
    """Whether input and output embeddings are one tensor, whatever the configuration says.

    Example:
        >>> from importlib.resources import files
        >>> from transformers import AutoModelForImageTextToText
        >>> from vlcpt.model.families import family_of
        >>> model = AutoModelForImageTextToText.from_pretrained(str(files("vlcpt") / "demo/base"))
        >>> is_tied(model, family_of("qwen2_5_vl")) == model.config.tie_word_embeddings
        True
    """
    first, second = (model.get_submodule(path).weight for path in family.embeddings)
    return first is second


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
