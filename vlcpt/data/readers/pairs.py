"""Pictures and videos side by side with their texts: ``0.jpg`` and ``0.txt``, or ``0.json``, are one row."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlcpt.data.documents import DocumentError, Source
from vlcpt.data.file_states import file_state
from vlcpt.data.readers.encodings import text_of
from vlcpt.data.readers.fields import Row
from vlcpt.data.readers.rows import MAX_ROW_BYTES, check_row_size, json_object, require_regular
from vlcpt.data.readers.tars import VIDEO_SUFFIXES
from vlcpt.data.readers.unread import LONE_MEDIA, LONE_TEXTS, is_media_name, suffixes_of

# Where a .json names the files of its own key.
_NAMING = ("images", "image", "videos", "video", "messages", "segments", "image_info")


@dataclass
class _Key:
    """The files of one key, each by its path from the folder."""

    media: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)


class PairRows:
    """A row for each name of a medium and a text: fields of the ``.json``, ``caption`` from the ``.txt``.

    Args:
        folder: Where the files are, in it or in folders inside.
        keys: The files of each row.
        left_out: What else is there, by what it is.
        root: The media root; references start there.
        format: The source's format; rows of ``vlcpt`` have ``text`` and ``images``.
    """

    def __init__(
        self, folder: Path, keys: Sequence[_Key], left_out: Mapping[str, int], root: str, format: str
    ) -> None:
        self._folder = folder
        self._keys = keys
        self._left_out = dict(left_out)
        self._to_folder = os.path.relpath(folder, root)
        self._format = format
        self._most = MAX_ROW_BYTES

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

    def limit(self, most: int) -> None:
        """Refuse rows of which a text or a ``.json`` has more bytes."""
        self._most = most

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


def find_pairs(folder: Path, files: Sequence[Path], root: str, format: str = "auto") -> PairRows | None:
    """The pairs among the files of a folder; None if there are none.

    Args:
        folder: The folder.
        files: All files in it and in folders inside, in order.
        root: The media root.
        format: The source's format.

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
    return PairRows(folder, pairs, +left_out, root, format)


def _put(row: dict[str, object], paths: Sequence[str], *, as_list: bool) -> None:
    """Media into the fields of the row, alone or as lists."""
    videos = [path for path in paths if path.rpartition(".")[2].lower() in VIDEO_SUFFIXES]
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
