"""Keys that stand twice in one object: JSON parsers keep the last value, and lose the other."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from vlcpt.data.documents import DocumentError

_SPACED = re.compile(rb'"\s+:')


class _Twice(NamedTuple):
    """In the place of an object that holds a key twice, itself or further inside."""

    key: str


def check_keys(data: bytes, parsed: object) -> None:
    """Raise if an object in some JSON has a key twice.

    Args:
        data: JSON that could be parsed.
        parsed: What that gave.

    Raises:
        DocumentError: That names the key.

    Example:
        >>> check_keys(b'{"text": "a", "text": "b"}', {"text": "b"})
        Traceback (most recent call last):
        vlcpt.data.documents.DocumentError: the key 'text' stands twice in one object. Rename or remove one.
    """
    if twice := _inside(_parse_again(data, parsed)):
        raise repeated(twice.key)


def rows_with_repeats(data: bytes, rows: list[object]) -> dict[int, str]:
    """The same of a list: which of its rows have a key twice, and which key.

    Example:
        >>> rows_with_repeats(b'[{"a": 1}, {"b": [{"c": 1, "c": 2}]}]', [{"a": 1}, {"b": [{"c": 2}]}])
        {1: 'c'}
    """
    again = _parse_again(data, rows)
    if not isinstance(again, list):
        return {}
    return {row: twice.key for row, one in enumerate(again) if (twice := _inside(one))}


def repeated(key: str) -> DocumentError:
    """The error about a key."""
    return DocumentError(
        f"the key {key[:100]!r} stands twice in one object. Rename or remove one.", kind="json"
    )


def _parse_again(data: bytes, parsed: object) -> object:
    """The JSON with a :class:`_Twice` where a key repeats; None if the bytes alone show that none does."""
    # With as many ends of keys as there are keys left, none was dropped.
    if data.count(b'":') == _count_keys(parsed) and not _SPACED.search(data):
        return None
    try:
        return json.loads(data, object_pairs_hook=_look)
    except RecursionError:
        raise DocumentError("not JSON that can be read: it is nested too deeply.", kind="json") from None


def _count_keys(parsed: object) -> int:
    found, todo = 0, [parsed]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            found += len(one)
            todo += one.values()
        elif isinstance(one, list):
            todo += one
    return found


def _look(pairs: list[tuple[str, object]]) -> _Twice | None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return _Twice(key)
        seen.add(key)
    return _inside([value for _, value in pairs])


def _inside(value: object) -> _Twice | None:
    if isinstance(value, list):
        return next((twice for one in value if (twice := _inside(one))), None)
    return value if isinstance(value, _Twice) else None
