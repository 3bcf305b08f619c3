"""Features that a frozen vision tower gave for media, kept in a folder and found by content."""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import ProcessorMixin

from vlcpt.data.documents import Document, Modality, modality_of
from vlcpt.data.encode.vision import PlacedMedium, medium_errors
from vlcpt.data.media.files import media_folder
from vlcpt.data.media.open import MediaLimits, open_medium
from vlcpt.file_writes import write_file

logger = logging.getLogger(__name__)

# Part of every key: raise it when the same file gives the tower other pixels than before.
_LAYOUT = 1
_TENSOR = "features"
# What a processor's settings say beside what makes the pixels of a given grid out of given frames. The size
# limits are in the grid, and the choice of frames is kept frame by frame.
_WITHOUT_EFFECT = frozenset(
    (
        *("size", "min_pixels", "max_pixels", "processor_class", "return_metadata", "do_sample_frames"),
        *("fps", "num_frames", "min_frames", "max_frames", "max_video_tokens", "cap_pixels_per_frame"),
    )
)
_STALE = 3600  # seconds after which nobody still writes a file
_CHUNK = 2**20


@dataclass(frozen=True)
class FeatureStore:
    """The features that one vision tower gives, a file a medium, named by its key.

    A file is there completely or not at all, so any number of processes may write and read at once. One that
    was damaged later is noticed by its checksum, and counts as missing.

    Args:
        folder: That of all towers.
        tower: What the features depend on beside the medium: a digest of weights, configuration and types.
        width: Numbers of a token's features.
        dtype: The type that they are stored in; None: the one that the tower gives.
        autocast: The type of products, where the tower computes under autocast.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     store = FeatureStore(Path(folder), "tower", width=2)
        ...     store.put("medium", torch.ones(3, 2))
        ...     store.get("medium", 3).shape, store.get("medium", 4)
        (torch.Size([3, 2]), None)
    """

    folder: Path
    tower: str
    width: int
    dtype: torch.dtype | None = None
    autocast: torch.dtype | None = None

    @property
    def is_begun(self) -> bool:
        """Whether there is anything of this tower."""
        return (self.folder / self.tower).is_dir()

    def path(self, key: str) -> Path:
        """The file of a medium's features; a folder has at most a 256th of them."""
        return self.folder / self.tower / key[:2] / f"{key}.safetensors"

    def get(self, key: str, tokens: int) -> torch.Tensor | None:
        """Features (tokens, width), memory-mapped; None if there are none, or not as they were written."""
        path = self.path(key)
        try:
            if not path.is_file():  # others, such as a pipe, could be read without end
                return None
            with safe_open(path, framework="pt") as file:
                metadata, found = file.metadata() or {}, file.get_tensor(_TENSOR)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as error:
            logger.warning("%s is damaged (%s): its features are computed again.", path, error)
            return None
        if found.shape != (tokens, self.width) or metadata != {"key": key, "xxh3": _checksum(found)}:
            logger.warning("%s is damaged: its features are computed again.", path)
            return None
        return found

    def put(self, key: str, features: torch.Tensor) -> None:
        """Keep features (tokens, width), in place of those that are there.

        Raises:
            WriteError: If they cannot be written.
        """
        kept = features.detach().to("cpu", self.dtype).contiguous()
        content = save({_TENSOR: kept}, metadata={"key": key, "xxh3": _checksum(kept)})
        # Not flushed to the disk: what a machine that stops leaves behind fails its checksum.
        write_file(self.path(key), content, "features of a medium", flush=False)


def sweep(folder: Path) -> None:
    """Delete what processes left that were killed while they wrote: nothing uses it.

    Args:
        folder: That of the features of all towers.
    """
    for path in folder.glob("*/*/.*.partial"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE:
                path.unlink()


def _checksum(features: torch.Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(features.view(torch.uint8).numpy().data)


@dataclass(frozen=True)
class KeptMedium:
    """A medium whose features are in a store, or will be.

    Args:
        store: Which.
        modality: Its kind.
        key: Its name there.
        tokens: How many features there are.
        grid_thw: Its patches: time, height and width.
        is_kept: Whether they come with the sample, which then has no pixels of this medium.
    """

    store: FeatureStore
    modality: Modality
    key: str
    tokens: int
    grid_thw: tuple[int, int, int]
    is_kept: bool


class FeatureReader:
    """Finds the features of media, by the content of their files.

    Args:
        store: Where features are kept.
        processor: A ``Qwen2_5_VLProcessor``; its settings are part of the keys.
        limits: What a media file may be.
    """

    def __init__(self, store: FeatureStore, processor: ProcessorMixin, limits: MediaLimits) -> None:
        self._store, self._limits = store, limits
        # Another release may resize otherwise.
        made_by = {name: version(name) for name in ("transformers", "torchvision", "pillow", "av")}
        self._settings = {
            "image": pixel_settings({**processor.image_processor.to_dict(), "made_by": made_by}),
            "video": pixel_settings({**processor.video_processor.to_dict(), "made_by": made_by}),
        }

    def look_up(self, placed: PlacedMedium, document: Document) -> tuple[KeptMedium, torch.Tensor | None]:
        """A medium, and its features where they are kept; its file is read, and nothing of it is decoded.

        Raises:
            DocumentError: If the file cannot be read.
        """
        modality, root = modality_of(placed.medium), media_folder(document)
        with medium_errors(placed.medium, document), open_medium(placed.medium, root, self._limits) as file:
            content = content_digest(file)
        key = medium_key(content, placed, self._settings[modality])
        found = self._store.get(key, placed.tokens)
        grid, is_kept = placed.grid_thw, found is not None
        return KeptMedium(self._store, modality, key, placed.tokens, grid, is_kept), found


def pixel_settings(settings: dict[str, object]) -> str:
    """The settings of a processor that change the pixels on a given grid, as one string.

    Example:
        >>> pixel_settings({"image_mean": (0.5,), "size": {"longest_edge": 10}})
        '{"image_mean": [0.5]}'
    """
    kept = {name: value for name, value in settings.items() if name not in _WITHOUT_EFFECT}
    return json.dumps(kept, sort_keys=True, default=str)


def content_digest(file: BinaryIO) -> str:
    """The hash of a file's bytes.

    Example:
        >>> from io import BytesIO
        >>> content_digest(BytesIO(b"GIF89a")) == content_digest(BytesIO(b"GIF87a"))
        False
    """
    digest = xxhash.xxh3_128()
    while part := file.read(_CHUNK):
        digest.update(part)
    return digest.hexdigest()


def medium_key(content: str, placed: PlacedMedium, settings: str) -> str:
    """The name of a medium's features: by its content, its grid, the frames taken and how pixels are made.

    Args:
        content: See :func:`content_digest`.
        placed: The medium.
        settings: See :func:`pixel_settings`.
    """
    frames = None if placed.clip is None else placed.clip.indices
    parts = [_LAYOUT, content, placed.grid_thw, frames, settings]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())
