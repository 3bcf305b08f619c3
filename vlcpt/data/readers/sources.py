"""Sources as any caller may give them, opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vlcpt.data.documents import DocumentError
from vlcpt.data.markup import Untagged
from vlcpt.data.readers.files import DocumentSource, open_source

Sources = str | Path | Mapping[str, object] | Sequence[object]


def open_sources(sources: Sources, untagged: Untagged, memory_name: str = "rows") -> list[DocumentSource]:
    """Sources as any caller may give them.

    Args:
        sources: A path, a mapping as in ``train_data``, or a list of these; or rows or Documents in
            memory, a ``datasets.Dataset`` or a list of them included.
        untagged: What becomes of text without any tag.
        memory_name: What rows in memory are called.

    Example:
        >>> [source.name for source in open_sources([{"text": "a"}, {"text": "b"}], "train")]
        ['rows']
    """
    if isinstance(sources, str | Path):
        return [open_source(sources, untagged=untagged)]
    if isinstance(sources, Mapping):
        return [_open_mapping(sources, untagged)]
    if not len(sources):
        return []
    is_list = isinstance(sources, list | tuple)
    if is_list and all(isinstance(one, str | Path) or _is_source(one) for one in sources):
        opened: list[DocumentSource] = []
        for one in sources:
            opened += open_sources(one, untagged) if isinstance(one, str | Path | Mapping) else []
        return opened
    if is_list and all(_is_dataset(one) for one in sources):
        names = (
            memory_name if not number else f"{memory_name}-{number + 1}" for number in range(len(sources))
        )
        datasets = [one for one in sources if isinstance(one, Sequence)]
        return [
            open_source(one, untagged=untagged, name=name) for one, name in zip(datasets, names, strict=True)
        ]
    return [open_source(sources, untagged=untagged, name=memory_name)]


_SOURCE_KEYS = {"path", "split", "format", "media_root", "name", "share", "targets", "chat_template"}


def _is_source(one: object) -> bool:
    """Whether this says where rows are, and is no row itself."""
    return isinstance(one, Mapping) and "path" in one and one.keys() <= _SOURCE_KEYS


def _is_dataset(one: object) -> bool:
    return type(one).__module__.split(".")[0] == "datasets"


def _open_mapping(entry: Mapping[str, object], untagged: Untagged) -> DocumentSource:
    if not _is_source(entry):
        raise DocumentError(
            f"a source is a mapping with 'path' and perhaps {', '.join(sorted(_SOURCE_KEYS - {'path'}))}; "
            f"found {', '.join(map(repr, entry)) or 'nothing'}.",
            kind="source",
        )
    values = {key: value for key, value in entry.items() if key != "path"}
    return open_source(entry["path"], untagged=untagged, **values)  # type: ignore[arg-type]


def distinct(sources: list[DocumentSource]) -> list[DocumentSource]:
    """The same sources, or an error if two have one name."""
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise DocumentError(
                f"two sources are called {name!r}. Give each its own 'name'.", kind="source", field="name"
            )
    return sources
