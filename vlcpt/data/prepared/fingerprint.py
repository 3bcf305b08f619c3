"""What prepared documents are encoded with, compared with how they would be encoded today."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict

import xxhash
from transformers import ProcessorMixin

from vlcpt.data.documents import DocumentError
from vlcpt.data.encode.vision import EncodingOptions
from vlcpt.data.markup import Untagged
from vlcpt.data.prepared.read import PreparedRows
from vlcpt.data.sources import DocumentSource

# To be raised whenever the same document would become other tokens or positions.
ENCODING = 1
# What is compared by a hash, which says nothing to a reader.
_HASHED = {"data": "the rows or their files were changed", "tokenizer": "the tokenizer is another one"}
# Of the image and video processors: all that a file's tokens, pixels and positions depend on.
_SETTINGS = (
    "do_convert_rgb", "do_normalize", "do_rescale", "do_resize", "image_mean", "image_std", "merge_size",
    "max_video_tokens", "patch_size", "resample", "rescale_factor", "size", "temporal_patch_size",
)  # fmt: skip


def fingerprint(processor: ProcessorMixin, untagged: Untagged, options: EncodingOptions) -> dict[str, object]:
    """What documents are encoded with: options of the configuration and settings of the processor.

    Args:
        processor: A ``Qwen2_5_VLProcessor``.
        untagged: What becomes of text without any tag.
        options: How documents are encoded.

    Returns:
        Plain JSON values, by the names that a user knows.

    Example:
        >>> from vlcpt import load_processor
        >>> from vlcpt.demo import base_path
        >>> fingerprint(load_processor(base_path()), "train", EncodingOptions(fps=1.0))["fps"]
        1.0
    """
    found: dict[str, object] = {"encoding": ENCODING, "untagged": untagged}
    found |= {name: value for name, value in vars(options).items() if name not in ("limits", "media_check")}
    found |= asdict(options.limits)
    tokenizer = processor.tokenizer.backend_tokenizer.to_str()
    found["tokenizer"] = xxhash.xxh3_64_hexdigest(tokenizer.encode())
    for name in ("image_processor", "video_processor"):
        settings = getattr(processor, name).to_dict()
        found |= {f"{name}.{key}": settings.get(key) for key in _SETTINGS}
    plain: dict[str, object] = json.loads(json.dumps(found, default=dict))
    return plain


def differences(then: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """What differs, with both values where these say something.

    Example:
        >>> differences({"fps": None, "untagged": "train"}, {"fps": 2, "untagged": "train"})
        ['fps: null then, 2 now']
    """
    keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    both = {key: f"{key}: {json.dumps(then.get(key))} then, {json.dumps(now.get(key))} now" for key in keys}
    return [_HASHED.get(key, said) for key, said in both.items()]


def require_same_encoding(
    sources: Iterable[DocumentSource],
    processor: ProcessorMixin,
    untagged: Untagged,
    options: EncodingOptions,
) -> None:
    """Raise where a prepared source would be encoded in another way today.

    Raises:
        DocumentError: With what differs, both values, and what to do.

    Example:
        >>> require_same_encoding([], None, "train", EncodingOptions())
    """
    prepared = [(source, source.rows) for source in sources if isinstance(source.rows, PreparedRows)]
    if not prepared:
        return
    now = fingerprint(processor, untagged, options)
    for source, rows in prepared:
        if found := differences(rows.contents.fingerprint, now):
            raise DocumentError(
                f"it was prepared with other options or another processor ({'; '.join(found)}). Set the "
                "configuration as it was, or run vlcpt prepare again.",
                kind="source",
                field=source.name,
            )
