"""A YAML value becomes a value of a field's type, or an error with its line that shows no secret."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from vlcpt.config.synonyms import read_table
from vlcpt.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import TypeForm


T = TypeVar("T")

# An access token of the Hub, or a password in an address.
_SECRET = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}|(?<=://)[^/\s@]+(?=@)")


def redacted(text: str) -> str:
    """Text without what looks like an access token or a password in an address.

    Example:
        >>> redacted("hf_" + "a" * 34 + " and https://me:pass@example.org")
        '*** and https://***@example.org'
    """
    return _SECRET.sub("***", text)


def holds_secret(key: str, node: yaml.Node) -> bool:
    """Whether a value holds what looks like a secret under a key that is written down, as ``run_name`` is.

    Example:
        >>> node = yaml.compose("hf_" + "a" * 34)
        >>> holds_secret("run_name", node), holds_secret("hub_token", node)
        (True, False)
    """
    return not is_secret(key) and any(_SECRET.search(text) for text in _texts(node, set()))


def is_secret(key: str) -> bool:
    """Whether a key's value is a secret, and never shown."""
    return key.endswith("_token")


def _texts(node: yaml.Node, seen: set[int]) -> Iterator[str]:
    if id(node) in seen:  # an alias, which may point back to what it stands in
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        yield node.value
    for item in _inside(node):
        yield from _texts(item, seen)


def _inside(node: yaml.Node) -> list[yaml.Node]:
    """The items of a list; the keys and values of a mapping."""
    if isinstance(node, yaml.MappingNode):
        return [item for pair in node.value for item in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


NULL = "tag:yaml.org,2002:null"
_TEXT = "tag:yaml.org,2002:str"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_DEEPEST = 50  # levels of lists and mappings; Python can follow a few hundred
_DEEP = re.compile(rf"(?:[\[{{]\s*){{{_DEEPEST + 1}}}")
_MOST_NODES = 100_000
_TOO_DEEP = f"lists or mappings stand more than {_DEEPEST} deep inside each other. Write them flat."
_FLOAT = (
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
_WORDS: Mapping[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
    tuple: "a list",
    NoneType: "null",
}


class Loader(yaml.SafeLoader):
    """Safe YAML in which ``1e-5`` is a number and ``10:30`` is none, as in YAML 1.2."""

    def resolve(self, kind: type[yaml.Node], value: str, implicit: tuple[bool, bool]) -> str:
        tag: str = super().resolve(kind, value, implicit)
        return _TEXT if tag in _NUMBERS and ":" in value else tag


class Dumper(yaml.SafeDumper):
    """Puts quotes where :class:`Loader` needs them."""


Loader.add_implicit_resolver(*_FLOAT)
Dumper.add_implicit_resolver(*_FLOAT)


@dataclass(frozen=True)
class Given:
    """One value as the user wrote it.

    Args:
        key: The key it stands under, ``train_data[1].share`` for one inside a list.
        node: The YAML itself, with line numbers and the text as written.
        base: The folder in which its relative paths start.
        origin: The file's name, or ``command line``.
        line: Line of the key in the file; None on the command line.
    """

    key: str
    node: yaml.Node
    base: Path
    origin: str
    line: int | None = None

    def message(self, message: str) -> str:
        """Put the place before a message: ``run.yaml:3: max_length: …``."""
        place = self.origin if self.line is None else f"{self.origin}:{self.line}"
        return f"{place}: {message}" if message.startswith(self.key) else f"{place}: {self.key}: {message}"

    def error(self, message: str) -> ConfigError:
        """Make an error of a message, with the place before it."""
        return ConfigError(self.message(message))

    def inside(self, key: str, node: yaml.Node) -> Given:
        """Give the value ``node`` inside this one."""
        line = None if self.line is None else node.start_mark.line + 1
        return Given(self.key + key, node, self.base, self.origin, line)


def compose(text: str, origin: str, repeated: list[str] | None = None) -> yaml.Node | None:
    """Parse YAML into nodes, which know their lines; None for nothing but comments.

    Args:
        text: The YAML.
        origin: What messages call it.
        repeated: Where to put a message for each repeated key, instead of raising for all of them.

    Raises:
        ConfigError: For broken or very deep YAML, and for keys that are repeated, at any depth.

    Example:
        >>> compose("seed: 1\\nseed: 2", "run.yaml")
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: run.yaml:2: seed is repeated, first on line 1. Keep one of them.
    """
    found: list[str] = []
    if _DEEP.search(text):  # before a parser that takes seconds to say so
        raise ConfigError(f"{origin}: {_TOO_DEEP}")
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=Loader)
        if node is not None:
            _check_nodes(node, origin, {}, found)
            if (count := _written_out(node, {})) > _MOST_NODES:
                raise ConfigError(
                    f"{origin}: with aliases (*name) written out, it has {count:,} values, above "
                    f"{_MOST_NODES:,}. Write what is needed."
                )
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(
            f"{origin}{line}: not YAML: {error.problem}. Indent with spaces, not tabs; quote text "
            "with special characters."
        ) from error
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{origin}: not YAML: {problem}. Save it as plain UTF-8 text.") from error
    except RecursionError as error:
        raise ConfigError(f"{origin}: {_TOO_DEEP}") from error
    if repeated is not None:
        repeated += found
    elif found:
        raise ConfigError("\n".join(found))
    return node


def _check_nodes(node: yaml.Node, origin: str, depths: dict[int, int], repeated: list[str]) -> int:
    """Give how deep lists and mappings stand inside each other; raise for too deep, note repeated keys."""
    if id(node) in depths:  # an alias, which may point back to what it stands in
        return depths[id(node)]
    depths[id(node)] = 0
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(
                    f"{origin}:{line}: a list or mapping stands where a key should. Quote or rename it."
                )
            name = key.value
            if name in lines:
                repeated.append(
                    f"{origin}:{line}: {name} is repeated, first on line {lines[name]}. Keep one of them."
                )
            lines.setdefault(name, line)
    depth = isinstance(node, yaml.CollectionNode) + max(
        (_check_nodes(item, origin, depths, repeated) for item in _inside(node)), default=0
    )
    if depth > _DEEPEST:
        raise ConfigError(f"{origin}:{node.start_mark.line + 1}: {_TOO_DEEP}")
    depths[id(node)] = depth
    return depth


def _written_out(node: yaml.Node, counts: dict[int, int]) -> int:
    """How many values there are with each alias replaced by what it names: a few lines can make billions."""
    if id(node) not in counts:
        counts[id(node)] = 0  # an alias inside what it names
        counts[id(node)] = 1 + sum(_written_out(one, counts) for one in _inside(node))
    return counts[id(node)]


def plain_value(given: Given) -> object:
    """What a YAML value means; None where a tag in it is not plain YAML."""
    try:
        return Loader("").construct_object(given.node, deep=True)
    except (yaml.YAMLError, ValueError):
        return None


def is_nothing(node: yaml.Node) -> bool:
    """Tell whether a key has no value at all: null, or empty text."""
    return isinstance(node, yaml.ScalarNode) and (node.tag.endswith(":null") or not node.value.strip())


def convert(given: Given, hint: TypeForm[object]) -> object:
    """Turn YAML into a value of the type ``hint``: ``'5'`` is an int where one is wanted, ``true`` never is.

    Args:
        given: What the user wrote.
        hint: The type of the field, as ``typing.get_type_hints`` gives it.

    Raises:
        ConfigError: With what was expected and found.

    Example:
        >>> convert(Given("seed", yaml.compose("7.0"), Path(), "a.yml", 3), int)
        7
        >>> convert(Given("seed", yaml.compose("7.5"), Path(), "a.yml", 3), int)
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: a.yml:3: seed: expected a whole number, found 7.5. Correct it, or remove it.
    """
    for value in _readings(given, hint):
        try:
            return _validated(value, hint)
        except (ValidationError, TypeError):
            continue
    found = "something else" if is_secret(given.key) else _shown(given.node)
    if (here := read_table()["values"].get(given.key, {}).get(found)) is not None:
        raise given.error(f"{found} is called {here} here. Write: {given.key}: {here}")
    raise given.error(f"expected {_describe(hint)}, found {found}. Correct it, or remove it.")


def _readings(given: Given, hint: object) -> Iterator[object]:
    """What a YAML value may mean: its value, the text itself, the only item of a list."""
    members = _members(hint)
    try:
        value = Loader("").construct_object(given.node, deep=True)
    except (yaml.YAMLError, ValueError) as error:
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else error
        raise given.error(
            f"not a plain value: {problem}. Write text, numbers, lists and mappings only."
        ) from error
    yield value
    # YAML takes `no` for false and a hash of digits for a number; where text is wanted, it is as typed.
    if isinstance(given.node, yaml.ScalarNode) and not is_nothing(given.node):
        yield given.node.value
        if any(get_origin(member) in (list, tuple) for member in members):
            yield [given.node.value]


def _validated(value: object, hint: TypeForm[object]) -> object:
    members = _members(hint)
    if isinstance(value, bool) and not any(
        member is bool or (get_origin(member) is Literal and value in get_args(member)) for member in members
    ):
        raise TypeError("pydantic would take true for 1")
    adapter: TypeAdapter[object] = TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False))
    return adapter.validate_python(value)


def _members(hint: object) -> tuple[object, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _describe(hint: object) -> str:
    """Name a type for a person: ``a whole number or null``."""
    if len(_members(hint)) > 1:
        return " or ".join(map(_describe, _members(hint)))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(str(choice.value) for choice in hint)
    if get_origin(hint) in (list, tuple):
        return f"a list of {_describe(get_args(hint)[0]).removeprefix('one of ')}"
    return _WORDS.get(get_origin(hint) or hint, str(hint))


def _shown(node: yaml.Node) -> str:
    """Show YAML as written, shortened."""
    if not isinstance(node, yaml.ScalarNode):
        return reprlib.repr(Loader("").construct_object(node, deep=True))
    if is_nothing(node):
        return "nothing"
    return node.value if node.style is None else repr(node.value)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Give the known name that this one is a misspelling of; None if it is like no other.

    Example:
        >>> nearest("lerning_rate", ["learning_rate", "seed"]), nearest("rate", ["learning_rate", "seed"])
        ('learning_rate', None)
    """
    # 0.8: two letters of ten. What is less alike is another word, and naming it would mislead.
    return next(iter(get_close_matches(name, known, n=1, cutoff=0.8)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Give the end of an error message about an unknown name.

    Example:
        >>> did_you_mean("lerning_rate", ["learning_rate", "seed"])
        'Did you mean learning_rate?'
    """
    known = list(known)
    if near := nearest(name, known):
        return f"Did you mean {near}?"
    return (
        f"Known: {', '.join(known)}." if len(known) <= 12 else "See docs/configuration.md for the known keys."
    )


def build(cls: Callable[..., T], values: Mapping[str, object]) -> T:
    """Call a dataclass with keyword arguments by name; an unknown one is a ValueError with the nearest known.

    Example:
        >>> from vlcpt.config.schema import SourceConfig
        >>> build(SourceConfig, {"pth": "a.jsonl"})
        Traceback (most recent call last):
        ValueError: SourceConfig has no field pth. Did you mean path?
    """
    known = get_type_hints(cls)
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"{cls.__name__} has no field {unknown[0]}. {did_you_mean(unknown[0], known)}")
    return cls(**values)
