"""Print the tables of docs/configuration.md: every key that vlcpt adds, or whose default it changes.

Run: python docs/make_configuration.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from inspect import get_annotations
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

from vlcpt.config.schema import CPTConfig, DataConfig, ModelConfig, SourceConfig

SECTIONS = {"Model": ModelConfig, "Data": DataConfig, "A source": SourceConfig, "Training": CPTConfig}
WORDS = {bool: "true, false", int: "whole number", float: "number", str: "text", dict: "mapping"}
WORDS |= {SourceConfig: "source"}


def lines(cls: type) -> Iterator[str]:
    """The table of one dataclass: the fields that it has of its own."""
    yield "| key | takes | default | |"
    yield "|---|---|---|---|"
    hints = get_type_hints(cls)
    found = {item.name: item for item in fields(cls)}
    for name in get_annotations(cls):
        help = found[name].metadata["help"].replace("<trainable_text>", "`<trainable_text>`")
        yield f"| `{name}` | {takes(hints[name])} | {default(found[name])} | {help} |"


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


def default(item: Field[object]) -> str:
    """A default as YAML has it."""
    if item.default is MISSING:
        return "needed"
    if item.default in (None, (), ""):
        return ""
    if isinstance(item.default, bool):
        return str(item.default).lower()
    return str(item.default)


def main() -> None:
    for section, cls in SECTIONS.items():
        print(f"## {section}\n", *lines(cls), "", sep="\n")


if __name__ == "__main__":
    main()
