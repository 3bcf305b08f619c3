"""Opens video inside the limits of :mod:`vlcpt.data.media.open`: which frames to take, and their pixels."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vlcpt.data.documents import Video
from vlcpt.data.media.files import MediaError
from vlcpt.data.media.open import DEFAULT_LIMITS, MediaLimits, open_medium, refuse_heif

FRAME_FACTOR = 2  # frames in one step of the model's time
MIN_FRAMES = 4

# Decoders leave out frames that cannot be shown, such as those before the first key frame.
SHOWN_SHARE = 0.95

# What PyAV raises on broken files; the fuzz in tests/data/media/test_videos.py keeps this list honest.
AV_ERRORS = (av.FFmpegError, OSError, ValueError, OverflowError, LookupError, MemoryError)

# Tables of MP4 and MOV that may count samples without a line for each: of a fragment's run, and of sizes
# where all are equal. Behind the name stand a version and flags; more of them is looked at than needed, for
# the bytes of the pictures pass by here too.
_SAMPLE_COUNTS = (
    re.compile(rb"(?s)trun(?<=\0...trun)[\0\1]\0..(....)"),
    re.compile(rb"(?s)stsz(?<=\0...stsz)\0\0..(?!\0{4})....(....)"),
)


@dataclass(frozen=True)
class Clip:
    """What sampling chose of a video.

    Args:
        height, width: Pixels of a frame, as shown: after the file's own rotation.
        total_frames: Frames in the file.
        video_fps: Frames in a second of the file.
        indices: 0-based numbers of the frames to take, ascending; an even count.

    Example:
        >>> Clip(48, 64, total_frames=40, video_fps=20.0, indices=(0, 13, 26, 39)).sample_fps
        2.0
    """

    height: int
    width: int
    total_frames: int
    video_fps: float
    indices: tuple[int, ...]

    @property
    def sample_fps(self) -> float:
        """Frames taken per second of video: what the seconds of a time step follow from."""
        return len(self.indices) / self.total_frames * self.video_fps


def clip_of(
    video: Video,
    *,
    fps: float,
    max_frames: int,
    media_root: Path | None,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> Clip:
    """Size, length and the frames to take, from the container and one decoded frame.

    One, because PyAV shows the file's rotation on frames only. Where the header does not count the
    frames (WebM, MKV, fragmented MP4), the packets are counted, not decoded.

    Args:
        fps: Frames to take per second; the video's own ``fps`` wins.
        max_frames: Frames to take at most; the video's own ``max_frames`` wins.
        media_root: See :func:`vlcpt.data.media.files.resolve`.

    Raises:
        MediaError: If the file may not or cannot be opened, is no video, or is above a limit.

    Example:
        >>> from io import BytesIO
        >>> file = BytesIO()
        >>> with av.open(file, "w", format="avi") as container:
        ...     stream = container.add_stream("mjpeg", rate=10, width=64, height=48, pix_fmt="yuvj420p")
        ...     for _ in range(20):
        ...         container.mux(stream.encode(av.VideoFrame(64, 48, "yuvj420p")))
        >>> clip_of(Video(data=file.getvalue()), fps=2.0, max_frames=768, media_root=None)
        Clip(height=48, width=64, total_frames=20, video_fps=10.0, indices=(0, 6, 13, 19))
    """
    fps = fps if video.fps is None else video.fps
    max_frames = max_frames if video.max_frames is None else video.max_frames
    with opened_video(video, media_root, limits) as (container, stream):
        total = _frames_in_header(container, stream)
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        frame, packets, measured = _packets(container, stream, 0 if total else limits.max_video_frames)
        if not total:
            total = packets
            # A header without a count often has no true rate either: screen recordings say 1000.
            if measured and abs(rate / measured - 1) > 0.1:
                rate = measured
        if frame is None or not total or not rate:
            raise MediaError(f"{video} holds no frame that can be shown. Encode it again, or remove it.")
        if total > (most := limits.max_video_frames):
            raise MediaError(
                f"{video} has over max_video_frames = {most:,} frames. Cut it, or raise the limit."
            )
        size = (frame.height, frame.width)
        height, width = reversed(size) if _quarter_turns(frame) % 2 else size
    clip = Clip(height, width, total, rate, sample_indices(total, rate, fps=fps, max_frames=max_frames))
    pixels = len(clip.indices) * height * width
    if pixels > limits.max_video_pixels:
        raise MediaError(
            f"{video}: {len(clip.indices)} frames of {height} × {width} are {pixels:,} pixels, above "
            f"max_video_pixels = {limits.max_video_pixels:,}. Lower fps or max_frames, shrink the video, "
            "or raise the limit."
        )
    return clip


def sample_indices(total_frames: int, video_fps: float, *, fps: float, max_frames: int) -> tuple[int, ...]:
    """Numbers of the frames to take: evenly spaced, first and last included, an even count.

    The rule of ``qwen_vl_utils``, written out: its own function logs a warning for each video that has fewer
    frames a second than ``fps``, and refuses a video of one frame, which is taken twice here. Its positions
    are off by a frame here and there in very long videos; these are exact. The two are compared in
    ``tests/data/media/test_videos_as_qwen_vl_utils.py``.

    Raises:
        MediaError: If ``fps`` or ``max_frames`` leaves no frames.

    Example:
        >>> sample_indices(300, 30.0, fps=0.5, max_frames=768)
        (0, 100, 199, 299)
        >>> sample_indices(1, 30.0, fps=2.0, max_frames=768)
        (0, 0)
    """
    if not fps > 0 or max_frames < FRAME_FACTOR:
        raise MediaError(f"fps = {fps} and max_frames = {max_frames}: set them above 0, and to 2 or more.")
    if total_frames == 1:
        return (0,) * FRAME_FACTOR
    largest = min(max_frames, total_frames) // FRAME_FACTOR * FRAME_FACTOR
    count = int(min(max(total_frames / video_fps * fps, MIN_FRAMES), largest) // FRAME_FACTOR * FRAME_FACTOR)
    last, steps = total_frames - 1, count - 1
    # Never half way between two frames: steps is odd.
    return tuple((2 * number * last + steps) // (2 * steps) for number in range(count))


def read_video(
    video: Video, clip: Clip, *, media_root: Path | None, limits: MediaLimits = DEFAULT_LIMITS
) -> np.ndarray:
    """The frames at ``clip.indices``, as shown: uint8 (N, height, width, 3), RGB.

    All frames up to the last index are decoded: nearly every group of pictures holds a frame to take,
    so that seeking would gain little. Where a file is complete but its decoder shows up to 5% fewer frames
    than it holds, the last one stands in for those missing at the end.

    Raises:
        MediaError: If the file may not or cannot be opened, is cut short, or cannot be decoded.

    Example:
        >>> from io import BytesIO
        >>> file = BytesIO()
        >>> with av.open(file, "w", format="avi") as container:
        ...     stream = container.add_stream("mjpeg", rate=10, width=64, height=48, pix_fmt="yuvj420p")
        ...     for _ in range(20):
        ...         container.mux(stream.encode(av.VideoFrame(64, 48, "yuvj420p")))
        >>> video = Video(data=file.getvalue())
        >>> clip = clip_of(video, fps=2.0, max_frames=768, media_root=None)
        >>> read_video(video, clip, media_root=None).shape
        (4, 48, 64, 3)
    """
    taken = np.empty((len(clip.indices), clip.height, clip.width, 3), np.uint8)
    done = shown = packets = 0
    with opened_video(video, media_root, limits) as (container, stream):
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise MediaError(f"{video} is cut short or damaged. Copy or encode it again.")
            packets += packet.size > 0 and not packet.is_discard
            for frame in packet.decode():
                while done < len(taken) and clip.indices[done] == shown:
                    taken[done] = _pixels(frame, clip)
                    done += 1
                shown += 1
            if done == len(taken):
                return taken
    if packets < clip.total_frames or shown < SHOWN_SHARE * clip.total_frames:
        raise MediaError(
            f"{video} promises {clip.total_frames} frames, but {shown} can be decoded: it is cut short or "
            "damaged. Copy or encode it again."
        )
    taken[done:] = _pixels(frame, clip)
    return taken


@contextmanager
def opened_video(
    video: Video, media_root: Path | None, limits: MediaLimits
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its picture stream. What goes wrong inside leaves as a MediaError."""
    with open_medium(video, media_root, limits) as file:
        start = file.read(64)
        file.seek(0)
        refuse_heif(video, start)
        demuxer = _demuxer(start)
        if demuxer is None:
            raise MediaError(
                f"{video} is not an MP4, MOV, WebM, MKV or AVI file; it begins with {start[:12]!r}. "
                "Convert it to one of these."
            )
        # FFmpeg looks into the first frames when it opens a file; this stops it at our limit too.
        max_pixels = {"max_pixels": str(limits.max_image_pixels)}
        try:
            # A file object and no protocol: whatever the file says, FFmpeg can open no second one.
            with av.open(
                _CountedSamples(file, video),
                "r",
                format=demuxer,
                options={"protocol_whitelist": "none", **max_pixels},
                metadata_errors="replace",
                buffer_size=2**18,
            ) as container:
                stream = _picture_stream(video, container)
                stream.codec_context.options = max_pixels
                stream.codec_context.thread_count = 1  # the loader's workers are the parallelism
                _check_frame_size(video, stream, limits)
                yield container, stream
        except MediaError:
            raise
        except AV_ERRORS as error:
            reason = error.strerror if isinstance(error, av.FFmpegError) else error  # str(error) has the path
            raise MediaError(
                f"{video} cannot be decoded ({reason}). It is cut short, damaged or unusual: encode it again "
                "as H.264 in MP4, or remove it from the row."
            ) from error


class _CountedSamples:
    """A file for FFmpeg that refuses tables of more samples than it has bytes.

    FFmpeg reserves about 40 bytes for each sample that a table promises: of a damaged file of 20 kB it
    took 4 GB and 8 seconds.
    """

    def __init__(self, file: BinaryIO, video: Video) -> None:
        self._file, self._video = file, video
        self.seek, self.tell = file.seek, file.tell
        self._size = file.seek(0, os.SEEK_END)
        file.seek(0)

    def read(self, size: int) -> bytes:
        """The next bytes, once they are looked at."""
        data = self._file.read(size)
        for found in (found for table in _SAMPLE_COUNTS for found in table.finditer(data)):
            if (count := int.from_bytes(found[1], "big")) > self._size:
                raise MediaError(
                    f"{self._video} promises {count:,} samples and has {self._size:,} bytes: it is damaged. "
                    "Copy or encode it again."
                )
        return data


def _demuxer(start: bytes) -> str | None:
    """FFmpeg's name of the container, from its first bytes: left to itself it would open playlists."""
    if start[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
        return "avi"
    if start[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        return "mov"
    return None


def _picture_stream(video: Video, container: InputContainer) -> VideoStream:
    for stream in container.streams.video:
        if stream.disposition & Disposition.attached_pic:
            continue  # the cover of a song
        if stream.codec_context is None:
            raise MediaError(f"{video} uses a codec that PyAV cannot decode. Encode it again as H.264.")
        return stream
    raise MediaError(f"{video} has no pictures: no video stream. Remove it, or give a file that has one.")


def _check_frame_size(video: Video, stream: VideoStream, limits: MediaLimits) -> None:
    height, width = stream.codec_context.height, stream.codec_context.width
    if not 0 < height * width <= limits.max_image_pixels:
        found = f"has frames of {height:,} × {width:,} pixels" if height * width else "shows no frame size"
        raise MediaError(  # FFmpeg shows none of some codecs where max_pixels stopped it
            f"{video} {found}: it is damaged, or above max_image_pixels = {limits.max_image_pixels:,}. "
            "Encode it again, smaller, or raise the limit."
        )


def _frames_in_header(container: InputContainer, stream: VideoStream) -> int:
    """Frames by the header; 0 where it does not say."""
    if stream.frames and container.format.name.startswith("mov"):
        # Trimmed on a phone: the file still holds the frames that its edit list cut away.
        return sum(not entry.is_discard for entry in stream.index_entries)
    return stream.frames


def _packets(
    container: InputContainer, stream: VideoStream, most: int
) -> tuple[VideoFrame | None, int, float | None]:
    """The first frame, then the number of packets up to ``most`` + 1, and frames a second by their times."""
    first, times, total = None, [], 0
    for packet in container.demux(stream):
        if first is None:
            first = next(iter(packet.decode()), None)
        if packet.size and not packet.is_discard:
            total += 1
            if packet.pts is not None:
                times.append(packet.pts)
        if first is not None and total > most:
            break
    span = (max(times) - min(times)) * float(stream.time_base or 0) if times else 0.0
    return first, total, (len(times) - 1) / span if span > 0 else None


def _quarter_turns(frame: VideoFrame) -> int:
    """Turns of 90° counter-clockwise that show the frame upright."""
    return round(frame.rotation / 90) % 4


def _pixels(frame: VideoFrame, clip: Clip) -> np.ndarray:
    turns = _quarter_turns(frame)
    height, width = (clip.width, clip.height) if turns % 2 else (clip.height, clip.width)
    # A stream may change its size midway; like players, show it all at the first one.
    return np.rot90(frame.to_ndarray(format="rgb24", height=height, width=width), turns)
