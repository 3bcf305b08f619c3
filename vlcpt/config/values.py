"""A YAML value becomes a value of a field's type, or an error with its line that shows no secret."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Literal, Union, get_args, get_origin

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from vlcpt.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import TypeForm

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
    texts = (inner.value for inner, *_ in _nodes(node) if isinstance(inner, yaml.ScalarNode))
    return not is_secret(key) and any(map(_SECRET.search, texts))


def is_secret(key: str) -> bool:
    """Whether a key's value is a secret, and never shown."""
    return key.endswith("_token")


def _nodes(node: yaml.Node, depth: int = 0, line: int = 0) -> Iterator[tuple[yaml.Node, int, int]]:
    """A node and all inside it, aliases written out: each with the lists and mappings around it, and the
    lowest line that leads there."""
    line = max(line, node.start_mark.line + 1)
    yield node, depth, line
    inside = node.value if isinstance(node, yaml.CollectionNode) else []
    for item in inside:
        for one in item if isinstance(item, tuple) else (item,):  # a key with its value
            yield from _nodes(one, depth + 1, line)


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


def compose(text: str, origin: str) -> tuple[yaml.Node | None, list[str]]:
    """Parse YAML into nodes, which know their lines; None for nothing but comments.

    Args:
        text: The YAML.
        origin: What messages call it.

    Returns:
        The node, and a message for each key that is repeated, at any depth.

    Raises:
        ConfigError: For broken or very deep YAML.

    Example:
        >>> compose("seed: 1\\nseed: 2", "run.yaml")[1]
        ['run.yaml:2: seed is repeated, first on line 1. Keep one of them.']
    """
    if _DEEP.search(text):  # before a parser that takes seconds to say so
        raise ConfigError(f"{origin}: {_TOO_DEEP}")
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=Loader)
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
    return node, [] if node is None else _repeated_keys(node, origin)


def _repeated_keys(root: yaml.Node, origin: str) -> list[str]:
    """A message for each repeated key; raise for YAML that is too deep, or too large with its aliases."""
    repeated: dict[str, None] = {}
    for count, (node, depth, lowest) in enumerate(_nodes(root)):
        if count == _MOST_NODES:
            raise ConfigError(
                f"{origin}: with aliases (*name) written out, it has over {_MOST_NODES:,} values. "
                "Write what is needed."
            )
        if depth >= _DEEPEST and isinstance(node, yaml.CollectionNode):
            raise ConfigError(f"{origin}:{lowest}: {_TOO_DEEP}")
        lines: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(
                    f"{origin}:{line}: a list or mapping stands where a key should. Quote or rename it."
                )
            if key.value in lines:
                repeated[
                    f"{origin}:{line}: {key.value} is repeated, first on line {lines[key.value]}. "
                    "Keep one of them."
                ] = None
            lines.setdefault(key.value, line)
    return list(repeated)


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
    if isinstance(value, bool) and not any(
        member in (bool, object) or (get_origin(member) is Literal and value in get_args(member))
        for member in _members(hint)
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


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Give the end of an error message about an unknown name.

    Example:
        >>> did_you_mean("pth", ["path", "split"]), did_you_mean("x", ["path", "split"])
        ('Did you mean path?', 'Known: path, split.')
    """
    near = nearest(name, known)
    return f"Did you mean {near}?" if near else f"Known: {', '.join(known)}."
