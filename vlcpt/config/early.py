"""A YAML file and the command line, with paths and DeepSpeed configs: read and checked without torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_type_hints

import yaml

from vlcpt.config.keys import REQUIRED, known_types, wrong_fields, wrong_keys
from vlcpt.config.schema import ROLES, DataConfig, ModelConfig, SourceConfig
from vlcpt.config.values import NULL, Given, build, compose, convert, is_nothing
from vlcpt.data.rows.open import default_name, files_of, is_pattern
from vlcpt.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import TypeForm

T = TypeVar("T")

RESOLVED_HEADER = (
    "# The resolved configuration of a run. Paths start at this file. To repeat: --output_dir NEW\n"
)
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


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


def moved(key: str, value: object, base: Path, start: Path) -> object:
    """Make a relative path from ``base`` one from ``start``; leave all other values as they are.

    Example:
        >>> moved("output_dir", "out", Path("conf"), Path()), moved("run_name", "out", Path("conf"), Path())
        ('conf/out', 'out')
    """
    if isinstance(value, tuple):
        return tuple(
            moved_source(item, base, start) if isinstance(item, SourceConfig) else item for item in value
        )
    return _moved_path(value, base, start) if isinstance(value, str) and _is_path(key, value, base) else value


def moved_source(source: SourceConfig, base: Path, start: Path) -> SourceConfig:
    """The same for both paths of a source; a name on the Hub stays as it is."""
    on_hub = (
        source.split is not None and HUB_NAME.fullmatch(source.path) and not (base / source.path).exists()
    )
    path = source.path if on_hub else _moved_path(source.path, base, start)
    root = None if source.media_root is None else _moved_path(source.media_root, base, start)
    return SourceConfig(**{**asdict(source), "path": path, "media_root": root})


def _is_path(key: str, value: str, base: Path) -> bool:
    match key:
        case "output_dir":
            return True
        case "model_name_or_path" | "adapter_name_or_path":
            return (base / Path(value).expanduser()).is_dir()
        case "resume_from_checkpoint":
            return value not in ("auto", "true", "false")
        case "deepspeed":
            return not value.startswith("{") and value not in shipped_deepspeed()
        case "accelerator_config":
            return not value.startswith("{")
    return False


def _moved_path(path: str, base: Path, start: Path) -> str:
    """Follow links on the way, so that ``..`` means what it means to the system; keep the last part."""
    path = os.path.expanduser(path)
    if os.path.isabs(path) or "://" in path:
        return path
    folder, name = os.path.split(os.path.join(base, path))
    if name in ("", ".", ".."):
        folder, name = os.path.join(folder, name), ""
    return os.path.relpath(os.path.join(os.path.realpath(folder), name), os.path.realpath(start))


def check_paths(data: DataConfig, training: Mapping[str, object]) -> None:
    """Look, without making anything, whether data is there and the results can be.

    Raises:
        ValueError: For data, a checkpoint or a DeepSpeed config that is not there, or an ``output_dir`` that
            cannot be made.

    Example:
        >>> check_paths(DataConfig("none.jsonl"), {"output_dir": "out"})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: train_data[0]: none.jsonl: no such file or folder. Correct the path, or for ...
    """
    for key in ROLES:
        for number, source in enumerate(getattr(data, key)):
            _check_source(f"{key}[{number}]", source)
    resume = training.get("resume_from_checkpoint")
    if isinstance(resume, str) and resume not in ("auto", "true", "false") and not Path(resume).is_dir():
        raise ValueError(
            f"resume_from_checkpoint: there is no folder {resume}. Correct the path, or give true for the "
            "newest in output_dir, or auto to start a new run where there is none."
        )
    if isinstance(sharding := training.get("deepspeed"), str):
        read_deepspeed(sharding)
    _check_output(Path(str(training["output_dir"])))


def _check_source(place: str, source: SourceConfig) -> None:
    if "://" in source.path:
        if default_name(source.path) == Path(source.path).name:
            return  # perhaps of a prepared set; to look takes a network
        raise ValueError(
            f"{place}: {source.path} is an address. Download the data and give the path of the file."
        )
    if Path(source.path).exists():
        return
    if is_pattern(source.path):
        try:
            files_of(source.path)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        return
    if not (source.split and "/" in source.path and HUB_NAME.fullmatch(source.path)):
        raise ValueError(
            f"{place}: {source.path}: no such file or folder. Correct the path, or for a dataset on the Hub "
            "add its split: {path: org/name, split: train}."
        )


def _check_output(output: Path) -> None:
    there = output
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"output_dir {output}: {there} is no folder. Give another one.")
    # A folder that is there may be one to read only: a finished run can be measured again.
    if there != output and not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"output_dir {output} cannot be made: {there} is not yours to write to. Give another folder."
        )


def shipped_deepspeed() -> dict[str, Path]:
    """Map the name of each DeepSpeed config that comes with vlcpt to its file."""
    folder = files("vlcpt.deepspeed_configs")
    found = [Path(str(entry)) for entry in folder.iterdir()]
    return {path.stem: path for path in found if path.suffix == ".json"}


def read_deepspeed(given: dict[str, object] | str | None) -> dict[str, object] | None:
    """A DeepSpeed config, given as a mapping, as JSON, by its path, or by the name of a shipped one.

    Raises:
        ValueError: If it is no mapping, or there is no such file.

    Example:
        >>> read_deepspeed('{"zero_optimization": {"stage": 2}}')
        {'zero_optimization': {'stage': 2}}
        >>> read_deepspeed("zero9")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: deepspeed 'zero9' is no file and no shipped config. Shipped: ...
    """
    if not given:
        return None
    found = given
    if isinstance(given, str):
        shipped = shipped_deepspeed()
        path = shipped.get(given, Path(given).expanduser())
        try:
            found = json.loads(given if given.startswith("{") else path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"deepspeed {given} is not JSON: {error}. Correct it.") from error
        except OSError as error:
            raise ValueError(
                f"deepspeed {given!r} is no file and no shipped config. Shipped: "
                f"{', '.join(sorted(shipped))}."
            ) from error
    if not isinstance(found, dict):
        raise ValueError(f"deepspeed: expected a mapping, found {type(found).__name__}. Correct it.")
    return found
