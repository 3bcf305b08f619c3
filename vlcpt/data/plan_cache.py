"""Where a data set's planning is kept: one folder for each state of each source."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from vlcpt.data.encoding import DocumentEncoder
from vlcpt.data.plan_keys import encoding_key, key_of, source_key
from vlcpt.data.readers.files import DocumentSource
from vlcpt.data.scanning import COLUMNS, MAX_PIECES, PART_COLUMNS, PIECE_ROWS
from vlcpt.data.shared_work import LONG_AGO, remove_work, unused_for

_FOLDER = re.compile(r"[0-9a-f]{32}")


class PlanCache:
    """What one data set's sources gave when they were read, for other processes and later starts.

    Args:
        path: A folder for this data set alone; made when needed, and free to be deleted at any time.
        encoding: What tokens depend on besides the documents, see
            :func:`vlcpt.data.plan_keys.encoding_key`.

    Example:
        >>> from vlcpt.data.readers.files import open_source
        >>> source = open_source([{"text": "in memory"}])
        >>> PlanCache(Path("plan"), "").folder(source, "any option") is None  # nothing tells if it changed
        True
    """

    def __init__(self, path: Path, encoding: str) -> None:
        self._path = path
        self._encoding = encoding
        self._used: set[str] = set()

    @classmethod
    def for_encoder(cls, path: str | Path, encoder: partial[DocumentEncoder]) -> PlanCache:
        """The cache of documents as an encoder with these options encodes them."""
        return cls(Path(path), encoding_key(encoder.args[0], encoder.func, encoder.keywords))

    def folder(self, source: DocumentSource, *options: object) -> Path | None:
        """Where a source's pieces are; None for one that nobody could know again.

        Args:
            source: The source, as it is now.
            options: All else that its scan depends on.
        """
        state = source_key(source)
        if state is None:
            return None
        name = key_of(self._encoding, state, options, COLUMNS, PART_COLUMNS, PIECE_ROWS, MAX_PIECES)
        self._used.add(name)
        return self._path / name

    def remove_old(self) -> None:
        """Delete what no source has asked for, unless it is so new that another machine may need it."""
        for folder in _folders(self._path):
            if folder.name not in self._used and unused_for(folder) > LONG_AGO:
                remove_work(folder)


def remove_plans(path: Path) -> None:
    """Delete the plans in a folder and in its folders, and nothing else that may be there.

    Example:
        >>> remove_plans(Path("no/such/folder"))
    """
    for folder in [*path.glob("*/"), path]:
        works = _folders(folder)
        for work in works:
            remove_work(work)
        if works and not any(folder.iterdir()):
            folder.rmdir()
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()


def _folders(path: Path) -> list[Path]:
    return [folder for folder in path.glob("*/") if _FOLDER.fullmatch(folder.name)]
