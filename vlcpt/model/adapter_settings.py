"""What an ``adapter_config.json`` may say: checked before peft makes anything of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from vlcpt.errors import ConfigError, wrong_config
from vlcpt.model.tensor_files import Shapes, read_json, read_shapes

# Above any that is used, and below what would take long to compare.
MAX_RANK = 65_536
_TOLD = 80  # characters of a value that a message quotes


def check_adapter_settings(path: Path) -> None:
    """Refuse an adapter's configuration that is none, of another kind than LoRA, or has impossible values.

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
        >>> check_adapter_settings(path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: .../adapter_config.json: r is 0, and must be a whole number from 1 to ...
    """
    with wrong_config():
        found = read_json(path)
    if (kind := found.get("peft_type")) != "LORA":
        raise ConfigError(
            f"{path}: peft_type is {_told(kind)}, and only LoRA adapters (LORA) can be used here. Give an "
            "adapter of that kind, or merge this one into its base with peft and give the result."
        )
    for key, (is_right, expected) in _EXPECTED.items():
        if key in found and not is_right(found[key]):
            raise ConfigError(
                f"{path}: {key} is {_told(found[key])}, and must be {expected}. Correct it, or get the file "
                "again from where the adapter was saved."
            )
    for key in _UNUSED:
        if found.get(key):
            raise ConfigError(
                f"{path}: {key} is {_told(found[key])}, which is not supported. Merge the adapter into its "
                "base with peft, and give the result."
            )


def read_adapter_shapes(folder: Path) -> Shapes | None:
    """The shapes of a saved adapter's tensors; None where they are not in this folder.

    Raises:
        ValueError: If the file is cut, damaged or no tensors; or holds ranks that its configuration does not.
    """
    names = ("adapter_model.safetensors", "adapter_model.bin")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return None
    shapes = read_shapes(path)
    found = read_json(folder / "adapter_config.json")
    pattern = found.get("rank_pattern") or {}
    asked = {found.get("r", 8), *(pattern.values() if isinstance(pattern, Mapping) else ())}
    ranks = {shape[0] for name, shape in shapes.items() if name.endswith(".lora_A.weight") and shape}
    if ranks and not ranks & asked:
        held = ", ".join(map(str, sorted(ranks)[:4]))
        raise ValueError(
            f"{folder / 'adapter_config.json'}: r is {_told(found.get('r', 8))}, but the tensors in "
            f"{path.name} have rank {held}. Get both files from one save of the adapter."
        )
    return shapes


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def _is_pattern(value: object) -> bool:
    """Whether a regular expression is none that takes for ever: its cost grows with what it repeats."""
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


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _may_be_none(is_right: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or is_right(value)


def _are_names(value: object) -> bool:
    return value is None or _is_names(value) or _is_pattern(value)


def _is_mapping_to(is_right: Callable[[object], bool]) -> Callable[[object], bool]:
    def check(value: object) -> bool:
        if value is None:
            return True
        if not isinstance(value, dict):
            return False
        return all(_is_pattern(key) and is_right(one) for key, one in value.items())

    return check


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


_SWITCH = (_is_bool, "true or false")
_LAYERS = (
    _are_names,
    "a list of layers' names, or a regular expression that repeats no group",
)
_RANK = f"a whole number from 1 to {MAX_RANK:,}"
_EXPECTED: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (_is_rank, _RANK),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (_is_share, "a number from 0 to below 1"),
    "rank_pattern": (_is_mapping_to(_is_rank), f"a mapping of layers' names to ranks, each {_RANK}"),
    "alpha_pattern": (_is_mapping_to(_is_number), "a mapping of layers' names to numbers"),
    "target_modules": _LAYERS,
    "exclude_modules": _LAYERS,
    "layers_pattern": _LAYERS,
    "modules_to_save": (_may_be_none(_is_names), "a list of modules' names"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "base_model_name_or_path": (_may_be_none(lambda value: isinstance(value, str)), "a folder or a Hub id"),
    "revision": (_may_be_none(lambda value: isinstance(value, str)), "the name of a branch or commit"),
    **dict.fromkeys(
        ("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias", "ensure_weight_tying"), _SWITCH
    ),
}
# What makes other layers than LoRA's, changes the base, or names a module to import.
_UNUSED = (
    *("megatron_config", "layer_replication", "use_qalora", "alora_invocation_tokens", "arrow_config"),
    *("velora_config", "monteclora_config", "use_bdlora", "kasa_config", "target_parameters"),
)


def _told(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= _TOLD else f"{text[:_TOLD]}…"
