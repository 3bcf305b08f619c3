"""Is a file cut? By its end mark, or by the sizes that its header declares; no pixel is decoded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, cast

from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import STRIPBYTECOUNTS, STRIPOFFSETS, TILEBYTECOUNTS, TILEOFFSETS, TiffImageFile

from vlcpt.data.documents import Image, Medium, Video
from vlcpt.data.media.files import MediaError
from vlcpt.data.media.open import DEFAULT_LIMITS, MediaLimits, open_medium, opened_image
from vlcpt.data.media.videos import opened_video

# By Pillow's name of the format. Pixels never hold the marks of PNG and JPEG. They may hold that of a GIF by
# chance, so it counts near the end of the file alone.
_END_MARKS = {"PNG": b"\0\0\0\0IEND\xaeB`\x82", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "GIF": b"\0;"}
_PADDING = b"\0\t\n\r "
_MOST_BEHIND_GIF = 16  # bytes, besides padding
_CHUNK = 1 << 16
_START = 4096  # bytes in which the first headers of a video lie
_MATROSKA_SEGMENT = b"\x18S\x80g"


def check_container(medium: Medium, *, media_root: Path | None, limits: MediaLimits = DEFAULT_LIMITS) -> None:
    """Raise if a file ends before its end mark, or before the last byte that its header declares.

    Headers are read, and the last bytes of some images. A video that declares no size (a live WebM, a
    fragmented MP4) is read packet by packet. What is not found: damage inside a file; a cut of such a video
    between two packets; frames of an animation after the first.

    Args:
        medium: An image or a video.
        media_root: See :func:`vlcpt.data.media.files.resolve`.

    Raises:
        MediaError: If the file may not or cannot be opened, is of no kind that is read, or is cut.

    Example:
        >>> from io import BytesIO
        >>> import PIL.Image
        >>> file = BytesIO()
        >>> PIL.Image.new("L", (30, 20)).save(file, "PNG")
        >>> check_container(Image(data=file.getvalue()), media_root=None)
        >>> check_container(Image(data=file.getvalue()[:-9]), media_root=None)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        vlcpt.data.media.files.MediaError: image given as bytes is cut short: it has no end mark. Copy, ...
    """
    check = _problem_of_image if isinstance(medium, Image) else _problem_of_video
    problem = check(medium, media_root, limits)  # type: ignore[arg-type]
    if problem:
        raise MediaError(
            f"{medium} is cut short: {problem}. Copy, download or encode it again, or remove it from the row."
        )


def _problem_of_image(image: Image, media_root: Path | None, limits: MediaLimits) -> str:
    with opened_image(image, media_root, limits) as opened:
        file = cast(BinaryIO, opened.fp)
        format = str(opened.format)
        if format in _END_MARKS:
            return "" if _has_end_mark(file, format) else "it has no end mark"
        if format == "WEBP":
            end = _riff_end(_first_bytes(file))
        else:
            end = _tiff_end(opened) if isinstance(opened, TiffImageFile) else _bmp_end(opened, file)
        return _missing(end, file)


def _problem_of_video(video: Video, media_root: Path | None, limits: MediaLimits) -> str:
    with (
        open_medium(video, media_root, limits) as file,
        opened_video(video, media_root, limits) as (container, stream),
    ):
        if container.format.name == "avi":
            end = _riff_end(_first_bytes(file))
        elif container.format.name.startswith("matroska"):
            end = _matroska_end(_first_bytes(file))
        else:  # a file of fragments counts no frames in its header
            counted = 0 < stream.frames <= limits.max_video_frames
            end = max((one.pos + one.size for one in stream.index_entries), default=0) if counted else 0
        if end:
            return _missing(end, file)
        packets = 0
        for packet in container.demux(stream):
            if packet.is_corrupt:
                return f"packet {packets + 1} of its pictures is not complete"
            packets += packet.size > 0
            if packets > limits.max_video_frames:
                break  # an error where frames are chosen
        return "" if packets else "it holds no packet of its pictures"


def _missing(end: int, file: BinaryIO) -> str:
    size = file.seek(0, os.SEEK_END)
    return f"its header says that it ends at byte {end:,}, and it has {size:,}" if end > size else ""


def _first_bytes(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read(_START)


def _has_end_mark(file: BinaryIO, format: str) -> bool:
    """Whether the end mark is behind the header, which may hold a thumbnail with one of its own."""
    start, stop, mark = file.tell(), file.seek(0, os.SEEK_END), _END_MARKS[format]
    if mark == _END_MARKS["JPEG"]:  # of several pictures in one file, Pillow goes back to the first
        file.seek(0)
        JpegImageFile(file)
        start = file.tell()
    if format == "GIF":
        file.seek(max(start, stop - _CHUNK))
        return mark in file.read().rstrip(_PADDING)[-_MOST_BEHIND_GIF:]
    while stop > start:
        begin = max(start, stop - _CHUNK)
        file.seek(begin)
        if mark in file.read(stop - begin + len(mark) - 1):
            return True
        stop = begin
    return False


def _riff_end(start: bytes) -> int:
    """The end of WebP and AVI, 0 where an AVI was written without knowing it."""
    size = int.from_bytes(start[4:8], "little")
    return 0 if size in (0, 2**32 - 1) else 8 + size


def _matroska_end(start: bytes) -> int:
    """The end of the segment, 0 where it was written without knowing it."""
    place = start.find(_MATROSKA_SEGMENT) + len(_MATROSKA_SEGMENT)
    width = 9 - start[place : place + 1].rjust(1, b"\1")[0].bit_length()  # zeros before the first 1
    size = int.from_bytes(start[place : place + width], "big") - (1 << 7 * width)
    return 0 if size == (1 << 7 * width) - 1 else place + width + size


def _tiff_end(opened: TiffImageFile) -> int:
    """The end of the last strip or tile of the first page."""
    tags = opened.tag_v2
    strips = zip(tags.get(STRIPOFFSETS, ()), tags.get(STRIPBYTECOUNTS, ()), strict=False)
    tiles = zip(tags.get(TILEOFFSETS, ()), tags.get(TILEBYTECOUNTS, ()), strict=False)
    return max((place + size for place, size in (*strips, *tiles)), default=0)


def _bmp_end(opened: ImageFile, file: BinaryIO) -> int:
    """The end of the pixels; of the file where they are compressed."""
    tile = opened.tile[0]
    if tile.codec_name != "raw" or not isinstance(tile.args, tuple):
        return int.from_bytes(_first_bytes(file)[2:6], "little")
    return int(tile.offset + opened.height * tile.args[1])
