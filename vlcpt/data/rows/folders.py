"""Rows of folders of media: ImageFolder, VideoFolder, and pictures beside texts of their name."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from vlcpt.data.documents import Document, DocumentError, Source
from vlcpt.data.formats.markers import MEDIA_FIELDS
from vlcpt.data.media.files import LONE_MEDIA, LONE_TEXTS, UNNAMED, is_media_name, is_video_name, suffixes_of
from vlcpt.data.rows.base import (
    MAX_ROW_BYTES,
    Rows,
    check_row_size,
    file_state,
    files_inside,
    require_regular,
)
from vlcpt.data.rows.decoding import text_of
from vlcpt.data.rows.fields import Row
from vlcpt.data.rows.text_files import json_object

logger = logging.getLogger(__name__)

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# As datasets has them: file_name is the column that the builder is named after, x_file_name the column x.
_NAMES = ("file_name", "image_file_name", "video_file_name")
_LISTS = tuple(name + "s" for name in _NAMES)
_LOOKED_AT = 100  # rows
_MARKED = re.compile(r"<trainable_text|<image>|<video>|<(?:IMG|VID)\d+>")
_SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")


class MetadataRows(Rows):
    """The rows of a metadata file, with the media that they name.

    Args:
        rows: As they are stored.
        folder: The metadata file's folder.
        prefix: The way from the media root to where names start.
        numbers: Which rows; None: all.
        own: The media files of the folder that rows may name; None: all in it.
    """

    def __init__(
        self,
        rows: Rows,
        folder: Path,
        prefix: str,
        numbers: Sequence[int] | None = None,
        own: frozenset[str] | None = None,
    ) -> None:
        super().__init__(str(folder))
        self.has_columns = rows.has_columns
        self._rows = rows
        self._folder = folder
        self._prefix = prefix
        self._numbers = numbers
        self._own = own

    def __len__(self) -> int:
        return len(self._rows) if self._numbers is None else len(self._numbers)

    def source(self, number: int) -> Source:
        return self._rows.source(self._stored(number))

    def state(self) -> list[object]:
        """What tells whether they changed."""
        return [self._prefix, self._numbers, self._rows.state()]

    def only(self, columns: Iterable[str]) -> MetadataRows:
        """The same rows; of tables, these columns and those that name files."""
        rows = self._rows.only((*columns, *_NAMES, *_LISTS))
        return MetadataRows(rows, self._folder, self._prefix, self._numbers, self._own)

    def left_out(self) -> Mapping[str, int]:
        """Media files in the folder that no row names."""
        named: set[str] = set()
        for number in range(len(self)):
            named |= self.names(number)
        own = self._own
        if own is None:
            own = frozenset(os.path.relpath(file, self._folder) for file in _media_inside(self._folder))
        return {UNNAMED: len(own - named)}

    def row(self, number: int) -> Row | Document:
        stored = self._rows.row(self._stored(number))
        names = _media_names(stored)
        if not names or isinstance(stored, Document) or any(stored.get(name) for name in MEDIA_FIELDS):
            return stored
        row = {key: value for key, value in stored.items() if not _names_media(key, value)}
        # An address stays one: its error says that nothing is fetched.
        paths = [
            name if "://" in name else os.path.normpath(os.path.join(self._prefix, name)) for name in names
        ]
        # Markup numbers its files, also where there is one.
        text = row.get("text")
        as_list = isinstance(text, str) and _MARKED.search(text) is not None
        _put(row, paths, as_list=as_list)
        if len(paths) > 1 and not as_list and isinstance(text, str) and "caption" not in row:
            row["caption"] = row.pop("text")  # with several files, a text is one with markers for them
        return row

    def names(self, number: int) -> frozenset[str]:
        """The media files that a row names, from the metadata file's folder; none if it cannot be read."""
        try:
            return frozenset(map(os.path.normpath, _media_names(self._rows.row(self._stored(number)))))
        except DocumentError:
            return frozenset()  # counted, or an error, when its turn comes

    def of_split(self, own: frozenset[str], *, has_own_file: bool) -> MetadataRows:
        """The rows of a split, of which these are the media files."""
        numbers = None if has_own_file else [n for n in range(len(self)) if self.names(n) & own]
        return MetadataRows(self._rows, self._folder, self._prefix, numbers, own)

    def _stored(self, number: int) -> int:
        return number if self._numbers is None else self._numbers[number]


def image_folder(
    folder: Path,
    files: Sequence[Path],
    split: str | None,
    media_root: str | None,
    open_file: Callable[[Path], Rows],
) -> tuple[list[MetadataRows], Mapping[str, int]] | None:
    """The rows of each metadata file of a folder, and other files; None if none names media.

    Args:
        folder: The folder.
        files: All files in it and in folders inside, in order.
        split: Which split, as ``load_dataset`` finds splits in a folder; None: all.
        media_root: As the user gave it.
        open_file: Opens a metadata file.

    Raises:
        DocumentError: If one folder has two metadata files, or there is no such split.
    """
    found = [file for file in files if file.name in METADATA]
    for file, other in pairwise(found):  # sorted: those of one folder stand together
        if file.parent == other.parent:
            raise DocumentError(
                f"it holds {file.name} and {other.name}, which may be the same rows. Give the path of one.",
                kind="source",
                field=str(file.parent),
            )
    opened = {file: _as_media(open_file(file), file, media_root, str(folder)) for file in found}
    rows = {file: one for file, one in opened.items() if one is not None}
    if not rows:
        return None
    others = [file for file in files if file not in rows and not is_media_name(file.name)]
    left_out = dict(suffixes_of([file for file in others if file.name != "README.md"]))
    if split is None:
        # In their own folders, the rows know themselves what they do not name.
        described = {file.parent for file in rows}
        media = (file for file in files if is_media_name(file.name))
        left_out[UNNAMED] = sum(described.isdisjoint(file.parents) for file in media)
        splits = sorted({file.relative_to(folder).parts[0] for file in rows} & {*_SPLITS})
        if len(splits) > 1:
            logger.warning(
                "%s: %s are all read. Set split to read one of them.", folder, " and ".join(splits)
            )
        return [*rows.values()], left_out
    return _of_split(folder, rows, split), left_out


def metadata_rows(rows: Rows, file: Path, media_root: str | None) -> Rows:
    """The rows of a file that is given alone: with the media that they name, if it is a metadata file."""
    if file.name not in METADATA:
        return rows
    return _as_media(rows, file, media_root, str(file.parent)) or rows


def _as_media(rows: Rows, file: Path, media_root: str | None, folder: str) -> MetadataRows | None:
    """The rows with their media; None if they are no metadata of media.

    They are if one of the first rows names a file that is there, or if all that they name would be media:
    then a name of none is a medium that is missing. A list of source files that has a logo is neither.
    """
    media, others = [], 0
    for number in range(min(len(rows), _LOOKED_AT)):
        try:
            row = rows.row(number)
        except DocumentError:
            continue
        names = _media_names(row)
        media += names
        others += not names and isinstance(row, Mapping) and bool(row.get("file_name"))
    own = str(file.parent)
    bases = [own] if media_root is None else [media_root, own]
    there = (one for one in bases if any(os.path.isfile(os.path.join(one, name)) for name in media))
    base = next(there, None)
    if base is None and (others or not media):
        return None
    return MetadataRows(rows, file.parent, os.path.relpath(base or bases[0], media_root or folder))


def _of_split(folder: Path, rows: Mapping[Path, MetadataRows], split: str) -> list[MetadataRows]:
    """The rows that belong to a split: those of its own metadata files, or those that name its files."""
    from datasets.data_files import EmptyDatasetError, get_data_patterns, resolve_pattern

    try:
        patterns = get_data_patterns(str(folder))
    except EmptyDatasetError:
        patterns = {}
    patterns = {str(name): ways for name, ways in patterns.items()}
    if split not in patterns:
        raise DocumentError(
            f"it has no split {split!r}; it has {', '.join(patterns) or 'none'}. Correct split.",
            kind="source",
            field=str(folder),
        )
    files: set[str] = set()
    for pattern in patterns[split]:  # each way in which a folder may say it; most find nothing
        with suppress(FileNotFoundError):
            found = resolve_pattern(pattern, str(folder))
            files.update(os.path.relpath(file, os.path.abspath(folder)) for file in found)
    media = {file for file in files if is_media_name(file)}
    own = {file: one for file, one in rows.items() if str(file.relative_to(folder)) in files}
    chosen = []
    # One file for all splits: datasets reads no metadata then, but whoever wrote it meant these rows.
    for file, one in (own or rows).items():
        start = str(file.parent.relative_to(folder))
        inside = frozenset(os.path.relpath(name, start) for name in media if _is_below(name, start))
        chosen.append(one.of_split(inside, has_own_file=bool(own)))
    return chosen


def _is_below(name: str, folder: str) -> bool:
    return folder == "." or name.startswith(folder + os.sep)


def _media_inside(folder: Path) -> Iterator[Path]:
    return (file for file in files_inside(folder) if is_media_name(file.name))


def _names_media(key: object, value: object) -> bool:
    """Whether a field names media as ``datasets`` has it."""
    if key in _NAMES:
        return isinstance(value, str) and is_media_name(value)
    if key in _LISTS:
        return (
            isinstance(value, list)
            and bool(value)
            and all(isinstance(one, str) and is_media_name(one) for one in value)
        )
    return False


def _media_names(row: Row | Document) -> list[str]:
    """The names of a row's media, in order."""
    if isinstance(row, Document):
        return []
    found: list[str] = []
    for key, value in row.items():
        if _names_media(key, value):
            found += value if isinstance(value, list) else [str(value)]
    return found


# Where a .json names the files of its own key.
_NAMING = ("images", "image", "videos", "video", "messages", "segments", "image_info")


@dataclass
class _Key:
    """The files of one key, each by its path from the folder."""

    media: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)


class PairRows(Rows):
    """A row for each name of a medium and a text: fields of the ``.json``, ``caption`` from the ``.txt``.

    Args:
        folder: Where the files are, in it or in folders inside.
        keys: The files of each row.
        left_out: What else is there, by what it is.
        root: The media root; references start there.
        format: The source's format; rows of ``vlcpt`` have ``text`` and ``images``.
        max_row_bytes: See :class:`Rows`.
    """

    def __init__(
        self,
        folder: Path,
        keys: Sequence[_Key],
        left_out: Mapping[str, int],
        root: str,
        format: str,
        max_row_bytes: int,
    ) -> None:
        super().__init__(str(folder), max_row_bytes)
        self._folder = folder
        self._keys = keys
        self._left_out = dict(left_out)
        self._to_folder = os.path.relpath(folder, root)
        self._format = format

    def __len__(self) -> int:
        return len(self._keys)

    def source(self, number: int) -> Source:
        key = self._keys[number]
        return Source(str(self._folder / (key.texts or key.fields)[0]), 1)

    def state(self) -> list[object]:
        """What tells whether they changed: which files there are, and the texts themselves."""
        return [
            [key.media, [file_state(self._folder / name) for name in (*key.texts, *key.fields)]]
            for key in self._keys
        ]

    def left_out(self) -> Mapping[str, int]:
        """Files of the folder that are no part of a row, by what they are."""
        return self._left_out

    def row(self, number: int) -> Row:
        key = self._keys[number]
        for names in (key.texts, key.fields):
            if len(names) > 1:
                raise DocumentError(
                    f"{key.media[0]!r} has two texts, {names[0]!r} and {names[1]!r}. Keep one of them."
                )
        for name in (*key.texts, *key.fields):
            check_row_size((self._folder / name).stat().st_size, self._most)
        row: dict[str, object] = {}
        for name in key.fields:
            file = self._folder / name
            row = json_object(file.read_bytes(), str(file))
        media = {name: os.path.normpath(os.path.join(self._to_folder, name)) for name in key.media}
        by_name = {os.path.basename(name): path for name, path in media.items()} | media
        used: set[str] = set()
        for name in _NAMING:
            if row.get(name):
                row[name] = _with_paths(row[name], by_name, used)
        text: str | None = None
        for name in key.texts:
            file = self._folder / name
            text = text_of(file.read_bytes(), str(file))
        is_marked = self._format == "vlcpt" or (self._format == "auto" and "<trainable_text" in (text or ""))
        if text is not None:
            row["text" if is_marked else "caption"] = text
        # The .json may name other files than those beside it.
        if not used and not any(row.get(name) for name in ("images", "image", "videos", "video")):
            _put(row, [*media.values()], as_list=is_marked)
        return row


def find_pairs(
    folder: Path,
    files: Sequence[Path],
    root: str,
    format: str = "auto",
    max_row_bytes: int = MAX_ROW_BYTES,
) -> PairRows | None:
    """The pairs among the files of a folder; None if there are none.

    Args:
        folder: The folder.
        files: All files in it and in folders inside, in order.
        root: The media root.
        format: The source's format.
        max_row_bytes: See :class:`Rows`.

    Raises:
        DocumentError: If more texts stand alone than beside a medium, and no format says which are meant.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     files = [Path(folder) / name for name in ("0.jpg", "0.txt", "1.jpg")]
        ...     _ = [file.write_text("A dish.") for file in files]
        ...     rows = find_pairs(Path(folder), files, folder)
        >>> len(rows), dict(rows.left_out())
        (1, {'pictures and videos without a text': 1})
    """
    media = [file for file in files if is_media_name(file.name)]
    keys: dict[Path, _Key] = {}
    for file in media:
        keys.setdefault(file.with_suffix(""), _Key()).media.append(file.relative_to(folder).as_posix())
    known, lone_texts, others = {*media}, 0, []
    for file in files:
        suffix = file.suffix.lower()
        if suffix in (".txt", ".json"):
            stem = file.with_suffix("")
            # Some tools write a.jpg.txt beside a.jpg.
            key = keys.get(stem) or (keys.get(stem.with_suffix("")) if stem in known else None)
            if key is not None:
                (key.texts if suffix == ".txt" else key.fields).append(file.relative_to(folder).as_posix())
            elif suffix == ".txt":
                lone_texts += 1
            else:
                others.append(file)
        elif file not in known and file.name != "README.md":  # a data set's card
            others.append(file)
    pairs = [key for key in keys.values() if key.texts or key.fields]
    captioned = sum(bool(key.texts) for key in pairs)
    # Texts beside a picture with a .json of its own: a folder of texts, as it is without the picture.
    if not pairs or (lone_texts and not captioned):
        return None
    if lone_texts > captioned and format == "auto":
        raise DocumentError(
            f"{captioned:,} of its texts stand beside a picture or video of their name, and {lone_texts:,} "
            "do not. Set format: caption to read those that do, or format: text to read all texts and no "
            "picture; or give folders of one kind.",
            kind="source",
            field=str(folder),
        )
    for pair in pairs:
        for name in (*pair.texts, *pair.fields):
            require_regular(folder / name)
    left_out = Counter(
        {LONE_MEDIA: sum(len(key.media) for key in keys.values() if not (key.texts or key.fields))}
    )
    left_out[LONE_TEXTS] = lone_texts
    left_out.update(suffixes_of(others))
    return PairRows(folder, pairs, +left_out, root, format, max_row_bytes)


def _put(row: dict[str, object], paths: Sequence[str], *, as_list: bool) -> None:
    """Media into the fields of the row, alone or as lists."""
    videos = [path for path in paths if is_video_name(path)]
    images = [path for path in paths if path not in videos]
    for found, singular, plural in ((images, "image", "images"), (videos, "video", "videos")):
        if len(found) == 1 and not as_list:
            row[singular] = found[0]
        elif found:
            row[plural] = found


def _with_paths(value: object, by_name: Mapping[str, str], used: set[str]) -> object:
    """The same value, with the names of the row's own files as paths from the media root."""
    if isinstance(value, str):
        if value in by_name:
            used.add(value)
        return by_name.get(value, value)
    if isinstance(value, list):
        return [_with_paths(one, by_name, used) for one in value]
    if isinstance(value, dict):
        return {name: _with_paths(one, by_name, used) for name, one in value.items()}
    return value
