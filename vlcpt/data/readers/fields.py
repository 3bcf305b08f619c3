"""What every schema asks of a row: fields of the right type, or an error that names them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from vlcpt.data.documents import DocumentError

Row = Mapping[str, object]


def text_field(row: Row, name: str) -> str:
    """A required string.

    Example:
        >>> text_field({"text": "a"}, "text")
        'a'
    """
    if name not in row:
        near = difflib.get_close_matches(name, row, n=1)
        hint = f"; did you mean {name!r} by {near[0]!r}?" if near else "."
        found = ", ".join(map(repr, row)) or "none"
        raise DocumentError(f"the field is missing{hint} Fields found: {found}.", kind="row", field=name)
    value = row[name]
    if not isinstance(value, str):
        raise DocumentError(
            f"expected a string, found {type(value).__name__}. Put the document's text there.",
            kind="row",
            field=name,
        )
    return value


def list_field(row: Row, name: str) -> Sequence[object]:
    """An optional list; absent or null is an empty one.

    Example:
        >>> list_field({}, "images")
        []
    """
    value = row.get(name)
    if value is None:
        return []
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise DocumentError(
            f"expected a list of media references, found {type(value).__name__}. "
            "Put the reference in square brackets.",
            kind="row",
            field=name,
        )
    return value


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
    raise DocumentError(f"expected a string, found {type(value).__name__}.", kind="row", field="id")
