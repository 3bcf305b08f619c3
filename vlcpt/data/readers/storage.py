"""Where rows are stored: which files, folders and names are read, and by what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from vlcpt.data.documents import Document, DocumentError, Source
from vlcpt.data.readers.compressed import inner_name, unpacked
from vlcpt.data.readers.fields import Row
from vlcpt.data.readers.rows import (
    TEXT_SUFFIXES,
    JsonlRows,
    JsonRows,
    Rows,
    TextRows,
    files_inside,
    require_regular,
)

_COMPRESSED = (".gz", ".zst", ".zstd")
_LINES = (".jsonl", ".ndjson")
# What a folder may hold many of. Not .json: beside data, those files mostly describe it.
_SHARDS = (*_LINES, ".parquet", ".arrow", ".tar", ".tgz")
_KNOWN = ".jsonl, .json, .parquet, .arrow, .tar (these also .gz or .zst), .txt, .md"


class ChainRows:
    """The rows of several files, one after the other.

    Args:
        parts: The files' rows, in order.
    """

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def source(self, number: int) -> Source:
        part, inside = self._place(number)
        return part.source(inside)

    def row(self, number: int) -> Row | Document:
        part, inside = self._place(number)
        return part.row(inside)

    def state(self) -> list[object] | None:
        """What tells whether they changed; None if nothing does for one of them."""
        found = [part.state() if hasattr(part, "state") else None for part in self._parts]
        return None if None in found else found

    def limit(self, most: int) -> None:
        """Refuse rows of more bytes, where they are read by the row."""
        for part in self._parts:
            limit_rows(part, most)

    def only(self, columns: Iterable[str]) -> ChainRows:
        """The same rows; of tables, these columns alone."""
        columns = tuple(columns)
        return ChainRows([part.only(columns) if hasattr(part, "only") else part for part in self._parts])

    def _place(self, number: int) -> tuple[Rows, int]:
        part = int(np.searchsorted(self._ends, number, side="right"))
        return self._parts[part], number - (int(self._ends[part - 1]) if part else 0)


def open_rows(path: str | Path, *, split: str | None = None, as_text: bool = False) -> tuple[Rows, str]:
    """The rows of a file, a folder, or a data set on the Hub.

    Args:
        path: See :func:`vlcpt.data.readers.files.open_source`.
        split: Of a saved data set or one on the Hub.
        as_text: Whether a folder is read as text files, whatever else it holds.

    Returns:
        The rows, and the folder that their media paths start from and may not leave.

    Raises:
        DocumentError: If there is nothing, or nothing that can be read.

    Example:
        >>> from vlcpt.demo import data_path
        >>> len(open_rows(data_path("old_eval.jsonl"))[0]) > 0
        True
    """
    shown = str(path)
    if "://" in shown:
        raise _error(
            "an address is not opened. Download the data and give its path, or the address of what vlcpt "
            "prepare wrote.",
            shown,
        )
    file = Path(path)
    if not file.exists():
        return _hub_rows(shown, split)
    if file.is_dir():
        return _folder_rows(file, split, as_text), shown
    require_regular(file)
    if split:
        raise _error(f"split {split!r} does not apply to a file. Remove it.", shown)
    if (opener := _opener(file)) is None:
        raise _error(f"cannot read files ending in {file.suffix or 'nothing'!r}. Known: {_KNOWN}.", shown)
    return opener(), str(file.parent)


def limit_rows(rows: Rows, most: int) -> None:
    """Refuse rows of more bytes, in whatever is read by the row; tables are read by groups of them."""
    limit = getattr(rows, "limit", None)
    if limit is not None:
        limit(most)


def default_name(path: str) -> str:
    """What the ledger calls a source that has no name: its last part, without the suffixes of data files.

    Example:
        >>> default_name("data/train.jsonl.gz"), default_name("org/docs-v1.5"), default_name("data/pages/")
        ('train', 'docs-v1.5', 'pages')
    """
    name = inner_name(Path(path).name)
    stem = Path(name).stem
    known = (*_SHARDS, *TEXT_SUFFIXES, ".json")
    return stem if Path(name).suffix.lower() in known else name


def _opener(file: Path) -> Callable[[], Rows] | None:
    """What reads a file, by its name; None: nothing does."""
    suffix = Path(inner_name(file.name)).suffix.lower()
    packed = file.suffix.lower() in _COMPRESSED or file.suffix.lower() == ".tgz"
    if suffix in TEXT_SUFFIXES and not packed:
        return partial(TextRows, file)
    if suffix in _LINES:
        return lambda: JsonlRows(unpacked(file), str(file))
    if suffix == ".json":
        return lambda: _json_rows(unpacked(file), str(file))
    if suffix == ".tar":
        from vlcpt.data.readers.tars import TarRows

        return lambda: TarRows(unpacked(file), str(file))
    if suffix in (".parquet", ".arrow") and not packed:
        from vlcpt.data.readers.tables import ArrowRows, ParquetRows

        return partial(ParquetRows if suffix == ".parquet" else ArrowRows, file)
    return None


def _json_rows(file: Path, name: str) -> Rows:
    """A list, or, as many files of that name on the Hub are, one object a line."""
    with file.open("rb") as lines:
        line = lines.readline(1 << 20)  # of a list on one line, not all
    first = line.removeprefix(b"\xef\xbb\xbf").strip()
    is_object = first.startswith(b"{") and (first.endswith(b"}") or len(line) == 1 << 20)
    return JsonlRows(file, name) if is_object else JsonRows(file, name)


def _folder_rows(folder: Path, split: str | None, as_text: bool) -> Rows:
    from vlcpt.data.readers.tables import is_saved, loaded_rows, saved_rows

    if is_saved(folder):
        return saved_rows(folder, split)
    if split:
        return loaded_rows(str(folder), split)
    inside = files_inside(folder)
    texts = [file for file in inside if file.suffix.lower() in TEXT_SUFFIXES]
    shards = [file for file in inside if Path(inner_name(file.name)).suffix.lower() in _SHARDS]
    if as_text or not shards:
        if not texts and any(file.suffix.lower() == ".json" for file in inside):
            raise _error("of .json files in a folder none is read. Give the path of one file.", str(folder))
        return TextRows(folder)
    kinds = sorted({Path(inner_name(file.name)).suffix.lower() for file in shards})
    # The card of a data set is no document.
    kinds += sorted({file.suffix for file in texts if file.name != "README.md"})
    if len(kinds) > 1:
        raise _error(
            f"the folder holds files of several kinds: {', '.join(kinds)}. Give one of the files, a folder "
            "of one kind, or format: text for its text files.",
            str(folder),
        )
    for file in shards:
        require_regular(file)
    openers = [opener for file in shards if (opener := _opener(file)) is not None]
    return ChainRows([opener() for opener in openers])


def _hub_rows(name: str, split: str | None) -> tuple[Rows, str]:
    from vlcpt.data.readers.tables import is_hub_id, loaded_rows

    if not is_hub_id(name):
        raise _error(f"no such file or folder. Known: {_KNOWN}, folders of them, org/name on the Hub.", name)
    if not split:
        raise _error("no such file or folder. If it is a data set on the Hub, say which split: train.", name)
    from huggingface_hub.constants import HF_HUB_CACHE

    # What strangers wrote into its rows may name the files that came with it, and no others.
    return loaded_rows(name, split), HF_HUB_CACHE


def _error(reason: str, field: str) -> DocumentError:
    return DocumentError(reason, kind="source", field=field)
