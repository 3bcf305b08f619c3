"""Whether a media file is whole, as far as its container tells without decoding.

A download that broke off or a full disk leaves files whose header is right: training would meet them at
hour nine. ``vlcpt check`` walks each container; training needs no such walk, for it decodes the pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vlcpt.data.documents import Medium
from vlcpt.data.file_parts import BrokenFileError, FileParts
from vlcpt.data.image_containers import walk_bmp, walk_gif, walk_jpeg, walk_png, walk_tiff, walk_webp
from vlcpt.data.media import DEFAULT_LIMITS, MediaError, MediaLimits, open_medium, refuse_heif
from vlcpt.data.video_containers import walk_avi, walk_matroska, walk_mp4

_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"II\0*", b"MM*\0")
_MP4_STARTS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")


def check_container(medium: Medium, *, media_root: Path | None, limits: MediaLimits = DEFAULT_LIMITS) -> None:
    """Walk the parts of a file to its end, by the sizes that they state.

    Little is read: headers, and the places between them. A fragmented MP4 without an index, or a WebM or
    AVI that was never finished, cut exactly between two parts, looks whole; damage inside a part shows only
    when it is decoded. JPEG is looked through from its end for the end marker.

    Args:
        medium: An image or a video.
        media_root: See :func:`vlcpt.data.media.resolve`.

    Raises:
        MediaError: If the file may not be opened, is of no kind that is read, or is not whole.

    Example:
        >>> from io import BytesIO
        >>> import PIL.Image
        >>> from vlcpt.data.documents import Image
        >>> file = BytesIO()
        >>> PIL.Image.new("L", (30, 20)).save(file, "PNG")
        >>> check_container(Image(data=file.getvalue()), media_root=None)
        >>> check_container(Image(data=file.getvalue()[:-20]), media_root=None)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        vlcpt.data.media.MediaError: image given as bytes is cut short or damaged: it ends after ...
    """
    with open_medium(medium, media_root, limits) as file:
        start = file.read(64)
        refuse_heif(medium, start)
        walk = _walk_of(start)
        if walk is None:
            raise MediaError(
                f"{medium} is no JPEG, PNG, WebP, GIF, BMP, TIFF, MP4, MOV, WebM, MKV or AVI file; it begins "
                f"with {start[:12]!r}. Convert it to one of these."
            )
        try:
            walk(FileParts(file))
        except BrokenFileError as error:
            raise MediaError(
                f"{medium} is cut short or damaged: {error}. Copy, download or encode it again, or remove it "
                "from the row."
            ) from None
        except OSError as error:
            raise MediaError(f"{medium} cannot be read: {error.strerror}. Check the disk.") from None


def _walk_of(start: bytes) -> Callable[[FileParts], None] | None:
    """The walk for a file that begins so."""
    if start[:8] == b"\x89PNG\r\n\x1a\n":
        return walk_png
    if start[:3] == b"\xff\xd8\xff":
        return walk_jpeg
    if start[:6] in (b"GIF87a", b"GIF89a"):
        return walk_gif
    if start[:4] in _TIFF_STARTS:
        return walk_tiff
    if start[:4] == b"RIFF":
        return {b"WEBP": walk_webp, b"AVI ": walk_avi}.get(start[8:12])
    if start[:4] == b"\x1aE\xdf\xa3":
        return walk_matroska
    if start[4:8] in _MP4_STARTS:
        return walk_mp4
    return walk_bmp if start[:2] == b"BM" else None
