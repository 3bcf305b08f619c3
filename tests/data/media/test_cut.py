"""Whole files pass, cut files do not, and nothing else than a MediaError comes of any bytes."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest

from vlcpt.data.documents import Image, Video
from vlcpt.data.media.cut import check_container
from vlcpt.data.media.open import MediaError, MediaLimits, image_size, read_image
from vlcpt.data.media.videos import clip_of, read_video

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
PICTURE = PIL.Image.fromarray(PIXELS)
OTHER = PIL.Image.fromarray(PIXELS[::-1].copy())


def image(format: str, mode: str = "RGB", **options: object) -> bytes:
    file = BytesIO()
    PICTURE.convert(mode).save(file, format, **options)
    return file.getvalue()


class Pipe:
    """A file that cannot seek: muxers leave sizes open."""

    def __init__(self) -> None:
        self.file = BytesIO()

    def write(self, data: bytes) -> int:
        return self.file.write(data)


def video(
    format: str, codec: str = "libx264", *, pipe: bool = False, path: Path | None = None, **options: str
) -> bytes:
    target = Pipe() if pipe else path or BytesIO()
    with av.open(target, "w", format=format, options=options) as container:
        stream = container.add_stream(codec, rate=8, width=64, height=48)
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = 4
        for number in range(24):
            frame = np.roll(PIXELS[:48, :64], number, axis=0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))))
        container.mux(stream.encode())
    if path:
        return path.read_bytes()
    return target.file.getvalue() if isinstance(target, Pipe) else target.getvalue()


def frames(*more: PIL.Image.Image) -> dict[str, object]:
    return {"save_all": True, "append_images": list(more)}


IMAGES: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: image("JPEG"),
    "progressive jpeg": lambda: image("JPEG", progressive=True),
    "jpeg with restarts": lambda: image("JPEG", restart_marker_blocks=2),
    "jpeg with a profile": lambda: image("JPEG", icc_profile=bytes(200_000)),
    "cmyk jpeg": lambda: image("JPEG", "CMYK"),
    "png": lambda: image("PNG"),
    "palette png": lambda: image("PNG", "P"),
    "animated png": lambda: image("PNG", **frames(OTHER)),
    "webp": lambda: image("WEBP"),
    "lossless webp": lambda: image("WEBP", "RGBA", lossless=True),
    "animated webp": lambda: image("WEBP", **frames(OTHER)),
    "gif": lambda: image("GIF"),
    "animated gif": lambda: image("GIF", **frames(OTHER)),
    "gif with a comment": lambda: image("GIF", comment=b"x" * 700),
    "bmp": lambda: image("BMP"),
    "palette bmp": lambda: image("BMP", "P"),
    "bilevel bmp": lambda: image("BMP", "1"),
    "tiff": lambda: image("TIFF"),
    "lzw tiff": lambda: image("TIFF", compression="tiff_lzw"),
    "jpeg tiff": lambda: image("TIFF", compression="jpeg"),
    "fax tiff": lambda: image("TIFF", "1", compression="group4"),
    "big tiff": lambda: image("TIFF", big_tiff=True),
    "float tiff": lambda: image("TIFF", "F"),
}
VIDEOS: dict[str, Callable[[], bytes]] = {
    "mp4": lambda: video("mp4"),
    "mov": lambda: video("mov", "mpeg4"),
    "fragmented mp4": lambda: video("mp4", movflags="frag_keyframe+empty_moov"),
    "dash mp4": lambda: video("mp4", movflags="dash"),
    "mkv": lambda: video("matroska"),
    "webm": lambda: video("webm", "libvpx"),
    "vp9 webm": lambda: video("webm", "libvpx-vp9"),
    "live mkv": lambda: video("matroska", pipe=True),
    "live webm": lambda: video("webm", "libvpx", pipe=True),
    "avi": lambda: video("avi", "mpeg4"),
    "mjpeg avi": lambda: video("avi", "mjpeg"),
    "unfinished avi": lambda: video("avi", "mpeg4", pipe=True),
}
# These declare no size: a cut between two packets, or of a WebM that was never finished, does not show.
OPEN_ENDED = {"fragmented mp4", "dash mp4", "live mkv", "live webm", "unfinished avi"}
MADE: dict[str, bytes] = {}


def made(name: str) -> bytes:
    if name not in MADE:
        MADE[name] = (IMAGES | VIDEOS)[name]()
    return MADE[name]


def check(data: bytes, kind: type[Image | Video] = Image, **limits: int) -> None:
    check_container(kind(data=data), media_root=None, limits=MediaLimits(**limits))


def kind_of(name: str) -> type[Image | Video]:
    return Image if name in IMAGES else Video


def is_whole(data: bytes, kind: type[Image | Video] = Image) -> bool:
    try:
        check(data, kind)
    except MediaError:
        return False
    return True


def pixels(data: bytes, kind: type[Image | Video]) -> np.ndarray | None:
    """What training would see; None where it would stop with an error."""
    try:
        if kind is Image:
            return np.asarray(read_image(Image(data=data), media_root=None))
        clip = clip_of(Video(data=data), fps=8.0, max_frames=24, media_root=None)
        return read_video(Video(data=data), clip, media_root=None)
    except MediaError:
        return None


@pytest.mark.parametrize("name", [*IMAGES, *VIDEOS])
def test_a_complete_file_passes(name: str) -> None:
    check(made(name), kind_of(name))


@pytest.mark.filterwarnings("ignore")  # of Pillow, about damaged TIFFs
@pytest.mark.parametrize("name", [*IMAGES, *VIDEOS])
def test_a_file_cut_anywhere_does_not_pass_unless_its_pixels_are_the_same(name: str) -> None:
    data, kind, rng = made(name), kind_of(name), random.Random(0)
    places = {rng.randrange(1, len(data)) for _ in range(150)} | set(range(len(data) - 20, len(data)))
    passed = [place for place in places | set(range(8, 40)) if is_whole(data[:place], kind)]

    if name in OPEN_ENDED:
        assert len(passed) < 170  # a live WebM: anywhere behind its first frame
        return
    whole = pixels(data, kind)
    seen = [pixels(data[:place], kind) for place in passed]
    # A compressed TIFF without the end of its directory does not pass decoding.
    assert all(np.array_equal(one, whole) or (one is None and "tiff" in name) for one in seen), passed


@pytest.mark.parametrize("name", ["fragmented mp4", "dash mp4", "unfinished avi"])
def test_a_video_without_a_declared_size_that_is_cut_inside_a_packet_does_not_pass(name: str) -> None:
    data = made(name)
    cuts = [place for place in range(len(data) // 2, len(data) // 2 + 600) if is_whole(data[:place], Video)]

    assert len(cuts) < 200  # headers between packets


@pytest.mark.parametrize("codec", ["mpeg4", "libx264", "libvpx", "libvpx-vp9", "mjpeg", "ffv1", "mpeg2video"])
@pytest.mark.parametrize("format", ["mp4", "mov", "matroska", "webm", "avi"])
def test_complete_files_of_every_codec_pass(format: str, codec: str) -> None:
    try:
        data = video(format, codec)
    except (av.FFmpegError, ValueError):
        pytest.skip(f"{format} does not hold {codec}")

    check(data, Video)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr", "LAB"]
)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_complete_images_of_every_mode_pass(format: str, mode: str) -> None:
    picture = PICTURE.convert("L").convert(mode) if mode in ("I;16", "I", "F") else PICTURE.convert(mode)
    file = BytesIO()
    try:
        picture.save(file, format)
    except (OSError, ValueError):
        pytest.skip(f"{format} does not hold {mode}")

    check(file.getvalue())


def test_an_index_before_the_frames_says_where_they_end(tmp_path: Path) -> None:
    data = video("mp4", path=tmp_path / "a.mp4", movflags="faststart")
    assert data.index(b"moov") < data.index(b"mdat")

    check(data, Video)
    with pytest.raises(
        MediaError, match=f"its header says that it ends at byte {len(data):,}, and it has {len(data) - 1:,}"
    ):
        check(data[:-1], Video)


def test_an_mp4_without_its_index_is_named() -> None:
    data = made("mp4")

    with pytest.raises(MediaError, match=r"cannot be decoded .* cut short"):
        check(data[: data.index(b"moov") - 4], Video)


@pytest.mark.parametrize("name", ["jpeg", "png", "gif", "webp", "bmp", "tiff", "mp4", "avi", "mkv"])
def test_what_others_put_behind_a_complete_file_does_no_harm(name: str) -> None:
    for behind in (bytes(3), bytes(5000), b"\r\n", b"made by hand"):
        check(made(name) + behind, kind_of(name))


def test_a_second_picture_behind_a_jpeg_may_be_missing() -> None:
    file = BytesIO()
    PICTURE.save(file, "MPO", **frames(OTHER))
    data = file.getvalue()
    first = data.index(b"\xff\xd9") + 2

    check(data)
    check(data[: first + 100])  # what is read is whole
    assert not is_whole(data[: first - 2])
    assert read_image(Image(data=data[: first + 100]), media_root=None).size == PICTURE.size


def test_a_thumbnail_does_not_stand_in_for_the_end_of_a_jpeg() -> None:
    thumbnail = image("JPEG")
    exif = b"Exif\0\0" + thumbnail
    data = made("jpeg")
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]

    check(data)
    with pytest.raises(MediaError, match="it has no end mark"):
        check(data[:-2])


def test_nor_does_it_in_a_file_of_several_pictures() -> None:
    file = BytesIO()
    PICTURE.save(file, "MPO", **frames(OTHER))
    exif = b"Exif\0\0" + image("JPEG")
    data = file.getvalue()[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + file.getvalue()[2:]
    assert PIL.Image.open(BytesIO(data)).format == "MPO"

    check(data)
    assert not is_whole(data[: data.index(b"\xff\xd9") + 3000])


def test_zeros_in_place_of_the_rest_of_a_download_show() -> None:
    for name in ("jpeg", "png", "gif", "mp4"):
        data = made(name)
        assert not is_whole(data[: len(data) // 2] + bytes(len(data) - len(data) // 2), kind_of(name)), name


def test_the_message_says_what_was_found_and_what_to_do() -> None:
    with pytest.raises(MediaError) as caught:
        check(made("png")[:-20])

    assert str(caught.value) == (
        "image given as bytes is cut short: it has no end mark. Copy, download or encode it again, or remove "
        "it from the row."
    )


def test_a_file_of_another_kind_is_named() -> None:
    for kind, kinds in ((Image, "JPEG, PNG"), (Video, "MP4, MOV")):
        with pytest.raises(MediaError, match=rf"is not an? (readable )?{kinds}.* begins with b'%PDF-1\.7'"):
            check(b"%PDF-1.7", kind)


def test_the_walls_of_media_hold_here_too(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "a.png").write_bytes(made("png"))

    with pytest.raises(MediaError, match="lies outside the media_root"):
        check_container(Image(path="../a.png"), media_root=tmp_path / "inside")
    with pytest.raises(MediaError, match="above max_file_bytes = 10"):
        check(made("png"), max_file_bytes=10)


@pytest.mark.filterwarnings("ignore")  # of Pillow, about damaged TIFFs
def test_mutated_files_raise_nothing_but_media_errors_at_once() -> None:
    rng, names = random.Random(0), [*IMAGES, *VIDEOS]
    passed, slowest = 0, 0.0
    for _ in range(8000):
        name = rng.choice(names)
        data = bytearray(made(name))
        for _ in range(rng.choice((1, 2, 8))):
            place = rng.randrange(min(len(data), rng.choice((60, 400, len(data)))))
            kind = rng.random()
            if kind < 0.6:
                data[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            elif kind < 0.8:
                data[place : place + 4] = rng.choice((bytes(4), b"\xff" * 4, b"\0\0\0\1", b"\x80\0\0\0"))
            else:
                del data[place : place + rng.randrange(1, 20)]
        start = time.process_time()
        passed += is_whole(bytes(data), kind_of(name))
        slowest = max(slowest, time.process_time() - start)
    assert 800 < passed < 7200  # neither all nor none, or the fuzz shows nothing
    assert slowest < 2


PARTS = 2_000_000


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"GIF89a" + bytes(7) + b"\x21\xf9" + b"\x01x" * PARTS, Image),
        (b"\x89PNG\r\n\x1a\n" + (struct.pack(">I", 0) + b"tEXt" + bytes(4)) * PARTS, Image),
        (b"\xff\xd8" + b"\xff\xe0\0\x02" * PARTS, Image),
        (b"\x1aE\xdf\xa3\x80\x18\x53\x80\x67\x01" + b"\xff" * 7 + b"\xec\x80" * PARTS, Video),
        (b"\0\0\0\x08ftyp" + b"\0\0\0\x08free" * PARTS, Video),
        (b"RIFF\0\0\0\0AVI " + b"JUNK\0\0\0\0" * PARTS, Video),
    ],
    ids=["gif", "png", "jpeg", "mkv", "mp4", "avi"],
)
def test_a_file_of_endless_parts_is_refused_in_seconds(data: bytes, kind: type[Image | Video]) -> None:
    start = time.process_time()
    with pytest.raises(MediaError):
        check(data, kind)
    assert time.process_time() - start < 20  # work, not the wait for a core


@pytest.mark.parametrize(
    ("name", "table", "counts"),
    [("dash mp4", b"trun", {8: 60_000_000}), ("mp4", b"stsz", {8: 1, 12: 60_000_000})],
)
def test_tables_of_more_samples_than_the_file_has_bytes_are_refused_before_memory_is_reserved(
    name, table, counts
):
    data = bytearray(made(name))
    at = data.find(table)
    data[at + 4 : at + 8] = bytes(4)  # no line for each sample
    for place, count in counts.items():
        data[at + place : at + place + 4] = struct.pack(">I", count)
    for look in (check_container, partial(clip_of, fps=2.0, max_frames=8)):
        start = time.process_time()
        with pytest.raises(
            MediaError, match=r"promises 60,000,000 samples and has [\d,]+ bytes: it is damaged"
        ):
            look(Video(data=bytes(data)), media_root=None)
        assert time.process_time() - start < 0.5


def test_tiff_directories_that_lead_back_are_refused() -> None:
    loop = b"II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 256, 3, 1, 5) + struct.pack("<I", 8)

    assert not is_whole(loop)


def test_of_a_large_file_little_is_read() -> None:
    class Counting(BytesIO):
        taken = 0

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            self.taken += len(data)
            return data

    big = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8))
    for format, share in (("PNG", 0.1), ("JPEG", 0.5), ("TIFF", 0.01), ("BMP", 0.01)):
        buffer = BytesIO()
        big.save(buffer, format)
        file = Counting(buffer.getvalue())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vlcpt.data.media.open.BytesIO", lambda _, file=file: file)
            check(buffer.getvalue())
        assert 0 < file.taken < share * len(buffer.getvalue()), format


# Pictures of phones and browsers that are named, not read


def ftyp(*brands: bytes) -> bytes:
    """The start of a file of ISO's base format: its brand, then those that it is compatible with."""
    body = b"ftyp" + brands[0] + bytes(4) + b"".join(brands[1:])
    return struct.pack(">I", 4 + len(body)) + body + struct.pack(">I4s", 16, b"meta") + bytes(8)


HEIF = [
    (ftyp(b"heic", b"mif1", b"heic"), "a HEIC"),  # iPhones
    (ftyp(b"heix", b"mif1", b"heix"), "a HEIC"),  # ten bits: cameras
    (ftyp(b"hevc", b"msf1", b"hevc"), "a HEIC"),  # bursts
    (ftyp(b"mif1", b"heic", b"mif1"), "a HEIC"),
    (ftyp(b"mif1", b"mif1", b"avif", b"miaf"), "an AVIF"),
    (ftyp(b"avif", b"mif1", b"avif", b"miaf", b"MA1B"), "an AVIF"),
    (ftyp(b"avis", b"msf1", b"avis"), "an AVIF"),
    (image("AVIF"), "an AVIF"),
]


@pytest.mark.parametrize(("data", "kind"), HEIF)
@pytest.mark.parametrize("look", [check_container, image_size, read_image])
def test_heic_and_avif_are_named_with_what_converts_them_whatever_their_name(look, data, kind, tmp_path):
    (tmp_path / "a.jpg").write_bytes(data)
    message = f"is {kind} picture, which is not read. Convert it to PNG: heif-convert FILE FILE.png (libheif)"
    for given in (Image("a.jpg"), Image(data=data)):
        with pytest.raises(MediaError) as caught:
            look(given, media_root=tmp_path)
        assert str(caught.value).startswith(f"{given} {message}, or magick FILE FILE.png")


@pytest.mark.parametrize("options", [{}, frames(OTHER, PICTURE)])
def test_heic_and_avif_among_videos_are_named_for_ffmpeg_would_read_one_picture(options):
    video = Video(data=image("AVIF", **options))
    with pytest.raises(MediaError, match="is an AVIF picture, which is not read"):
        check_container(video, media_root=None)
    with pytest.raises(MediaError, match="is an AVIF picture, which is not read"):
        clip_of(video, fps=2.0, max_frames=8, media_root=None)


@pytest.mark.parametrize("brands", [(b"isom", b"mif1", b"heic"), (b"mp42", b"avif"), (b"qt  ", b"heic")])
def test_a_video_is_not_taken_for_heic_by_what_it_is_compatible_with(brands):
    data = bytearray(video("mp4"))
    start = int.from_bytes(data[:4], "big")
    size = 16 + 4 * (len(brands) - 1)
    # The rest of the old box becomes one that is skipped, so that no place in the file moves.
    assert start - size >= 8
    data[:start] = (
        struct.pack(">I", size) + b"ftyp" + brands[0] + bytes(4) + b"".join(brands[1:])
        + struct.pack(">I4s", start - size, b"free") + bytes(start - size - 8)
    )  # fmt: skip
    check_container(Video(data=bytes(data)), media_root=None)
    assert clip_of(Video(data=bytes(data)), fps=2.0, max_frames=8, media_root=None).total_frames == 24
