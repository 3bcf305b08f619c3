"""What the reading of a source depends on, as one short text: equal keys, equal scans."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from functools import lru_cache
from importlib.metadata import version

import xxhash
from transformers import ProcessorMixin

from vlcpt import __version__
from vlcpt.data.readers.files import DocumentSource

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


def encoding_key(
    processor: ProcessorMixin, encoder: Callable[..., object], options: Mapping[str, object]
) -> str:
    """What a document's tokens depend on besides the document: the processor, options and versions.

    Example:
        >>> from vlcpt import load_processor
        >>> from vlcpt.demo import base_path
        >>> processor = load_processor(base_path())
        >>> encoding_key(processor, dict, {"fps": 1}) == encoding_key(processor, dict, {"fps": 2})
        False
    """
    return key_of(
        __version__,
        _versions(),
        processor.tokenizer.backend_tokenizer.to_str(),
        *(_settings(getattr(processor, name)) for name in ("image_processor", "video_processor")),
        f"{encoder.__module__}.{encoder.__qualname__}",
        options,
    )


def source_key(source: DocumentSource) -> str | None:
    """What a source's documents depend on; None where nothing tells whether they changed.

    Files are known by path, size and time, ``datasets`` by the fingerprint they carry. Of the media that
    rows name, nothing is known: there may be millions.

    Example:
        >>> from vlcpt.data.readers.files import open_source
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
