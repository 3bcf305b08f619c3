"""Patterns for many files: ``shards/*.tar``, ``**/*.jsonl``, ``data-{00000..00099}.parquet``, ``{a,b}``."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from vlcpt.data.documents import DocumentError

_MOST = 1_000_000  # names that braces may stand for
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_BRACES = re.compile(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}")


def is_pattern(path: str) -> bool:
    """Whether a path that is not there may stand for several.

    Example:
        >>> is_pattern("shards/*.tar"), is_pattern("data-{0..9}.parquet"), is_pattern("data/train.jsonl")
        (True, True, False)
    """
    return bool(glob.has_magic(path) or _BRACES.search(path))


def files_of(pattern: str) -> list[Path]:
    """The files and folders that a pattern stands for, sorted by name, each once.

    Leading folders that are there by their literal names are no pattern: ``data[1]/*.tar``.

    Raises:
        DocumentError: If nothing fits, or if one of the names that braces stand for is not there.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     for name in ("b-01.tar", "b-00.tar", "c.tar"):
        ...         Path(folder, name).touch()
        ...     [path.name for path in files_of(f"{folder}/b-{{00..01}}.tar")]
        ['b-00.tar', 'b-01.tar']
    """
    start, rest = _literal_start(pattern)
    found: set[str] = set()
    missing = []
    names = _without_braces(rest, pattern)
    for name in names:
        path = os.path.join(start, name)
        if glob.has_magic(name) and not os.path.exists(path):
            inside = glob.glob(name, root_dir=start or None, recursive=True)
            found.update(os.path.join(start, one) for one in inside)
            missing += [] if inside else [path]
        elif os.path.exists(path):
            found.add(path)
        else:
            missing.append(path)
    if missing:
        of_many = f", {len(missing):,} of the {len(names):,} that the braces name" if len(names) > 1 else ""
        what = "nothing fits this pattern" if glob.has_magic(missing[0]) else "no such file or folder"
        raise DocumentError(
            f"{what}{of_many}. Correct the pattern, or put the file there.", kind="source", field=missing[0]
        )
    return [Path(path) for path in sorted(found)]


def _literal_start(pattern: str) -> tuple[str, str]:
    """The folders at the start of a pattern that are there as they are written, and the rest."""
    parts = pattern.split("/")
    start = "/" if pattern.startswith("/") else ""
    done = 0
    for number, part in enumerate(parts[:-1]):
        path = os.path.join(start, part)
        if part and not os.path.isdir(path):
            break
        start, done = path if part else start, number + 1
    return start, "/".join(parts[done:])


def _without_braces(text: str, pattern: str) -> list[str]:
    """Every name that braces stand for; numbers have as many digits as they are written with."""
    names = [text]
    while any(_BRACES.search(name) for name in names):
        opened = []
        for name in names:
            match = _BRACES.search(name)
            if match is None:
                opened.append(name)
                continue
            opened += [
                name[: match.start()] + one + name[match.end() :] for one in _alternatives(match, pattern)
            ]
            if len(opened) > _MOST:
                raise _too_many(pattern)
        names = opened
    return names


def _alternatives(match: re.Match[str], pattern: str) -> list[str]:
    numbers = _RANGE.fullmatch(match.group())
    if numbers is None:
        return match[1].split(",")
    low, high = int(numbers[1]), int(numbers[2])
    if abs(high - low) >= _MOST:
        raise _too_many(pattern)
    is_padded = any(one.startswith("0") and len(one) > 1 for one in numbers.groups())
    width = max(map(len, numbers.groups())) if is_padded else 0
    return [f"{number:0{width}}" for number in range(min(low, high), max(low, high) + 1)]


def _too_many(pattern: str) -> DocumentError:
    return DocumentError(
        f"its braces stand for more than {_MOST:,} names. Use * for numbers.", kind="source", field=pattern
    )
