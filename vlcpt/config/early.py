"""A YAML file and the command line, read and checked as far as that takes no import of torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_type_hints

import yaml

from vlcpt.config.keys import REQUIRED, known_types, wrong_fields, wrong_keys
from vlcpt.config.paths import HUB_NAME, check_paths, moved, moved_source
from vlcpt.config.schema import ROLES, DataConfig, ModelConfig, SourceConfig
from vlcpt.config.values import NULL, Given, build, compose, convert, is_nothing
from vlcpt.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import TypeForm

T = TypeVar("T")


@dataclass(frozen=True)
class EarlyConfig:
    """A configuration of which all is checked but what ``TrainingArguments`` alone can tell.

    Args:
        path: The YAML file.
        given: What was written, by key.
        model: Its part about the model.
        data: Its part about the data.
        training: Values for ``CPTConfig``, by key.
        unchecked: Keys for ``CPTConfig`` whose type only the installed transformers can tell.
    """

    path: Path
    given: Mapping[str, Given]
    model: ModelConfig
    data: DataConfig
    training: Mapping[str, object]
    unchecked: Sequence[str]

    @property
    def output(self) -> Path:
        """The ``output_dir``."""
        return Path(str(self.training["output_dir"]))


def read_early(path: str | Path, overrides: Sequence[str] = ()) -> EarlyConfig:
    """Read a configuration; for its arguments and errors see :func:`vlcpt.config.yaml.load_config`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (file := Path(folder, "run.yaml")).write_text("max_lenght: 8") and None
        ...     read_early(file)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: .../run.yaml:1: max_lenght: unknown key. Did you mean max_length?
    """
    path, types = Path(path), known_types()
    wrong: list[str] = []
    given = _read_file(path, wrong) | _read_overrides(overrides)
    values: dict[str, object] = {}
    unchecked = [key for key in given if key in types and types[key] is None]
    for key, value in given.items():
        if (hint := types.get(key)) is None:
            continue
        if key in ROLES and (unknown := list(wrong_fields(value))):
            wrong += unknown
            continue
        try:
            values[key] = read_value(value, hint)
        except ConfigError as error:
            wrong.append(str(error))
    wrong += wrong_keys(given, types)
    wrong = wrong or [
        f"{path}: {key} is missing. Add a line {key}: …" for key in REQUIRED if key not in given
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))
    with located(path, given):
        model, data = _build(ModelConfig, values), _build(DataConfig, values)
        check_paths(data, values)
    return EarlyConfig(path, given, model, data, values, unchecked)


def _build(cls: type[T], values: dict[str, object]) -> T:
    """Make a dataclass of the values under its keys, and take these out."""
    return cls(**{key: values.pop(key) for key in get_type_hints(cls) if key in values})


def read_value(given: Given, hint: TypeForm[object]) -> object:
    """Turn what is written under a key into a value of its type, with paths from the current folder.

    Raises:
        ConfigError: With the place, what was expected and what was found.
    """
    key = given.key
    if key in REQUIRED and is_nothing(given.node):
        raise given.error("expected a value, found nothing. Give one.")
    if hint == tuple[SourceConfig, ...]:
        if given.node.tag == NULL:
            return ()
        nodes = given.node.value if isinstance(given.node, yaml.SequenceNode) else [given.node]
        return [_read_source(given.inside(f"[{number}]", node)) for number, node in enumerate(nodes)]
    value = convert(given, hint)
    if key.endswith("name_or_path") and isinstance(value, str) and not HUB_NAME.fullmatch(value):
        folder = given.base / Path(value).expanduser()
        if not folder.is_dir():
            raise given.error(
                f"there is no folder {folder}, and the Hub has no such names. Correct the path."
            )
    return moved(key, value, given.base, Path())


def _read_source(given: Given) -> SourceConfig:
    hints = get_type_hints(SourceConfig)
    if isinstance(given.node, yaml.ScalarNode):
        values = {"path": convert(given, str)}
    elif isinstance(given.node, yaml.MappingNode):
        parts = [(str(key.value), node) for key, node in given.node.value]
        values = {name: convert(given.inside(f".{name}", node), hints[name]) for name, node in parts}
    else:
        raise given.error("expected a path, or a mapping with path, found a list. Take one level off.")
    if "path" not in values:
        raise given.error("path is missing. Add path: …")
    try:
        return moved_source(build(SourceConfig, values), given.base, Path())
    except ValueError as error:
        raise given.error(str(error)) from error


@contextmanager
def located(path: str | Path, given: Mapping[str, Given]) -> Iterator[None]:
    """Put file and line before what the dataclasses, or transformers, object to: the first key they name."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        message = " ".join(str(error).split())
        for word in re.findall(r"\w+", message):
            if word in given:
                raise given[word].error(message) from error
        raise ConfigError(f"{path}: {message}") from error


_LARGEST = 2**20  # bytes of a configuration; reading YAML takes a second for each of these


def _read_file(path: Path, repeated: list[str]) -> dict[str, Given]:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ConfigError(
                f"{path}: it has over {_LARGEST:,} bytes, which no configuration has. Give the path of a "
                "YAML file; data are named in it."
            )
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. Give the path of a YAML file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    node = compose(text, str(path), repeated)
    if not isinstance(node, yaml.MappingNode) or node.tag != "tag:yaml.org,2002:map":
        kinds = {yaml.SequenceNode: "a list", yaml.ScalarNode: "text"}
        found = "nothing" if node is None else kinds.get(type(node), f"!<{node.tag}>")
        raise ConfigError(
            f"{path}: expected lines of key: value, found {found}. Needed are {', '.join(REQUIRED)}."
        )
    given = {}
    for key, value in node.value:
        if str(key.value) in given:  # reported already
            continue
        given[str(key.value)] = Given(str(key.value), value, path.parent, str(path), key.start_mark.line + 1)
    return given


def _read_overrides(tokens: Sequence[str]) -> dict[str, Given]:
    given: dict[str, Given] = {}
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not re.match(r"--\w", token):
            raise ConfigError(
                f"command line: {token} is no option. Write --key value; for a list '[one, two]'."
            )
        name, equals, text = token[2:].partition("=")
        if not equals:
            text = "true" if not rest or rest[0].startswith("--") else rest.pop(0)
        key = name.replace("-", "_")
        if key in given:
            raise given[key].error("repeated. Keep one of them.")
        node = compose(text, f"command line: {key}") or yaml.ScalarNode(
            "tag:yaml.org,2002:str", "", style='"'
        )
        given[key] = Given(key, node, Path(), "command line")
    return given
