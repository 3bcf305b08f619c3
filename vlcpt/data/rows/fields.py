"""What every schema asks of a row: fields of the right type, or an error that names them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from vlcpt.data.documents import DocumentError

Row = Mapping[str, object]
_IN_BRACKETS = ' Put the reference in square brackets, as JSON has lists: ["a.png"].'


def text_field(row: Row, name: str) -> str:
    """A required string.

    Example:
        >>> text_field({"text": "a"}, "text")
        'a'
    """
    value = required_field(row, name)
    if not isinstance(value, str):
        raise DocumentError(
            f"expected a string, found {type(value).__name__}. Put the document's text there.", field=name
        )
    return value


def optional_text(row: Row, name: str) -> str:
    """A string that may be absent or null, which is an empty one.

    Example:
        >>> optional_text({"input": None}, "input")
        ''
    """
    value = row.get(name)
    return "" if value is None else text_at(value, name)


def text_at(value: object, place: str) -> str:
    """The value, which has to be a string.

    Example:
        >>> text_at("a", "texts[0]")
        'a'
    """
    if not isinstance(value, str):
        raise DocumentError(f"expected a string, found {type(value).__name__}.", field=place)
    return value


def required_field(row: Row, name: str) -> object:
    """The value of a field that has to be there.

    Example:
        >>> required_field({"text": 1}, "text")
        1
    """
    if name not in row:
        near = difflib.get_close_matches(name, map(str, row), n=1)  # in memory, keys may be anything
        hint = f"; did you mean {name!r} by {near[0]!r}?" if near else "."
        raise DocumentError(f"the field is missing{hint} Fields found: {field_names(row)}.", field=name)
    return row[name]


def list_field(row: Row, name: str, of: str = "media references") -> Sequence[object]:
    """An optional list; absent or null is an empty one.

    Example:
        >>> list_field({}, "images")
        []
    """
    value = row.get(name)
    if value is None:
        return []
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        todo = ""
        if of == "media references":  # a column of a table has one type
            todo = " Write each row's as a list, of one." if isinstance(value, bytes) else _IN_BRACKETS
            if isinstance(value, int | float):
                todo = " If it counts them, call the field otherwise."
        raise DocumentError(f"expected a list of {of}, found {type(value).__name__}.{todo}", field=name)
    return value


def required_list(row: Row, name: str, of: str) -> Sequence[object]:
    """A list that has to be there and to hold something.

    Example:
        >>> required_list({"texts": ["a"]}, "texts", "texts")
        ['a']
    """
    required_field(row, name)
    values = list_field(row, name, of)
    if not values:
        raise DocumentError(f"expected a list of {of}, found none. Remove the row.", field=name)
    return values


def is_given(value: object) -> bool:
    """Whether there is anything in a value: Arrow fills what other rows have with nulls, also inside.

    Example:
        >>> is_given({"path": None, "bytes": None}), is_given([None, []]), is_given(False)
        (False, False, True)
    """
    if isinstance(value, str | bytes):
        return bool(value)
    todo = [value]  # no recursion: rows may be nested as deeply as JSON can be read
    while todo:
        one = todo.pop()
        if isinstance(one, Mapping):
            todo += one.values()
        elif isinstance(one, list | tuple):
            todo += one
        elif one is not None:
            return True
    return False


def id_field(row: Row) -> str | None:
    """The row's own id as text; numbers are accepted.

    Example:
        >>> id_field({"id": 7})
        '7'
    """
    value = row.get("id")
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_at(value, "id")


def field_names(row: Row) -> str:
    """The names of a row's fields, for messages.

    Example:
        >>> field_names({"a": 1, "b": 2})
        "'a', 'b'"
    """
    names = ", ".join(f"{name!r:.60}" for name in list(row)[:20])
    return names + (", …" if len(row) > 20 else "") if row else "none"
