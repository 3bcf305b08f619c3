"""What a YAML file and the command line give, and those mistakes in it that can be told in a second.

Which keys there are is read from the source of the dataclasses, without running it: ``CPTConfig`` is a
``TrainingArguments``, which takes five to ten seconds to import, and a misspelt key should not wait for it.
"""

import ast
import builtins
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml

from vlcpt.config_checks import did_you_mean
from vlcpt.config_secrets import holds_secret
from vlcpt.config_values import Given, compose, convert
from vlcpt.errors import ConfigError

REQUIRED = ("model_name_or_path", "train_data", "output_dir")
# In this order, for a later class may say a field of an earlier one anew.
_CLASSES = (
    ("transformers", "training_args.py", ("TrainingArguments",)),
    ("vlcpt", "config.py", ("ModelConfig", "DataConfig", "CPTConfig")),
)
_PLAIN = {**vars(builtins), "Any": Any, "Literal": Literal}


def check_early(path: Path, overrides: Sequence[str] = ()) -> None:
    """Raise for what :func:`vlcpt.config_reading.load_config` would refuse, as far as this needs no import.

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
    given = read_given(path, overrides)
    types = plain_types()
    if types is None:  # transformers is not as expected: all is told later
        return
    for key, value in given.items():
        check_key(value, types)
        if (hint := types[key]) is not None:
            convert(value, hint)
    check_required(path, given)


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
def plain_types() -> Mapping[str, Any] | None:
    """The known keys, with their types where these are made of Python's own; None if the source differs.

    Example:
        >>> types = plain_types()
        >>> types["seed"], types["max_length"], types["lr_scheduler_type"]
        (<class 'int'>, <class 'int'>, None)
    """
    types: dict[str, Any] = {}
    for package, file, names in _CLASSES:
        spec = find_spec(package)
        try:
            if spec is None or spec.origin is None:
                return None
            tree = ast.parse(Path(spec.origin).with_name(file).read_text("utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError):
            return None
        classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        if not classes.keys() >= set(names):
            return None
        for name in names:
            for node in classes[name].body:
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    types[node.target.id] = _plain_type(node)
    return types


def _plain_type(node: ast.AnnAssign) -> object:
    """The type of a field; None if it needs an import, or the field has choices besides."""
    if node.value is not None and '"choices"' in ast.unparse(node.value).replace("'", '"'):
        return None
    try:
        return eval(compile(ast.Expression(node.annotation), "annotation", "eval"), dict(_PLAIN))
    except NameError:
        return None


def read_given(path: Path, overrides: Sequence[str]) -> dict[str, Given]:
    """What the file says, and the command line over it, by key.

    Raises:
        ConfigError: If the file cannot be read, is no YAML or not flat; for an override that is no option.

    Example:
        >>> read_given(Path("/none.yaml"), [])
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: /none.yaml: No such file or directory. Give the path of a YAML file.
    """
    return _read_file(path) | _read_overrides(overrides)


def check_key(given: Given, known: Iterable[str]) -> None:
    """Raise for a key that there is not, and for a secret where it would be written down."""
    if given.key == "trust_remote_code":
        raise given.error("no code from a model's folder or the Hub is ever run. Remove the key.")
    if given.key not in known:
        raise given.error(f"unknown key. {did_you_mean(given.key, known)}")
    if holds_secret(given.key, given.node):
        raise given.error(
            "it holds what looks like an access token or a password, and is written to config.yaml. "
            "Log in with `hf auth login`, or set HF_TOKEN or hub_token."
        )


def check_required(path: str | Path, given: Mapping[str, Given]) -> None:
    """Raise for a key without which there is no run."""
    for key in REQUIRED:
        if key not in given:
            raise ConfigError(f"{path}: {key} is missing. Add a line {key}: …")


def _read_file(path: Path) -> dict[str, Given]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. Give the path of a YAML file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    node = compose(text, str(path))
    if not isinstance(node, yaml.MappingNode) or node.tag != "tag:yaml.org,2002:map":
        kinds = {yaml.SequenceNode: "a list", yaml.ScalarNode: "text"}
        found = "nothing" if node is None else kinds.get(type(node), f"!<{node.tag}>")
        raise ConfigError(
            f"{path}: expected lines of key: value, found {found}. Needed are {', '.join(REQUIRED)}."
        )
    given = {}
    for key, value in node.value:
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
