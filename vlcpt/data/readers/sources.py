"""Sources as any caller may give them, opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

from vlcpt.data.documents import DocumentError
from vlcpt.data.markup import Untagged
from vlcpt.data.readers.files import DocumentSource, open_source
from vlcpt.data.readers.prepared_folders import prepared_members
from vlcpt.data.readers.rows import MAX_ROW_BYTES
from vlcpt.data.readers.storage import default_name

Sources = str | Path | Mapping[str, object] | Sequence[object]


def open_sources(
    sources: Sources,
    untagged: Untagged,
    memory_name: str = "rows",
    role: str = "train_data",
    max_row_bytes: int = MAX_ROW_BYTES,
) -> list[DocumentSource]:
    """Sources as any caller may give them.

    Args:
        sources: A path, a mapping as in ``train_data``, or a list of these, ``DataConfig.train_data``
            included; or rows or Documents in memory, a ``datasets.Dataset`` or a list of them included.
        untagged: What becomes of text without any tag.
        memory_name: What rows in memory are called.
        role: Which sources are meant of a prepared set that holds several.
        max_row_bytes: A row of more is refused before it is read.

    Example:
        >>> [source.name for source in open_sources([{"text": "a"}, {"text": "b"}], "train")]
        ['rows']
    """
    if isinstance(sources, str | Path):
        return _open_entry({"path": sources}, untagged, role, max_row_bytes)
    if _is_dataset(sources) and (isinstance(sources, Mapping) or not hasattr(sources, "__len__")):
        return [open_source(sources, name=memory_name)]  # type: ignore[arg-type]  # says to choose a split
    if isinstance(sources, Mapping) or is_dataclass(sources):
        return _open_entry(_mapping(sources), untagged, role, max_row_bytes)
    if not len(sources):
        return []
    is_list = isinstance(sources, list | tuple)
    if is_list and all(isinstance(one, str | Path) or _is_source(one) for one in sources):
        opened: list[DocumentSource] = []
        for one in sources:
            opened += open_sources(one, untagged, role=role, max_row_bytes=max_row_bytes)  # type: ignore[arg-type]
        return opened
    if is_list and all(_is_dataset(one) for one in sources):
        names = (
            memory_name if not number else f"{memory_name}-{number + 1}" for number in range(len(sources))
        )
        return [
            open_source(one, untagged=untagged, name=name)  # type: ignore[arg-type]
            for one, name in zip(sources, names, strict=True)
        ]
    return [open_source(sources, untagged=untagged, name=memory_name)]


_SOURCE_KEYS = {
    *("path", "split", "format", "media_root", "name", "share", "targets", "chat_template"),
    "ignore_fields",
}


def _is_source(one: object) -> bool:
    """Whether this says where rows are, and is no row itself."""
    if isinstance(one, Mapping):
        return "path" in one and one.keys() <= _SOURCE_KEYS
    # An entry of DataConfig, by its fields: no configuration class is known here.
    return is_dataclass(one) and {field.name for field in fields(one)} == _SOURCE_KEYS


def _mapping(entry: object) -> Mapping[str, object]:
    if isinstance(entry, Mapping):
        return entry
    values = {field.name: getattr(entry, field.name) for field in fields(entry)}  # type: ignore[arg-type]
    return {key: value for key, value in values.items() if value is not None}


def _is_dataset(one: object) -> bool:
    return type(one).__module__.split(".")[0] == "datasets"


def _open_entry(
    entry: Mapping[str, object], untagged: Untagged, role: str, max_row_bytes: int
) -> list[DocumentSource]:
    if not _is_source(entry):
        raise DocumentError(
            f"a source is a mapping with 'path' and perhaps {', '.join(sorted(_SOURCE_KEYS - {'path'}))}; "
            f"found {', '.join(map(repr, entry)) or 'nothing'}.",
            kind="source",
        )
    return [
        open_source(untagged=untagged, max_row_bytes=max_row_bytes, **values)  # type: ignore[arg-type]
        for values in entries_of(entry, role)
    ]


def entries_of(entry: Mapping[str, object], role: str) -> list[dict[str, object]]:
    """An entry as it is, or for a prepared set one entry for each of its sources with this role.

    Args:
        entry: As in ``train_data``.
        role: The configuration's key that it stands under.

    Raises:
        DocumentError: If the set holds none, or what is said of one source stands with several.

    Example:
        >>> entries_of({"path": "no/such/file"}, "train_data")
        [{'path': 'no/such/file'}]
    """
    path = str(entry["path"])
    members = prepared_members(path) if isinstance(entry["path"], str | Path) else None
    if members is None or members[0].role == "":
        return [dict(entry)]
    wanted = [member for member in members if member.role == role]
    if not wanted:
        there = ", ".join(f"{member.role} {member.name}" for member in members)
        raise DocumentError(
            f"it was prepared without {role}; it holds {there}. Give the folder of the source that is meant.",
            kind="source",
            field=path,
        )
    given = {key: value for key, value in entry.items() if key not in ("path", "name")}
    if entry.get("name", default_name(path)) != default_name(path):
        given["name"] = entry["name"]
    if len(wanted) > 1 and (alone := given.keys() & {"name", "share"}):
        folders = ", ".join(member.path for member in wanted)
        raise DocumentError(
            f"{' and '.join(sorted(alone))} cannot be set for {len(wanted)} sources at once. Give each its "
            f"own entry: {folders}.",
            kind="source",
            field=path,
        )
    own = [
        {"path": member.path, "name": member.name} | ({} if member.share is None else {"share": member.share})
        for member in wanted
    ]
    return [one | given for one in own]


def distinct(sources: list[DocumentSource]) -> list[DocumentSource]:
    """The same sources, or an error if two have one name."""
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise DocumentError(
                f"two sources are called {name!r}. Give each its own 'name'.", kind="source", field="name"
            )
    return sources
