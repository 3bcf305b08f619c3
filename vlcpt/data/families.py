"""What differs between model families, as data: where the towers are and what an adapter holds on to.

A parameter belongs to exactly one tower, found from its name. Names are those of the model in memory,
which differ from the ones in a checkpoint's files.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Tower = Literal["vision", "merger", "language"]
TOWERS: tuple[Tower, ...] = ("vision", "merger", "language")
SEEING: tuple[Tower, ...] = ("vision", "merger")  # towers that only media reach

# What peft, DDP and torch.compile put before or into the name of a parameter of the base model.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:base_model\.model|module|_orig_mod)\.")


@dataclass(frozen=True)
class Family:
    """The parts of one model family that this library must know.

    Args:
        model_type: ``model_type`` in the model's ``config.json``.
        towers: Module paths of each tower; a module belongs to the tower with the longest matching path.
        lora_targets: The layers of each tower that get adapters by default: one regular expression
            a tower, for the module's full path. Bare names such as ``gate_proj`` would also match
            the other towers.
        embeddings: Module paths of the input and output embeddings, which may share one weight.
        seams: Where hidden states enter a tower or the output layer: the module's path, and the layer
            inside it (empty: itself) whose weight has the type that these states must have.
    """

    model_type: str
    towers: Mapping[Tower, tuple[str, ...]]
    lora_targets: Mapping[Tower, str]
    embeddings: tuple[str, str]
    seams: Mapping[str, str]

    def tower_of(self, name: str) -> Tower:
        """The tower that a module or parameter of the base model belongs to, by its full name."""
        owners = [
            (len(path), tower)
            for tower, paths in self.towers.items()
            for path in paths
            if name == path or name.startswith(f"{path}.")
        ]
        if not owners:
            raise ValueError(
                f"{name!r} is in none of the towers of {self.model_type}: {dict(self.towers)}. "
                "Pass the name as model.named_parameters() gives it."
            )
        return max(owners)[1]


FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Family(
        model_type="qwen2_5_vl",
        towers={
            "vision": ("model.visual",),
            "merger": ("model.visual.merger",),
            "language": ("model.language_model", "lm_head"),
        },
        lora_targets={
            "vision": r"model\.visual\.blocks\.\d+\.(?:attn\.(?:qkv|proj)|mlp\.(?:gate|up|down)_proj)",
            "merger": r"model\.visual\.merger\.mlp\.[02]",
            "language": (
                r"model\.language_model\.layers\.\d+\."
                r"(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
            ),
        },
        embeddings=("model.language_model.embed_tokens", "lm_head"),
        seams={"model.visual.merger": "ln_q", "model.language_model": "norm", "lm_head": ""},
    ),
}


def family_of(model_type: str) -> Family:
    """The family of a model, by the ``model_type`` of its configuration.

    Raises:
        ValueError: If the family is not supported; the message names those that are.

    Example:
        >>> family_of("qwen2_5_vl").towers["merger"]
        ('model.visual.merger',)
        >>> family_of("llama")
        Traceback (most recent call last):
        ...
        ValueError: model_type 'llama' is not supported; supported: qwen2_5_vl. Use a Qwen2.5-VL checkpoint.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}. "
            "Use a Qwen2.5-VL checkpoint."
        )
    return FAMILIES[model_type]


def base_name(name: str) -> str:
    """The name in the base model of a parameter, without what peft, DDP and torch.compile put around it.

    Only prefixes go: what peft adds inside a layer (``base_layer``, ``lora_A``) stays.

    Example:
        >>> base_name("module.base_model.model.lm_head.weight")
        'lm_head.weight'
    """
    return _WRAPPERS.sub("", name)


def tower_of(name: str) -> Tower:
    """The tower a parameter belongs to, with or without the prefixes of peft.

    Raises:
        ValueError: If the name is in no tower of any family.

    Example:
        >>> tower_of("model.visual.merger.mlp.0.weight")
        'merger'
        >>> tower_of("base_model.model.model.visual.blocks.0.attn.qkv.lora_A.default.weight")
        'vision'
        >>> tower_of("lm_head.weight")
        'language'
    """
    # One family so far, so its paths decide; a second one with other paths will need the model's type here.
    (family,) = FAMILIES.values()
    return family.tower_of(base_name(name))


def is_embedding(name: str) -> bool:
    """Whether a parameter is an input or output embedding of the language tower.

    Example:
        >>> is_embedding("base_model.model.lm_head.modules_to_save.default.weight")
        True
        >>> is_embedding("model.language_model.norm.weight")
        False
    """
    (family,) = FAMILIES.values()
    return base_name(name).startswith(tuple(f"{path}." for path in family.embeddings))
