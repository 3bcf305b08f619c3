"""Video: which frames are taken, that they are those frames, and what is refused."""

from __future__ import annotations

import random
import struct
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest

from vlcpt.data.documents import Video
from vlcpt.data.media.open import MediaError, MediaLimits
from vlcpt.data.media.videos import Clip, clip_of, read_video, sample_indices

STEP = 10  # brightness from one frame to the next


def encoded(
    frames: int = 24,
    *,
    format: str = "mp4",
    codec: str = "libx264",
    rate: int = 12,
    size: tuple[int, int] = (48, 64),
    rotation: int = 0,
    milliseconds: list[int] | None = None,
    noise: bool = False,
    path: Path | None = None,
    **options: str,
) -> bytes:
    """A video whose frame n has the brightness 10·n (modulo 250), with a white top left quarter."""
    file, (height, width) = BytesIO(), size
    rng = np.random.default_rng(0)
    with av.open(path or file, "w", format=format, options=options) as container:
        stream = container.add_stream(codec, rate=rate, width=width, height=height)
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = 8
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            pixels = np.full((height, width, 3), number * STEP % 250, np.uint8)
            pixels[: height // 4, : width // 4] = 255
            if noise:
                pixels = rng.integers(0, 256, pixels.shape, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels)
            if milliseconds:
                frame.pts, frame.time_base = milliseconds[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes() if path else file.getvalue()


def clip(data: bytes, *, fps: float = 2.0, max_frames: int = 768, **limits: int) -> Clip:
    return clip_of(
        Video(data=data), fps=fps, max_frames=max_frames, media_root=None, limits=MediaLimits(**limits)
    )


def read(data: bytes, chosen: Clip) -> np.ndarray:
    return read_video(Video(data=data), chosen, media_root=None)


def numbers(frames: np.ndarray) -> list[float]:
    """Which frame each is, by the brightness of its bottom right quarter."""
    height, width = frames.shape[1:3]
    return (frames[:, height // 2 :, width // 2 :].mean(axis=(1, 2, 3)) / STEP).tolist()


# Which frames


@pytest.mark.parametrize(
    ("format", "codec"),
    [
        ("mp4", "libx264"),
        ("mp4", "mpeg4"),
        ("mov", "libx264"),
        ("webm", "libvpx"),
        ("webm", "libvpx-vp9"),
        ("matroska", "libx264"),
        ("avi", "mpeg4"),
        ("avi", "mjpeg"),
    ],
)
def test_each_container_gives_the_frames_that_were_asked_for(format: str, codec: str) -> None:
    data = encoded(24, format=format, codec=codec)

    chosen = clip(data, fps=3.0)

    assert chosen == Clip(48, 64, total_frames=24, video_fps=12.0, indices=(0, 5, 9, 14, 18, 23))
    frames = read(data, chosen)
    assert frames.dtype == np.uint8
    assert frames.shape == (6, 48, 64, 3)
    assert numbers(frames) == pytest.approx(chosen.indices, abs=0.4)


def test_a_fragmented_mp4_is_counted_by_its_packets() -> None:
    data = encoded(24, movflags="frag_keyframe+empty_moov")
    with av.open(BytesIO(data)) as container:
        assert container.streams.video[0].frames == 0  # or this shows nothing

    assert clip(data).total_frames == 24
    assert numbers(read(data, clip(data))) == pytest.approx([0, 8, 15, 23], abs=0.4)


def test_frames_that_an_edit_list_cuts_away_do_not_count() -> None:
    data = bytearray(encoded(24))
    at = data.index(b"elst") + 12  # duration, then start: one edit, twelve frames later and shorter
    duration, start = struct.unpack(">ii", data[at : at + 8])
    ticks = 1024  # a frame in the stream's time base
    data[at : at + 8] = struct.pack(">ii", duration // 2, start + 12 * ticks)

    chosen = clip(bytes(data), fps=12.0)

    assert (chosen.total_frames, chosen.video_fps) == (12, 12.0)
    assert numbers(read(bytes(data), chosen)) == pytest.approx(range(12, 24), abs=0.4)


@pytest.mark.parametrize("format", ["mp4", "matroska"])
@pytest.mark.parametrize(
    ("rotation", "corner"), [(90, "bottom left"), (180, "bottom right"), (-90, "top right")]
)
def test_the_files_rotation_is_applied_to_size_and_frames(format: str, rotation: int, corner: str) -> None:
    data = encoded(8, format=format, rotation=rotation)

    chosen = clip(data)
    frame = read(data, chosen)[1]

    assert (chosen.height, chosen.width) == ((48, 64) if rotation == 180 else (64, 48))
    assert frame.shape == (chosen.height, chosen.width, 3)
    white = {
        "top left": frame[0, 0],
        "top right": frame[0, -1],
        "bottom left": frame[-1, 0],
        "bottom right": frame[-1, -1],
    }
    assert [name for name, pixel in white.items() if pixel.min() > 200] == [corner]


def test_colors_are_those_of_an_independent_decoder() -> None:
    """Frame 12 of the JPEG codec against Pillow's reading of the same JPEG."""
    data = encoded(24, format="avi", codec="mjpeg")
    with av.open(BytesIO(data)) as container:
        jpegs = [bytes(packet) for packet in container.demux(video=0) if packet.size]

    ours = read(data, Clip(48, 64, 24, 12.0, (12,)))[0]

    pillow = np.asarray(PIL.Image.open(BytesIO(jpegs[12])).convert("RGB"))
    assert np.abs(ours.astype(int) - pillow).max() <= 3


def test_a_video_of_one_frame_is_taken_twice() -> None:
    data = encoded(1)

    chosen = clip(data)

    assert (chosen.total_frames, chosen.indices) == (1, (0, 0))
    assert numbers(read(data, chosen)) == pytest.approx([0, 0], abs=0.4)


@pytest.mark.parametrize(
    ("frames", "indices"), [(2, (0, 1)), (3, (0, 2)), (4, (0, 1, 2, 3)), (5, (0, 1, 3, 4))]
)
def test_short_videos_give_an_even_number_of_frames(frames: int, indices: tuple[int, ...]) -> None:
    data = encoded(frames)

    assert clip(data).indices == indices
    assert numbers(read(data, clip(data))) == pytest.approx(indices, abs=0.4)


def test_a_videos_own_fps_and_max_frames_win() -> None:
    data = encoded(24)

    def count(**own: float) -> int:
        video = Video(data=data, **own)
        return len(clip_of(video, fps=3.0, max_frames=768, media_root=None).indices)

    assert (count(), count(fps=6.0), count(max_frames=4)) == (6, 12, 4)


def test_sample_fps_is_frames_taken_per_second() -> None:
    chosen = clip(encoded(24), fps=3.0)

    assert len(chosen.indices) / 3.0 == 24 / 12  # seconds
    assert chosen.sample_fps == 3.0


def test_a_header_with_a_false_rate_does_not_change_the_pace() -> None:
    """A screen recording: 20 frames in 6 seconds, in a file that claims 12 a second."""
    data = encoded(20, format="webm", codec="libvpx", milliseconds=[number * 300 for number in range(20)])
    with av.open(BytesIO(data)) as container:
        assert container.streams.video[0].average_rate == 12  # or this shows nothing

    assert clip(data).video_fps == pytest.approx(1000 / 300, rel=0.01)


def test_a_video_is_read_from_its_path(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(encoded(8))
    video = Video("a.mp4")

    chosen = clip_of(video, fps=2.0, max_frames=768, media_root=tmp_path)

    assert read_video(video, chosen, media_root=tmp_path).shape == (4, 48, 64, 3)


def test_metadata_that_is_not_utf8_does_no_harm() -> None:
    file = BytesIO()
    with av.open(file, "w", format="avi") as container:
        container.metadata["title"] = "Tube"
        stream = container.add_stream("mpeg4", rate=12, width=64, height=48, pix_fmt="yuv420p")
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode())
    data = file.getvalue().replace(b"Tube", b"T\xfcbe")
    assert b"T\xfcbe" in data

    assert clip(data).total_frames == 4


def test_a_complete_file_whose_decoder_shows_a_little_less_is_read() -> None:
    """Without its first key frame a file holds frames that no decoder shows."""
    data = without_first_packet(encoded(200))

    chosen = clip(data)
    frames = read(data, chosen)

    assert chosen.total_frames == 199
    assert numbers(frames)[-1] == pytest.approx(199 * STEP % 250 / STEP, abs=0.4)


def without_first_packet(data: bytes) -> bytes:
    file = BytesIO()
    with av.open(BytesIO(data)) as source, av.open(file, "w", format="matroska") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in [packet for packet in source.demux(stream) if packet.size][1:]:
            packet.stream = copy
            target.mux(packet)
    return file.getvalue()


# What is refused


@pytest.mark.parametrize(
    "data", [b"#EXTM3U\n/etc/passwd\n", b"ffconcat version 1.0\nfile a.mp4\n", b"GIF89a"]
)
def test_playlists_and_other_files_are_refused_whatever_their_name(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(data)

    with pytest.raises(MediaError, match="is not an MP4, MOV, WebM, MKV or AVI file") as caught:
        clip_of(Video("a.mp4"), fps=2.0, max_frames=768, media_root=tmp_path)

    assert repr(data[:12]) in str(caught.value)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("missing", [1, 2000, 20_000])
def test_a_cut_mp4_is_an_error(tmp_path: Path, codec: str, missing: int) -> None:
    """Its index stands in front, so that the header looks whole."""
    whole = encoded(24, codec=codec, noise=True, path=tmp_path / "a.mp4", movflags="faststart")
    data = whole[:-missing]
    read(whole, clip(whole))

    with pytest.raises(MediaError, match=r"cut short|damaged"):
        read(data, clip(data))


def test_a_broken_video_is_named_as_the_row_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg's own words have the absolute path, which would get into ``dropped.jsonl``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.avi").write_bytes(encoded(24, format="avi", codec="mjpeg")[:300])

    with pytest.raises(MediaError, match=r"^a\.avi cannot be decoded \(Invalid data found") as caught:
        clip_of(Video("a.avi"), fps=2.0, max_frames=768, media_root=Path())

    assert str(tmp_path) not in str(caught.value)


def test_an_avi_cut_between_two_frames_is_an_error() -> None:
    whole = encoded(100, format="avi", codec="mjpeg")
    data = whole[: whole.rindex(b"00dc", 0, whole.index(b"idx1"))]

    with pytest.raises(MediaError, match="promises 100 frames, but 99 can be decoded"):
        read(data, clip(data))


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_a_cut_avi_is_an_error(kept: float) -> None:
    whole = encoded(24, format="avi", codec="mpeg4", noise=True)
    data = whole[: int(len(whole) * kept)]

    with pytest.raises(MediaError, match=r"cut short|damaged"):
        read(data, clip(data))


def test_an_mp4_without_its_index_is_an_error() -> None:
    data = encoded(24)

    with pytest.raises(MediaError, match=r"cannot be decoded .* cut short"):
        clip(data[: data.index(b"moov")])


def test_a_video_that_changed_after_planning_is_an_error() -> None:
    chosen = clip(encoded(24))

    with pytest.raises(MediaError, match="promises 24 frames, but 12 can be decoded"):
        read(encoded(12), chosen)


def test_sound_without_pictures_is_an_error() -> None:
    file = BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))

    with pytest.raises(MediaError, match="no video stream"):
        clip(file.getvalue())


def test_frames_above_the_pixel_limit_are_refused() -> None:
    with pytest.raises(MediaError, match=r"48 × 64 pixels.* above max_image_pixels = 3,071"):
        clip(encoded(4), max_image_pixels=3071)
    assert clip(encoded(4), max_image_pixels=48 * 64).height == 48


def test_the_pixel_limit_holds_while_ffmpeg_looks_into_the_file() -> None:
    """Then it does not decode the first frame, and does not know the size."""
    with pytest.raises(MediaError, match=r"shows no frame size: .* above max_image_pixels = 3,071"):
        clip(encoded(4, format="matroska", codec="ffv1"), max_image_pixels=3071)


def test_frames_that_grow_midway_are_shown_at_the_first_size_inside_the_limit() -> None:
    file = BytesIO()
    with av.open(file, "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=12, width=64, height=48, pix_fmt="yuvj420p")
        for number, size in enumerate([(64, 48), (64, 48), (64, 48), (128, 96)]):
            jpeg = BytesIO()
            PIL.Image.new("RGB", size, (200, 100, 0)).save(jpeg, "JPEG")
            packet = av.Packet(jpeg.getvalue())
            packet.stream, packet.pts, packet.dts = stream, number, number
            container.mux(packet)
    video = Video(data=file.getvalue())
    limits = MediaLimits(max_image_pixels=48 * 64)

    chosen = clip_of(video, fps=12.0, max_frames=8, media_root=None, limits=limits)

    frames = read_video(video, chosen, media_root=None)
    assert frames.shape == (4, 48, 64, 3)
    assert np.abs(frames[3].astype(int) - [200, 100, 0]).max() < 5
    with pytest.raises(MediaError, match="cannot be decoded"):
        read_video(video, chosen, media_root=None, limits=limits)


@pytest.mark.parametrize("format", ["mp4", "matroska"])
def test_more_frames_than_the_limit_are_refused(format: str) -> None:
    data = encoded(24, format=format)

    with pytest.raises(MediaError, match="over max_video_frames = 23 frames"):
        clip(data, max_video_frames=23)
    assert clip(data, max_video_frames=24).total_frames == 24


def test_more_pixels_in_all_frames_than_the_limit_are_refused() -> None:
    with pytest.raises(
        MediaError, match=r"4 frames of 48 × 64 are 12,288 pixels, above max_video_pixels = 12,287"
    ):
        clip(encoded(8), max_video_pixels=12_287)


@pytest.mark.parametrize(("fps", "max_frames"), [(0.0, 8), (-1.0, 8), (float("nan"), 8), (2.0, 1)])
def test_sampling_that_leaves_no_frames_is_an_error(fps: float, max_frames: int) -> None:
    with pytest.raises(MediaError, match="set them above 0, and to 2 or more"):
        sample_indices(24, 12.0, fps=fps, max_frames=max_frames)


def test_mutated_videos_raise_nothing_but_media_errors() -> None:
    rng = random.Random(0)
    originals = [
        encoded(),
        encoded(movflags="frag_keyframe+empty_moov"),
        encoded(format="matroska"),
        encoded(format="webm", codec="libvpx"),
        encoded(format="avi", codec="mpeg4"),
    ]
    refused = 0
    for _ in range(200):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.choice((1, 2, 8))):
            at = rng.randrange(min(len(data), rng.choice((400, len(data)))))
            if rng.random() < 0.8:
                data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            else:
                del data[at : at + rng.randrange(1, 20)]
        try:
            chosen = clip(bytes(data), max_frames=16)
            shape = read(bytes(data), chosen).shape
            assert shape == (len(chosen.indices), chosen.height, chosen.width, 3)
        except MediaError:
            refused += 1
    assert 20 < refused < 195  # neither all nor none, or the fuzz shows nothing
