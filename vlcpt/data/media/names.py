"""Names of media files: which ending is an image, which a video, and what lies beside rows."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

# HEIC and AVIF are not read, but whoever has them has pictures all the same: opening one says what it is.
IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "tif", "tiff"),
    *("heic", "heif", "avif"),
)
VIDEO_SUFFIXES = ("mp4", "m4v", "mov", "webm", "mkv", "avi")
MEDIA_SUFFIXES = frozenset((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))

# What files that are not read are called, where their suffix says less; counted by files.
BESIDE = "media files beside the rows"
LONE_MEDIA = "pictures and videos without a text"
LONE_TEXTS = "texts without a picture or video"
UNNAMED = "media files that no row names"
_MOST_BESIDE = 10_000  # entries of a folder, and of those in it
_MOST_BELOW = 3  # as images/train/000/


def is_media_name(name: str) -> bool:
    """Whether a file's name ends like an image or a video, those included that have to be converted first.

    Example:
        >>> is_media_name("a.JPG"), is_media_name("a.heic"), is_media_name("a.txt")
        (True, True, False)
    """
    return name.rpartition(".")[2].lower() in MEDIA_SUFFIXES and "." in name


def is_video_name(name: str) -> bool:
    """Whether a file's name ends like a video.

    Example:
        >>> is_video_name("a.MP4"), is_video_name("a.gif")
        (True, False)
    """
    return name.rpartition(".")[2].lower() in VIDEO_SUFFIXES


def ends_like_media(name: str) -> bool:
    """Whether a path or URL ends like a medium."""
    if "://" in name[:20]:
        name = name.partition("?")[0].partition("#")[0]
        if name.count("/") < 3:  # a host alone
            return False
    stem, point, suffix = name[-7:].rpartition(".")
    # `img_ext: ".jpg"` is a suffix and no name.
    return point == "." and suffix.lower() in MEDIA_SUFFIXES and stem[-1:] not in ("", "/", "\\")


def media_beside(media_root: str) -> int:
    """How many media files are in a folder and in some folders below; few looks, however large it is.

    Example:
        >>> media_beside("/no/such/folder")
        0
    """
    found, looked = 0, 0
    folders = [(media_root, 0)]
    for folder, below in folders:
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    looked += 1
                    if looked > _MOST_BESIDE:
                        return found
                    if entry.name.startswith("."):
                        continue
                    if below < _MOST_BELOW and entry.is_dir(follow_symlinks=False):
                        folders.append((entry.path, below + 1))
                    found += ends_like_media(entry.name)
        except OSError:
            continue
    return found


def suffixes_of(files: Iterable[Path]) -> Mapping[str, int]:
    """Files that are not read, counted by their suffixes, as :func:`list_unread` shows them.

    Example:
        >>> suffixes_of([Path("a_stats.json"), Path("b.JSON"), Path("LICENSE")])
        {'.json': 2, '. (no suffix)': 1}
    """
    return dict(Counter(file.suffix.lower() or ". (no suffix)" for file in files))
