"""Patterns of paths: which files ``*``, ``?``, ``[…]``, ``{0..9}`` and ``{a,b}`` stand for."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
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
    names = [*islice(_without_braces(rest), _MOST + 1)]
    if len(names) > _MOST:
        raise DocumentError(
            f"its braces stand for more than {_MOST:,} names. Use * for numbers.",
            kind="source",
            field=pattern,
        )
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


def _without_braces(text: str) -> Iterator[str]:
    """Every name that braces stand for; numbers have as many digits as they are written with."""
    match = _BRACES.search(text)
    if match is None:
        yield text
        return
    alternatives: Iterable[str] = match[1].split(",")
    if numbers := _RANGE.fullmatch(match.group()):
        low, high = sorted(map(int, numbers.groups()))
        is_padded = any(one.startswith("0") and len(one) > 1 for one in numbers.groups())
        width = max(map(len, numbers.groups())) if is_padded else 0
        alternatives = (f"{number:0{width}}" for number in range(low, high + 1))
    for one in alternatives:
        yield from _without_braces(text[: match.start()] + one + text[match.end() :])
