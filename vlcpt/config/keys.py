"""Which keys there are, and what is said of one that there is not.

The keys of training stand in ``keys.json``, which ``docs/make_keys.py`` makes of the dataclasses.
``CPTConfig`` is a ``TrainingArguments``, which takes five seconds to import: a misspelt key must not wait.
"""

import builtins
import json
import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypedDict, Union, get_type_hints

import yaml

from vlcpt.config.schema import DataConfig, ModelConfig
from vlcpt.config.synonyms import Synonym, read_table, synonyms
from vlcpt.config.values import Dumper, Given, did_you_mean, holds_secret, nearest, plain_value

_NAMES = {**vars(builtins), "Any": Any, "Literal": Literal, "Union": Union}  # in the types of keys.json
REQUIRED = ("model_name_or_path", "train_data", "output_dir")


class Key(TypedDict, total=False):
    """What ``keys.json`` says of a key.

    Args:
        type: As Python writes it; a class that is not Python's own is ``dict``, as YAML has it.
        default: What it is where nobody sets it; absent: it is needed, or its default is no plain value.
        takes: The same in words, of our own keys.
        help: A line, of our own keys.
    """

    type: str
    default: object
    takes: str
    help: str


@cache
def read_keys() -> Mapping[str, Any]:
    """``keys.json``: a section for each dataclass, and the version of transformers that ``trainer`` is of.

    Example:
        >>> read_keys()["training"]["max_length"]["default"]
        4096
    """
    found: Mapping[str, Any] = json.loads((files("vlcpt.config") / "keys.json").read_text("utf-8"))
    return found


@cache
def known_types() -> Mapping[str, Any]:
    """The known keys with their types; ``object`` for those that only the installed transformers has.

    Example:
        >>> types = known_types()
        >>> types["max_length"], types["eval_strategy"]
        (<class 'int'>, typing.Literal['no', 'steps', 'epoch'])
    """
    found = {**get_type_hints(ModelConfig), **get_type_hints(DataConfig)}
    for section in ("training", "trainer"):
        found |= {name: eval(key["type"], dict(_NAMES)) for name, key in read_keys()[section].items()}
    return dict.fromkeys(_newer_keys(), object) | found


@cache
def defaults() -> Mapping[str, object]:
    """What the keys are where nobody sets them.

    Example:
        >>> defaults()["max_length"], defaults()["seed"]
        (4096, 42)
    """
    sections = [read_keys()[name] for name in ("model", "data", "training", "trainer")]
    keys = {name: key for section in sections for name, key in section.items()}
    return {name: key["default"] for name, key in keys.items() if "default" in key}


def _newer_keys() -> Iterable[str]:
    """Fields of an installed transformers that ``keys.json`` is not of; more names may be among them."""
    spec = find_spec("transformers")
    if version("transformers") == read_keys()["transformers"] or spec is None or spec.origin is None:
        return ()
    try:
        text = Path(spec.origin).with_name("training_args.py").read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return ()
    return re.findall(r"^    (\w+)\s*:", text, re.MULTILINE)


def _is_default(key: str, value: object) -> bool:
    """Whether a key has this value where nobody sets it."""
    default = defaults().get(key)
    return type(default) is type(value) and bool(default == value)


def wrong_keys(given: Mapping[str, Given]) -> tuple[dict[str, str], list[str]]:
    """A message for each key that is unknown, or whose value is a secret that would be written down.

    Returns:
        The messages by key, each with what to write here where another tool has the key; and where several
        keys have that, the lines to write once more, for a person to paste.
    """
    known = known_types()
    file = {key: plain_value(value) for key, value in given.items()}
    wrong: dict[str, str] = {}
    pasted: dict[str, None] = {}
    for key, value in given.items():
        if key == "trust_remote_code":
            wrong[key] = value.message(_NO_CODE)
        elif key not in known or (value.line is not None and key in synonyms("launchers")):
            message, written = _explain(value, file, known)
            wrong[key] = value.message(message)
            pasted |= dict.fromkeys(written)
        elif holds_secret(key, value.node):
            wrong[key] = value.message(_SECRET)
    return wrong, ["In their place, write:", *pasted] if len(pasted) > 1 else []


_NO_CODE = "no code from a model's folder or the Hub is ever run. Remove the key."
_SECRET = (
    "it holds what looks like an access token or a password, and is written to config.yaml. "
    "Log in with `hf auth login`, or set HF_TOKEN or hub_token."
)


def _explain(given: Given, file: Mapping[str, object], known: Collection[str]) -> tuple[str, list[str]]:
    """What an unknown key is here, and the lines that stand for it, where these can be pasted."""
    key = given.key
    if (process := synonyms("launchers").get(key)) is not None:
        return f"is of a process, not of a run. {process.remark} Remove the key.", []
    if (row := synonyms("keys").get(key)) is None:
        for family in read_table()["families"]:
            if key.startswith(tuple(family["starts"])):
                return f"unknown key. vlcpt has no such method: {family['remark'][0]}. Remove the key.", []
        return f"unknown key. {_guess(key, known)}", []
    said = _called(row)
    if not (lines := row.translate(file[key], file)):
        return f"{said} Remove the key.", []
    if holds_secret(key, given.node):
        return f"{said} {_SECRET}", []
    written = [_written(name, value, given) for name, value in lines.items()]
    if again := [name for name in lines if name in file]:
        return f"{said} It is {' and '.join(written)}; {again[0]} is given too. Keep one of them.", []
    if given.line is None:
        return f"{said} Write: {' '.join('--' + line.replace(': ', ' ', 1) for line in written)}", []
    written = [
        line + ("  # the default" if _is_default(name, value) else "")
        for line, (name, value) in zip(written, lines.items(), strict=True)
    ]
    return f"{said} Write: {', and '.join(written)}", written


def _called(row: Synonym) -> str:
    return f"unknown key ({', '.join(row.tools)}). {row.remark}".rstrip()


def _guess(key: str, known: Collection[str]) -> str:
    """Which key may be meant, ours or another tool's; never one that a launcher sets."""
    foreign, launchers = synonyms("keys"), synonyms("launchers")
    near = nearest(key, (*known, *foreign, *launchers))
    if near is None or near in launchers:
        return "See docs/configuration.md for the known keys."
    if near not in foreign:
        return f"Did you mean {near}?"
    here = f"Here that is {foreign[near].key}." if foreign[near].key else foreign[near].remark
    return f"Did you mean {near}? {here}"


def explain_field(name: str, given: Given) -> str:
    """What an unknown field of a source is here, where another tool has it."""
    if (row := synonyms("source").get(name)) is None:
        return f"unknown key. {did_you_mean(name, read_keys()['source'])}"
    said = _called(row)
    lines = row.translate(plain_value(given), {})
    written = ", and ".join(_written(key, value, given) for key, value in lines.items())
    return f"{said} Write: {written}" if written else f"{said} Remove the key."


def _written(key: str, value: object, given: Given) -> str:
    """One line of YAML; a plain value stays as the user wrote it."""
    node = given.node
    is_plain = isinstance(node, yaml.ScalarNode) and node.style is None and not isinstance(value, bool)
    if is_plain and value == plain_value(given):
        return f"{key}: {node.value}"
    text: str = yaml.dump([value], Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=10**9)
    return f"{key}: {text.strip()[1:-1]}"
