"""What a YAML file and the command line give, and those mistakes in it that are found in a second.

Which keys there are stands in ``keys.json``, which ``docs/make_keys.py`` makes of the dataclasses:
``CPTConfig`` is a ``TrainingArguments``, which takes five to ten seconds to import, and a misspelt key should
not wait for it.
"""

import builtins
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypedDict, Union

import yaml

from vlcpt.config.packages import NEEDING, missing_packages
from vlcpt.config.synonyms import Synonym, read_table, synonyms
from vlcpt.config.values import Dumper, Given, Loader, compose, convert, did_you_mean, holds_secret, nearest
from vlcpt.errors import ConfigError

REQUIRED = ("model_name_or_path", "train_data", "output_dir")
SECTIONS = ("model", "data", "training", "trainer")  # of keys.json, besides "source"
_PLAIN = {**vars(builtins), "Any": Any, "Literal": Literal, "Union": Union}


class Key(TypedDict, total=False):
    """What ``keys.json`` says of a key.

    Args:
        type: Its type, where that is made of Python's own; None: an import or choices are needed to tell.
        default: What it is where nobody sets it; absent: it is needed, or its default is no plain value.
        takes: The same in words, of our own keys.
        help: A line, of our own keys.
    """

    type: str | None
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


def check_early(path: Path, overrides: Sequence[str] = ()) -> None:
    """Raise for what :func:`vlcpt.config.yaml.load_config` would refuse, as far as this needs no import.

    That is a file that is no YAML, an unknown, repeated or missing key, and a value of another type than
    its field's, where that is a plain one.

    Raises:
        ConfigError: With the message of ``load_config``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (file := Path(folder, "run.yaml")).write_text("max_lenght: 8") and None
        ...     check_early(file)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: .../run.yaml:1: max_lenght: unknown key. Did you mean max_length?
    """
    types = plain_types()
    given = read_given(path, overrides, [*types, *newer_keys()])
    for key, value in given.items():
        if (hint := types.get(key)) is not None:
            convert(value, hint)
    check_required(path, given)


def check_packages(path: Path, overrides: Sequence[str] = ()) -> None:
    """Raise where a run, of what :func:`check_early` let pass, would lack a package.

    Raises:
        ConfigError: With a line for each package, and how to install it.
    """
    given = read_given(path, overrides)
    told = [
        given[key].told(message)
        for key in NEEDING
        if key in given
        for message in missing_packages(key, _plain_value(given[key]))
    ]
    if told:
        raise ConfigError("\n".join(told))


def given_output(path: Path, overrides: Sequence[str] = ()) -> Path:
    """The ``output_dir`` of what :func:`check_early` let pass.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (file := Path(folder, "run.yaml")).write_text("output_dir: out") and None
        ...     given_output(file).relative_to(folder).name, given_output(file, ["--output_dir", "b"]).name
        ('out', 'b')
    """
    given = read_given(path, overrides)["output_dir"]
    return given.base / Path(str(convert(given, str))).expanduser()


@cache
def plain_types() -> Mapping[str, Any]:
    """The known keys, with their types where these are made of Python's own; None: an import must tell.

    Example:
        >>> types = plain_types()
        >>> types["seed"], types["max_length"], types["lr_scheduler_type"]
        (<class 'int'>, <class 'int'>, None)
    """
    same = version("transformers") == read_keys()["transformers"]
    found: dict[str, Any] = {}
    for section in SECTIONS:
        for name, key in read_keys()[section].items():
            # A release may have given a field of its own another type.
            written = key["type"] if same or section != "trainer" else None
            found[name] = None if written is None else eval(written, dict(_PLAIN))
    return found


@cache
def newer_keys() -> frozenset[str]:
    """Fields of an installed transformers that ``keys.json`` is not of; more names may be among them."""
    if version("transformers") == read_keys()["transformers"]:
        return frozenset()
    spec = find_spec("transformers")
    try:
        assert spec is not None and spec.origin is not None
        text = Path(spec.origin).with_name("training_args.py").read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    return frozenset(re.findall(r"^    (\w+)\s*:", text, re.MULTILINE))


def _is_default(key: str, value: object) -> bool:
    """Whether a key has this value where nobody sets it."""
    for section in SECTIONS:
        if key in read_keys()[section]:
            default = read_keys()[section][key].get("default")
            return type(default) is type(value) and bool(default == value)
    return False


def read_given(path: Path, overrides: Sequence[str], known: Iterable[str] | None = None) -> dict[str, Given]:
    """What the file says, and the command line over it, by key.

    Args:
        path: The YAML file.
        overrides: Tokens of the command line.
        known: The keys that there are; None if that is not known yet.

    Raises:
        ConfigError: If the file cannot be read, is no YAML or not flat; for an override that is no option;
            and for repeated and unknown keys, all in one message.

    Example:
        >>> read_given(Path("/none.yaml"), [])
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: /none.yaml: No such file or directory. Give the path of a YAML file.
    """
    wrong: list[str] = []
    given = _read_file(path, wrong) | _read_overrides(overrides)
    if known is not None:
        wrong += wrong_keys(given, set(known))
    if wrong:
        raise ConfigError("\n".join(wrong))
    return given


def wrong_keys(given: Mapping[str, Given], known: Collection[str]) -> list[str]:
    """A line for each key that there is not, or whose value is a secret that would be written down.

    Where another tool has the key, its line says what to write here; if these are several, they follow once
    more, for a person to paste.
    """
    file = {key: _plain_value(value) for key, value in given.items()}
    lines: list[str] = []
    pasted: dict[str, None] = {}
    for key, value in given.items():
        if key == "trust_remote_code":
            lines.append(value.told("no code from a model's folder or the Hub is ever run. Remove the key."))
        elif key not in known or (value.line is not None and key in synonyms("launchers")):
            message, written = _explain(value, file, known)
            lines.append(value.told(message))
            pasted |= dict.fromkeys(written)
        elif holds_secret(key, value.node):
            lines.append(value.told(_SECRET))
        elif key.endswith("_data"):
            lines += _wrong_fields(value)
    if len(pasted) > 1:
        lines += ["In their place, write:", *pasted]
    return lines


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
    told = _called(row)
    if not (lines := row.translate(file[key], file)):
        return f"{told} Remove the key.", []
    if holds_secret(key, given.node):
        return f"{told} {_SECRET}", []
    written = [_written(name, value, given) for name, value in lines.items()]
    if again := [name for name in lines if name in file]:
        return f"{told} It is {' and '.join(written)}; {again[0]} is given too. Keep one of them.", []
    if given.line is None:
        return f"{told} Write: {' '.join('--' + line.replace(': ', ' ', 1) for line in written)}", []
    written = [
        line + ("  # the default" if _is_default(name, value) else "")
        for line, (name, value) in zip(written, lines.items(), strict=True)
    ]
    return f"{told} Write: {', and '.join(written)}", written


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


def _wrong_fields(given: Given) -> Iterator[str]:
    """A line for each field that no source has."""
    known = read_keys()["source"]
    is_list = isinstance(given.node, yaml.SequenceNode)
    sources = (
        [given.inside(f"[{number}]", node) for number, node in enumerate(given.node.value)]
        if is_list
        else [given]
    )
    for source in sources:
        if isinstance(source.node, yaml.MappingNode):
            for key, node in source.node.value:
                if (name := str(key.value)) not in known:
                    part = source.inside(f".{name}", node)
                    yield part.told(_explain_field(name, part, known))


def _explain_field(name: str, given: Given, known: Collection[str]) -> str:
    """What an unknown field of a source is here, where another tool has it."""
    if (row := synonyms("source").get(name)) is None:
        return f"unknown key. {did_you_mean(name, known)}"
    told = _called(row)
    lines = row.translate(_plain_value(given), {})
    written = ", and ".join(_written(key, value, given) for key, value in lines.items())
    return f"{told} Write: {written}" if written else f"{told} Remove the key."


def _written(key: str, value: object, given: Given) -> str:
    """One line of YAML; a plain value stays as the user wrote it."""
    node = given.node
    is_plain = isinstance(node, yaml.ScalarNode) and node.style is None and not isinstance(value, bool)
    if is_plain and value == _plain_value(given):
        return f"{key}: {node.value}"
    text: str = yaml.dump([value], Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=10**9)
    return f"{key}: {text.strip()[1:-1]}"


def _plain_value(given: Given) -> object:
    try:
        return Loader("").construct_object(given.node, deep=True)
    except (yaml.YAMLError, ValueError):  # a tag that plain YAML does not have
        return None


def check_required(path: str | Path, given: Mapping[str, Given]) -> None:
    """Raise for a key without which there is no run."""
    for key in REQUIRED:
        if key not in given:
            raise ConfigError(f"{path}: {key} is missing. Add a line {key}: …")


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
        if str(key.value) in given:  # told already
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
