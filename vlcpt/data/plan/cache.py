"""Where a data set's planning is kept, under a key of all that it depends on."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, is_dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import xxhash
from transformers import ProcessorMixin

from vlcpt import __version__
from vlcpt.data.encode.encoder import DocumentEncoder
from vlcpt.data.plan.pieces import LONG_AGO, remove_work, unused_for
from vlcpt.data.plan.scan import COLUMNS, MAX_PIECES, PART_COLUMNS, PIECE_ROWS
from vlcpt.data.sources import DocumentSource

# Their releases may count tokens, or find a file broken, in another way.
_COUNTING = ("transformers", "tokenizers", "qwen-vl-utils", "pillow", "av")


def key_of(*parts: object) -> str:
    """32 hexadecimal digits that stand for plain values.

    Args:
        parts: Texts, numbers, None, and lists and mappings of these; dataclasses too.

    Example:
        >>> key_of("a", 1) == key_of("a", 1), key_of("a", 1) == key_of("a", 2)
        (True, False)
    """
    text = json.dumps(parts, sort_keys=True, default=_plain)
    return xxhash.xxh3_128_hexdigest(text.encode())


def encoding_key(processor: ProcessorMixin, encoder: DocumentEncoder) -> str:
    """What a document's tokens depend on besides the document: the processor, options and versions.

    Example:
        >>> from vlcpt import load_processor
        >>> from vlcpt.data.encode.options import EncodingOptions
        >>> from vlcpt.demo import base_path
        >>> processor = load_processor(base_path())
        >>> one, other = (DocumentEncoder(processor, EncodingOptions(fps=fps)) for fps in (1, 2))
        >>> encoding_key(processor, one) == encoding_key(processor, other)
        False
    """
    return key_of(
        __version__,
        _versions(),
        processor.tokenizer.backend_tokenizer.to_str(),
        *(_settings(getattr(processor, name)) for name in ("image_processor", "video_processor")),
        f"{type(encoder).__module__}.{type(encoder).__qualname__}",
        encoder.options,
    )


def source_key(source: DocumentSource) -> str | None:
    """What a source's documents depend on; None where nothing tells whether they changed.

    Files are known by path, size and time, ``datasets`` by the fingerprint they carry. Of the media that
    rows name, nothing is known: there may be millions.

    Example:
        >>> from vlcpt.data.sources import open_source
        >>> source_key(open_source([{"text": "in memory"}])) is None
        True
    """
    state = getattr(source.rows, "state", None)
    found = None if state is None else state()
    if found is None:
        return None
    ignored = [] if source.unread is None else sorted(source.unread.ignored)
    return key_of(found, len(source), source.reading, source.media_root, ignored, source.max_row_bytes)


def _settings(processor: object) -> object:
    return [type(processor).__name__, processor.to_json_string()]  # type: ignore[attr-defined]


@lru_cache
def _versions() -> list[str]:
    return [version(name) for name in _COUNTING]


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} has no key")


_FOLDER = re.compile(r"[0-9a-f]{32}")


class PlanCache:
    """What one data set's sources gave when they were read, for other processes and later starts.

    Args:
        path: A folder for this data set alone; made when needed, and free to be deleted at any time.
        encoding: What tokens depend on besides the documents, see
            :func:`vlcpt.data.plan.cache.encoding_key`.

    Example:
        >>> from vlcpt.data.sources import open_source
        >>> source = open_source([{"text": "in memory"}])
        >>> PlanCache(Path("plan"), "").folder(source, "any option") is None  # nothing tells if it changed
        True
    """

    def __init__(self, path: Path, encoding: str) -> None:
        self._path = path
        self._encoding = encoding
        self._used: set[str] = set()

    @classmethod
    def of(cls, path: str | Path, processor: ProcessorMixin, encoder: DocumentEncoder) -> PlanCache:
        """The cache of documents as this encoder encodes them."""
        return cls(Path(path), encoding_key(processor, encoder))

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
