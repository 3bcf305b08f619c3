"""Write vlcpt/config/keys.json: every key of a configuration, with type, default and help.

Run: python docs/make_keys.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from enum import Enum
from inspect import get_annotations
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import transformers

from vlcpt.config.keys import Key
from vlcpt.config.schema import DataConfig, ModelConfig
from vlcpt.config.training import CPTConfig
from vlcpt.data.rows.open import SourceConfig

FILE = Path(__file__).parents[1] / "vlcpt/config/keys.json"
SECTIONS = {"model": ModelConfig, "data": DataConfig, "source": SourceConfig, "training": CPTConfig}
WORDS = {bool: "true, false", int: "whole number", float: "number", str: "text", dict: "mapping"}
WORDS |= {SourceConfig: "source"}
PLAIN = (bool, int, float, str, NoneType, dict, list, tuple, object)


def keys() -> dict[str, object]:
    """What the file holds."""
    own = {name: dict(section(cls)) for name, cls in SECTIONS.items()}
    hints = get_type_hints(CPTConfig)
    trainer = {
        item.name: without_words(item, hints[item.name])
        for item in fields(CPTConfig)
        if item.name not in own["training"] and item.init
    }
    return {**own, "transformers": transformers.__version__, "trainer": trainer}


def section(cls: type) -> Iterator[tuple[str, Key]]:
    """The fields that a dataclass has of its own."""
    hints = get_type_hints(cls)
    found = {item.name: item for item in fields(cls)}
    for name in get_annotations(cls):
        words: Key = {"takes": takes(hints[name]), "help": str(found[name].metadata["help"])}
        yield name, {**without_words(found[name], hints[name]), **words}


def without_words(item: Field[object], hint: object) -> Key:
    """Type and default of a field."""
    key: Key = {"type": plain_type(item, hint)}
    default = item.default if item.default_factory is MISSING else item.default_factory()
    if default is not MISSING and type(default) in PLAIN:
        key["default"] = default
    return key


def plain_type(item: Field[object], hint: object) -> str:
    """The type as Python writes it, with a field's choices; a class that needs an import is a mapping."""
    enums = [one for one in get_args(hint) if isinstance(one, type) and issubclass(one, Enum)]
    choices = [one.value for one in enums[0]] if enums else item.metadata.get("choices")
    if choices:
        return f"Literal{list(choices)}" + (" | None" if NoneType in get_args(hint) else "")
    return written(hint)


def written(hint: object) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(map(written, get_args(hint)))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"Literal{[one.value for one in hint]}"
    if get_args(hint) and get_origin(hint) in PLAIN:
        return f"{get_origin(hint).__name__}[{', '.join(map(written, get_args(hint)))}]"
    if isinstance(hint, type) and not get_args(hint) and hint is not Any:
        return "None" if hint is NoneType else hint.__name__ if hint in PLAIN else "dict"
    return "..." if hint is Ellipsis else str(hint).replace("typing.", "")


def takes(hint: object) -> str:
    """A type in words."""
    origin, inner = get_origin(hint), [one for one in get_args(hint) if one is not type(None)]
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in inner)
    if origin in (Union, UnionType):
        return ", or ".join(takes(one) for one in inner)
    if origin is tuple:
        return f"list of {takes(inner[0])}".replace("of text", "of texts").replace("of source", "of sources")
    return WORDS[origin or hint]  # type: ignore[index]


def text(found: Mapping[str, object]) -> str:
    """As the file has it: a line a key."""
    lines = []
    for name, section in found.items():
        if isinstance(section, dict):
            inner = [f"  {json.dumps(key)}: {json.dumps(one)}" for key, one in section.items()]
            lines.append(f"{json.dumps(name)}: {{\n" + ",\n".join(inner) + "\n}")
        else:
            lines.append(f"{json.dumps(name)}: {json.dumps(section)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    FILE.write_text(text(keys()), encoding="utf-8")
