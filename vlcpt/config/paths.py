"""Paths of a configuration: where relative ones start, what is not there, and DeepSpeed configs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from vlcpt.config.schema import ROLES
from vlcpt.data.rows.open import SourceConfig, default_name
from vlcpt.data.rows.patterns import files_of, is_pattern

_RESUMES = ("auto", "true", "false")  # what resume_from_checkpoint takes besides a path
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def moved(key: str, value: object, base: Path, start: Path) -> object:
    """Make a relative path from ``base`` one from ``start``; leave all other values as they are.

    Example:
        >>> moved("output_dir", "out", Path("conf"), Path()), moved("run_name", "out", Path("conf"), Path())
        ('conf/out', 'out')
    """
    if key in ROLES and isinstance(value, tuple):
        return tuple(moved_source(source, base, start) for source in value)
    return _moved_path(value, base, start) if isinstance(value, str) and _is_path(key, value, base) else value


def moved_source(source: SourceConfig, base: Path, start: Path) -> SourceConfig:
    """The same for both paths of a source; a name on the Hub stays as it is."""
    path, root = source.path, source.media_root
    is_file = source.split is None or not HUB_NAME.fullmatch(path) or (base / path).exists()
    return replace(
        source,
        path=_moved_path(path, base, start) if is_file else path,
        media_root=None if root is None else _moved_path(root, base, start),
    )


def _is_path(key: str, value: str, base: Path) -> bool:
    if key.endswith("name_or_path"):
        return (base / Path(value).expanduser()).is_dir()
    # Keys that take a path, with the words that are none; JSON is none either.
    words: dict[str, Collection[str]] = {"resume_from_checkpoint": _RESUMES, "deepspeed": shipped_deepspeed()}
    words |= {"output_dir": (), "vision_cache": (), "accelerator_config": ()}
    return key in words and value not in words[key] and not value.startswith("{")


def _moved_path(path: str, base: Path, start: Path) -> str:
    """Follow links on the way, so that ``..`` means what it means to the system; keep the last part."""
    path = os.path.expanduser(path)
    if os.path.isabs(path) or "://" in path:
        return path
    folder, name = os.path.split(os.path.join(base, path))
    if name in ("", ".", ".."):
        folder, name = os.path.join(folder, name), ""
    return os.path.relpath(os.path.join(os.path.realpath(folder), name), os.path.realpath(start))


def wrong_paths(values: Mapping[str, object]) -> Iterator[str]:
    """A message for each path that is not there, or an ``output_dir`` that cannot be made. Makes nothing.

    Args:
        values: By key, as :func:`vlcpt.config.yaml.read_value` gives them.

    Example:
        >>> list(wrong_paths({"resume_from_checkpoint": "none"}))  # doctest: +ELLIPSIS
        ['resume_from_checkpoint: there is no folder none. Correct the path, or give true for ...']
    """
    for key in ROLES:
        sources = values.get(key, ())
        assert isinstance(sources, tuple)
        for number, source in enumerate(sources):
            if (message := _wrong_source(source)) is not None:
                yield f"{key}[{number}]: {message}"
    resume = values.get("resume_from_checkpoint")
    if isinstance(resume, str) and resume not in _RESUMES and not Path(resume).is_dir():
        yield (
            f"resume_from_checkpoint: there is no folder {resume}. Correct the path, or give true for the "
            "newest in output_dir, or auto to start a new run where there is none."
        )
    if isinstance(sharding := values.get("deepspeed"), str):
        try:
            read_deepspeed(sharding)
        except ValueError as error:
            yield str(error)
    if isinstance(output := values.get("output_dir"), str):
        yield from _wrong_output(Path(output))


def _wrong_source(source: SourceConfig) -> str | None:
    if "://" in source.path:
        if default_name(source.path) == Path(source.path).name:
            return None  # perhaps a prepared set; a network is needed to see
        return f"{source.path} is an address. Download the data and give the path of the file."
    if Path(source.path).exists():
        return None
    if is_pattern(source.path):
        try:
            files_of(source.path)
        except ValueError as error:
            return str(error)
    elif not (source.split and "/" in source.path and HUB_NAME.fullmatch(source.path)):
        return (
            f"{source.path}: no such file or folder. Correct the path, or for a dataset on the Hub "
            "add its split: {path: org/name, split: train}."
        )
    return None


def _wrong_output(output: Path) -> Iterator[str]:
    there = output
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        yield f"output_dir {output}: {there} is no folder. Give another one."
    # A folder that is there may be one to read only: a finished run can be measured again.
    elif there != output and not os.access(there, os.W_OK | os.X_OK):
        yield f"output_dir {output} cannot be made: {there} is not yours to write to. Give another folder."


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
