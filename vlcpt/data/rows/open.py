"""Where rows are stored: which files, folders, patterns and names are read, and by what."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from vlcpt.data.documents import Document, DocumentError, Source
from vlcpt.data.media.files import is_media_name, suffixes_of
from vlcpt.data.rows.base import MAX_ROW_BYTES, Rows, files_inside, require_regular
from vlcpt.data.rows.decoding import inner_name, unpacked
from vlcpt.data.rows.delimited import DelimitedRows
from vlcpt.data.rows.fields import Row
from vlcpt.data.rows.patterns import files_of, is_pattern
from vlcpt.data.rows.text_files import TEXT_SUFFIXES, JsonRows, TextRows

_LINES = (".jsonl", ".ndjson")
# What a folder may hold many of. Not .json: beside data, those files mostly describe it.
_SHARDS = (*_LINES, ".parquet", ".arrow", ".tar", ".tgz")
_DELIMITED = (".csv", ".tsv")  # data only where nothing else is: beside data, they mostly describe it
_KNOWN = ".jsonl, .json, .csv, .tsv, .parquet, .arrow, .tar (these also .gz or .zst), .txt, .md"
_NAMED = (*_SHARDS, *_DELIMITED, *TEXT_SUFFIXES, ".json")
# Not brackets: they stand in the names of files that are there.
_UNNAMED = re.compile(r"\{[^{}]*(?:\.\.|,)[^{}]*\}|[*?]")


@dataclass(frozen=True)
class _Opening:
    """How the user wants rows to be opened.

    Args:
        format: Their schema.
        media_root: Where media paths start; None: where the data is.
        ignores_names: Whether a ``file_name`` of metadata is no medium.
        max_row_bytes: Above which a row is refused.
    """

    format: str
    media_root: str | None
    ignores_names: bool
    max_row_bytes: int


class ChainRows(Rows):
    """The rows of several files, one after the other.

    Args:
        parts: The files' rows, in order.
        left_out: Files beside them that are not read, by what they are.
        roots: The media root of each file, where they have one each.
    """

    def __init__(
        self,
        parts: Sequence[Rows],
        left_out: Mapping[str, int] | None = None,
        roots: Sequence[str] | None = None,
    ) -> None:
        super().__init__("")  # each row's place is its file's
        self.has_columns = any(part.has_columns for part in parts)
        self._parts = parts
        self._left_out = left_out or {}
        self._roots = roots
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def source(self, number: int) -> Source:
        part, inside = self._place(number)
        return self._parts[part].source(inside)

    def row(self, number: int) -> Row | Document:
        part, inside = self._place(number)
        return self._parts[part].row(inside)

    def state(self) -> list[object] | None:
        """What tells whether they changed; None if nothing does for one of them."""
        found = [part.state() for part in self._parts]
        return None if None in found else [self._roots, *found]

    def only(self, columns: Iterable[str]) -> ChainRows:
        """The same rows; of tables, these columns alone."""
        columns = tuple(columns)
        parts = [part.only(columns) for part in self._parts]
        return ChainRows(parts, self._left_out, self._roots)

    def media_root(self, number: int) -> str | None:
        """Where the media of a row start; None: where those of all rows do."""
        return None if self._roots is None else self._roots[self._place(number)[0]]

    def left_out(self) -> Mapping[str, int]:
        """Files that are not read, by what they are."""
        found = Counter(self._left_out)
        for part in self._parts:
            found.update(part.left_out())
        return found

    def _place(self, number: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._ends, number, side="right"))
        return part, number - (int(self._ends[part - 1]) if part else 0)


T = TypeVar("T")


def key(default: T, help: str) -> T:
    """A field with a default and its help text, which ``keys.json`` and the docs repeat."""
    return field(default=default, metadata={"help": help})


def needed_key(help: str) -> str:
    """A field without a default."""
    return field(metadata={"help": help})


class _OfPath(str):
    """A name that nobody gave, made of a path. A copy of the source with another path gets another one."""

    __slots__ = ()


@dataclass(frozen=True)
class SourceConfig:
    """Where rows are, and how they become documents: an entry of ``train_data`` and its like.

    Example:
        >>> SourceConfig("books/train.jsonl").name
        'train'
    """

    path: str = needed_key("A file, a folder, a pattern (data/*.jsonl), or the name of a dataset on the Hub.")
    split: str | None = key(None, "Split of a dataset, such as train. Files have none.")
    format: str = key("auto", "How rows become documents. auto: chosen by the fields of the first rows.")
    media_root: str | None = key(None, "Folder that holds all images and videos. Default: the data file's.")
    name: str = key("", "Its name in the ledger and in results. Default: the last part of path.")
    share: float | None = key(
        None, "Its part of all targets, above 0 and at most 1. Set it for all of train_data, or for none."
    )
    targets: str | None = key(
        None, "What is trained of rows without spans: assistant, last or all. Default: the format's."
    )
    chat_template: bool = key(False, "Keep the model's turn markers, of replayed chats for example.")
    ignore_fields: tuple[str, ...] = key((), "Fields of a row that are not read and not reported.")

    def __post_init__(self) -> None:
        if isinstance(self.ignore_fields, str):
            object.__setattr__(self, "ignore_fields", (self.ignore_fields,))
        if self.media_root is not None:  # Python callers may give a Path
            object.__setattr__(self, "media_root", os.fspath(self.media_root))
        if not self.name or isinstance(self.name, _OfPath):
            object.__setattr__(self, "name", _OfPath(default_name(self.path)))
        if not self.path:
            raise ValueError("path is empty. Give a file, a folder, or the name of a dataset on the Hub.")
        if not self.name:
            raise ValueError(f"path {self.path} gives no name for this source. Add one with name.")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(
                f"share {self.share} must be above 0 and at most 1: it is a part of all targets."
            )

    @property
    def is_named(self) -> bool:
        """Whether its name was given, though it may be that of its path."""
        return not isinstance(self.name, _OfPath)


def open_rows(source: SourceConfig, max_row_bytes: int = MAX_ROW_BYTES) -> tuple[Rows, str]:
    """The rows of a file, a folder, a pattern for several, or a data set on the Hub.

    Args:
        source: Where they are. With format ``text``, a folder is read as text files, whatever else it holds;
            with ``file_name`` among ``ignore_fields``, no metadata names a medium.
        max_row_bytes: A larger row is refused before it is read; tables are read by groups of rows.

    Returns:
        The rows, and the folder that their media paths start from and may not leave.

    Raises:
        DocumentError: If there is nothing, or nothing that can be read.

    Example:
        >>> from vlcpt.demo import data_path
        >>> len(open_rows(SourceConfig(str(data_path("old_eval.jsonl"))))[0]) > 0
        True
    """
    shown, split, root = source.path, source.split, source.media_root
    if "://" in shown:
        raise _error(
            "an address is not opened. Download the data and give its path, or the address of what vlcpt "
            "prepare wrote.",
            shown,
        )
    file = Path(shown)
    opening = _Opening(source.format, root, "file_name" in source.ignore_fields, max_row_bytes)
    if not file.exists():
        if is_pattern(shown):
            _refuse_split(split, "to a pattern", shown)
            return _pattern_rows(shown, opening)
        return _hub_rows(shown, split)
    if file.is_dir():
        return _folder_rows(file, split, opening), root or shown
    if split:
        raise _error(f"split {split!r} does not apply to a file. Remove it.", shown)
    rows = _open_file(file, max_row_bytes, looks_beside=source.format == "auto")
    if file.name.startswith("metadata.") and not opening.ignores_names:
        from vlcpt.data.rows.folders import metadata_rows

        rows = metadata_rows(rows, file, root)
    return rows, root or str(file.parent)


def why_empty(path: str) -> str:
    """What to do about a source without a row; of a folder, by the files that it has.

    Example:
        >>> why_empty("a.jsonl")
        'there is no row in it.'
    """
    if not os.path.isdir(path):
        return "there is no row in it."

    files = files_inside(Path(path))
    media = sum(is_media_name(file.name) for file in files)
    others = suffixes_of([file for file in files if not is_media_name(file.name)])
    reason = "there is no row in it"
    if others:
        found = ", ".join(f"{suffix} ({number:,})" for suffix, number in [*others.items()][:5])
        reason += f"; not read: {found}"
    if not media:
        return f"{reason}. Known: {_KNOWN}."
    return (
        f"{reason}; pictures and videos without a text: {media:,}. Write the text of 0.jpg into 0.txt "
        "beside it, or those of all into a metadata.jsonl with file_name and text."
    )


def default_name(path: str) -> str:
    """What the ledger calls a source that has no name: its last part, without the suffixes of data files.

    Example:
        >>> default_name("data/train.jsonl.gz"), default_name("org/docs-v1.5"), default_name("data/pages/")
        ('train', 'docs-v1.5', 'pages')
        >>> default_name("shards/*.tar"), default_name("data-{00000..00099}.parquet")
        ('shards', 'data')
    """
    name = inner_name(Path(path).name)
    if _UNNAMED.search(path) and "://" not in path:
        # What a pattern has of a name: the last part that has one.
        for part in reversed(Path(path).parts):
            part = inner_name(part)
            stem = Path(part).stem if Path(part).suffix.lower() in _NAMED else part
            if plain := _UNNAMED.sub("", stem).strip("-_. /"):
                return plain
    stem = Path(name).stem
    return stem if Path(name).suffix.lower() in _NAMED else name


def _kind(file: Path) -> str:
    """The suffix of what is in a file, without compression."""
    return Path(inner_name(file.name)).suffix.lower()


def _open_file(file: Path, most: int, *, looks_beside: bool = False) -> Rows:
    """The rows of a file, by its name; those of more than ``most`` bytes are refused."""
    require_regular(file)
    kind = _kind(file)
    is_packed = inner_name(file.name) != file.name
    if kind in TEXT_SUFFIXES and not is_packed:
        return TextRows(file.parent, [file], looks_beside=looks_beside, max_row_bytes=most)
    if kind in (*_LINES, ".json"):
        return JsonRows(unpacked(file), str(file), most)
    if kind in _DELIMITED:
        return DelimitedRows(unpacked(file), str(file), most)
    if kind == ".tar":
        from vlcpt.data.rows.tars import TarRows

        return TarRows(unpacked(file), str(file), most)
    if kind in (".parquet", ".arrow") and not is_packed:
        from vlcpt.data.rows.tables import ArrowRows, ParquetRows

        return ParquetRows(file) if kind == ".parquet" else ArrowRows(file)
    raise _error(f"cannot read files ending in {file.suffix or 'nothing'!r}. Known: {_KNOWN}.", str(file))


def _folder_rows(folder: Path, split: str | None, opening: _Opening) -> Rows:
    from vlcpt.data.rows.tables import is_saved, saved_rows

    if is_saved(folder):
        return saved_rows(folder, split)
    return _rows_of_files(folder, files_inside(folder), str(folder), split, opening)


def _pattern_rows(pattern: str, opening: _Opening) -> tuple[Rows, str]:
    """The rows of all that a pattern stands for, and the folder that holds it."""
    found = files_of(pattern)
    folders = [path for path in found if path.is_dir()]
    files = [path for path in found if not path.is_dir()]
    base = os.path.commonpath([path.parent for path in found]) or "."
    if not folders:
        return _rows_of_files(Path(base), files, pattern, None, opening), opening.media_root or base
    described = [file for file in files if _describes_a_shard(file)]
    described += [file for file in files if described and file.name.endswith("_stats.json")]
    if others := [file for file in files if file not in described]:
        raise _error(
            f"the pattern fits {len(folders):,} folders, such as {folders[0].name}, and {len(others):,} "
            f"files, such as {others[0].name}. Write one that fits folders or files alone.",
            pattern,
        )
    parts = [_folder_rows(folder, None, opening) for folder in folders]
    roots = None if opening.media_root else [str(folder) for folder in folders]

    return ChainRows(parts, suffixes_of(described), roots), opening.media_root or base


def _rows_of_files(folder: Path, files: list[Path], shown: str, split: str | None, opening: _Opening) -> Rows:
    """The rows of a folder's files, or of some of them: of one kind, or of what a tool leaves together."""
    from vlcpt.data.rows.tables import loaded_rows

    is_folder = shown == str(folder)  # and no pattern, which names its files on purpose
    texts = [file for file in files if file.suffix.lower() in TEXT_SUFFIXES]
    data_texts = [file for file in texts if file.name != "README.md"]  # the card of a data set is none
    is_text = opening.format == "text"
    if not is_text and (named := _metadata_rows(folder, files, split, opening)) is not None:
        return named
    if not (is_text and data_texts):  # with format: text, files of rows are read where no text files are
        shards = [file for file in files if _kind(file) in _SHARDS]
        described = {file for file in shards if _describes_a_shard(file)}
        shards = [file for file in shards if file not in described]
        if not shards and not is_text:
            from vlcpt.data.rows.folders import find_pairs

            root = opening.media_root or str(folder)
            pairs = find_pairs(folder, files, root, opening.format, opening.max_row_bytes)
            if pairs is not None:
                _refuse_split(split, "to a folder of media and their texts", shown)
                return pairs
        if described:
            _refuse_split(split, "to a folder that img2dataset wrote", shown)
        if split:
            return loaded_rows(str(folder), split)
        for kinds in (_DELIMITED, () if is_folder else (".json",)):
            if not shards and not data_texts:
                shards = [file for file in files if _kind(file) in kinds]
        if shards:
            _refuse_several_kinds(shards, data_texts, shown)
            beside = [file for file in files if file.suffix.lower() == ".json" and file not in shards]
            left_out = suffixes_of([*described, *beside]) if described else {}
            parts = [_open_file(file, opening.max_row_bytes) for file in shards]
            roots = [str(file.parent) for file in shards]
            # In a folder, all media paths start there; with a pattern, each at its file's folder.
            by_file = opening.media_root is None and not is_folder and len({*roots}) > 1
            return ChainRows(parts, left_out, roots if by_file else None)
    if split:
        return loaded_rows(str(folder), split)
    if not texts and any(file.suffix.lower() == ".json" for file in files):
        raise _error("of .json files in a folder none is read. Give the path of one file.", shown)
    if not texts and not is_folder:
        raise _error(f"none of {len(files):,} files is of a kind that is read. Known: {_KNOWN}.", shown)
    looks_beside = opening.format == "auto"
    return TextRows(folder, texts, looks_beside=looks_beside, max_row_bytes=opening.max_row_bytes)


def _metadata_rows(folder: Path, files: list[Path], split: str | None, opening: _Opening) -> Rows | None:
    """The rows of an ImageFolder or VideoFolder; None if it is none."""
    if opening.ignores_names or not any(file.name.startswith("metadata.") for file in files):
        return None
    from vlcpt.data.rows.folders import image_folder

    open_file = partial(_open_file, most=opening.max_row_bytes)
    found = image_folder(folder, files, split, opening.media_root, open_file)
    return None if found is None else ChainRows(*found)


def _refuse_several_kinds(shards: list[Path], texts: list[Path], shown: str) -> None:
    kinds = [*sorted({_kind(file) for file in shards}), *sorted({file.suffix for file in texts})]
    if len(kinds) > 1:
        raise _error(
            f"the folder holds files of several kinds: {', '.join(kinds)}. Give one of the files, a folder "
            "of one kind, or format: text for its text files.",
            shown,
        )


def _describes_a_shard(file: Path) -> bool:
    """Whether a table says of each file of a shard beside it where it is from, as img2dataset writes it."""
    if file.suffix.lower() != ".parquet":
        return False
    stem = file.with_suffix("")
    beside = (stem.with_name(stem.name + suffix) for suffix in (".tar", ".tgz", ".tar.gz", ".tar.zst"))
    if any(tar.is_file() for tar in beside):
        return True
    # A folder of media alone, such as train/ beside train.parquet, is what the table's rows name.
    return stem.is_dir() and any(one.suffix.lower() in (".txt", ".json") for one in stem.iterdir())


def _refuse_split(split: str | None, where: str, path: str) -> None:
    if split:
        raise _error(f"split {split!r} does not apply {where}. Remove it, or give the split's folder.", path)


def _hub_rows(name: str, split: str | None) -> tuple[Rows, str]:
    from vlcpt.data.rows.tables import is_hub_id, loaded_rows

    if not is_hub_id(name):
        raise _error(f"no such file or folder. Known: {_KNOWN}, folders of them, org/name on the Hub.", name)
    if not split:
        raise _error("no such file or folder. If it is a data set on the Hub, say which split: train.", name)
    from huggingface_hub.constants import HF_HUB_CACHE

    # What strangers wrote into its rows may name the files that came with it, and no others.
    return loaded_rows(name, split), HF_HUB_CACHE


def _error(reason: str, field: str) -> DocumentError:
    return DocumentError(reason, kind="source", field=field)
