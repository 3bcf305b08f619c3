"""Opens images, and the files of video, inside limits, or says why not."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import PIL.Image
from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE
from PIL.ImageFile import ImageFile

from vlcpt.data.documents import Image, Medium
from vlcpt.data.media.files import MediaError, heif_kind, resolve
from vlcpt.data.media.references import IMAGE_FORMATS, PILLOW_ERRORS, as_shown, orientation

_SNAPSHOT = r"datasets--(?P<name>[^/'\"]+)/snapshots/[^/'\"]+"


def without_cache(message: str) -> str:
    """A message that names files of the cache by their data set, and says nothing of this machine.

    Example:
        >>> without_cache(f"'{HF_HUB_CACHE}/datasets--org--pages/snapshots/1f0c/a.png' does not exist.")
        "'org/pages/a.png' does not exist."
    """
    for cache in {HF_HUB_CACHE, os.path.realpath(HF_HUB_CACHE)}:
        if cache in message:
            snapshot = re.compile(re.escape(cache) + "/" + _SNAPSHOT)
            message = snapshot.sub(lambda found: found["name"].replace("--", "/", 1), message)
    for cache in (HF_HUB_CACHE, os.path.realpath(HF_HUB_CACHE), HF_HOME):
        message = message.replace(cache, "(the cache of Hugging Face)")
    return message


@dataclass(frozen=True)
class MediaLimits:
    """How large a medium may be. All are checked from the file's size or header, before decoding.

    Args:
        max_file_bytes: Bytes of one file, image or video. The default is 4 GiB.
        max_image_pixels: Pixels (height × width) of one image or one frame of a video, as stored.
            Decoding takes 3 to 8 bytes for each; the default, 100 million, is a 10,000 × 10,000 image.
        max_video_frames: Frames of one video file, used or not: all are decoded up to the last that is
            used. The default, 500,000, is 4.6 hours at 30 a second.
        max_video_pixels: Pixels of all frames that are taken from one video together, 3 bytes each.
            The default, 1 billion, is 482 frames of 1920 × 1080.

    Example:
        >>> MediaLimits(max_image_pixels=50_000_000).max_file_bytes
        4294967296
    """

    max_file_bytes: int = 4 * 2**30
    max_image_pixels: int = 100_000_000
    max_video_frames: int = 500_000
    max_video_pixels: int = 1_000_000_000


DEFAULT_LIMITS = MediaLimits()
_pillow_lock = threading.Lock()

GIANT_PIXELS = 25_000_000
"""Pixels of an image that is decoded in turn: 5,000 × 5,000, above all cameras' but the largest."""


@contextmanager
def open_medium(medium: Medium, media_root: Path | None, limits: MediaLimits) -> Iterator[BinaryIO]:
    """The bytes of an image or a video, open for reading, not above ``max_file_bytes`` and not empty.

    Bytes win over a path: in a row that has both, the path is only the file's name.

    Example:
        >>> with open_medium(Image(data=b"GIF89a"), None, DEFAULT_LIMITS) as file:
        ...     file.read()
        b'GIF89a'
    """
    if medium.data is not None:
        size = len(medium.data)
        file: BinaryIO = BytesIO(medium.data)
    elif medium.path is not None:
        path = resolve(medium.path, media_root)
        try:
            file = path.open("rb")
        except OSError as error:
            raise MediaError(f"{medium} cannot be opened: {error.strerror}. Check its permissions.") from None
        size = os.fstat(file.fileno()).st_size
    else:
        raise MediaError("a media reference has neither a path nor bytes. Give one of them.")
    with file:
        if size == 0:
            raise MediaError(f"{medium} is empty (0 bytes). Write the file again, or remove it from the row.")
        if size > limits.max_file_bytes:
            raise MediaError(
                f"{medium} has {size:,} bytes, above max_file_bytes = {limits.max_file_bytes:,}. "
                "Shrink the file, or raise the limit."
            )
        yield file


def image_size(
    image: Image, *, media_root: Path | None, limits: MediaLimits = DEFAULT_LIMITS
) -> tuple[int, int]:
    """Height and width of the image as :func:`read_image` returns it, from the header alone.

    Raises:
        MediaError: If the file may not or cannot be opened, is no image, or is above a limit.

    Example:
        >>> file = BytesIO()
        >>> PIL.Image.new("L", (30, 20)).save(file, "PNG")
        >>> image_size(Image(data=file.getvalue()), media_root=None)
        (20, 30)
    """
    with opened_image(image, media_root, limits) as opened:
        width, height = opened.size
        return (width, height) if orientation(opened) >= 5 else (height, width)


def read_image(
    image: Image, *, media_root: Path | None, limits: MediaLimits = DEFAULT_LIMITS
) -> PIL.Image.Image:
    """The image's pixels: RGB, upright, on white, 8 bits a channel; a GIF's first frame.

    16 bits keep their high byte. 32-bit integers and floats have no agreed white: floats from 0 to 1
    are taken as black to white, all other values are stretched so that the least is black and the
    greatest white.

    Raises:
        MediaError: As :func:`image_size`; or if the pixels are cut short or cannot be decoded.

    Example:
        >>> file = BytesIO()
        >>> PIL.Image.new("RGBA", (1, 1), (255, 0, 0, 0)).save(file, "PNG")
        >>> read_image(Image(data=file.getvalue()), media_root=None).getpixel((0, 0))
        (255, 255, 255)
    """
    with opened_image(image, media_root, limits) as opened:
        opened.load()
        return as_shown(opened)


@contextmanager
def giants_in_turn(pixels: int) -> Iterator[None]:
    """Hold the pixels of one giant image at a time on this machine, in whatever worker or rank.

    Eight workers that each decode an image near ``max_image_pixels`` would need eight times a gigabyte at
    once. Others than giants never wait. Where a worker is killed, the system lets the next one go on.

    Args:
        pixels: Those of the image, as stored.

    Example:
        >>> with giants_in_turn(1_000_000):
        ...     pass
    """
    if pixels < GIANT_PIXELS:
        yield
        return
    path = os.path.join(tempfile.gettempdir(), f"vlcpt-giants-{os.getuid()}.lock")
    descriptor = None
    try:
        # No link is followed: the folder is everybody's. Without such a folder all decode at once.
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        _give_memory_back()
        if descriptor is not None:
            os.close(descriptor)


def _give_memory_back() -> None:
    """Let the system have what an image took: glibc keeps Pillow's blocks of 16 MB, each worker its own."""
    with suppress(AttributeError, OSError):  # other systems' C libraries know no such call
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def opened_image(image: Image, media_root: Path | None, limits: MediaLimits) -> Iterator[ImageFile]:
    """The image, its header read and checked. What goes wrong inside leaves as a MediaError."""
    with open_medium(image, media_root, limits) as file:
        try:
            # The size is for our limits to judge: Pillow's own is a global.
            with _pillow_lock:
                saved, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None
                try:
                    opened = PIL.Image.open(file, formats=IMAGE_FORMATS)
                finally:
                    PIL.Image.MAX_IMAGE_PIXELS = saved
            with opened:
                width, height = opened.size
                if width * height > limits.max_image_pixels:
                    raise MediaError(
                        f"{image} has {width:,} × {height:,} = {width * height:,} pixels, above "
                        f"max_image_pixels = {limits.max_image_pixels:,}. Shrink it, or raise the limit."
                    )
                yield opened
        except MediaError:
            raise
        except PIL.UnidentifiedImageError:
            file.seek(0)
            refuse_heif(image, file.read(64))
            file.seek(0)
            raise MediaError(
                f"{image} is not a readable JPEG, PNG, WebP, GIF, BMP or TIFF file; it begins with "
                f"{file.read(12)!r}. Convert it to one of these, or write it again if it is damaged."
            ) from None
        except PILLOW_ERRORS as error:
            raise MediaError(
                f"{image} cannot be decoded ({type(error).__name__}: {error}). It is cut short, damaged or "
                "unusual: write it again as an RGB PNG or JPEG, or remove it from the row."
            ) from error


def refuse_heif(medium: Medium, start: bytes) -> None:
    """An error for HEIC and AVIF that says what they are, and what converts them.

    Among videos too: FFmpeg would read the first picture of either, and take it for all.

    Args:
        medium: For the message.
        start: See :func:`heif_kind`.

    Example:
        >>> refuse_heif(Image("a.jpg"), b"\\0\\0\\0\\x14ftypheic\\0\\0\\0\\0mif1")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        vlcpt.data.media.files.MediaError: a.jpg is a HEIC picture, which is not read. Convert it to PNG: ...
    """
    kind = heif_kind(start)
    if kind is not None:
        raise MediaError(
            f"{medium} is {'a' if kind == 'HEIC' else 'an'} {kind} picture, which is not read. Convert it to "
            "PNG: heif-convert FILE FILE.png (libheif), or magick FILE FILE.png (ImageMagick)."
        )
