"""Images and paths: what is read as what, and what is refused in which words."""

from __future__ import annotations

import os
import random
import resource
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFile
import psutil
import pytest
from torch.utils.data import DataLoader

from tests.mutations import mutated
from vlcpt import CPTDataset
from vlcpt.data.documents import Image
from vlcpt.data.media.open import (
    DEFAULT_LIMITS,
    GIANT_PIXELS,
    MediaError,
    MediaLimits,
    giants_in_turn,
    image_size,
    open_medium,
    read_image,
    resolve,
)

WHITE, RED, BLACK = (255, 255, 255), (255, 0, 0), (0, 0, 0)


def saved(picture: PIL.Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def read(data: bytes, **limits: int) -> PIL.Image.Image:
    return read_image(Image(data=data), media_root=None, limits=MediaLimits(**limits))


def size(data: bytes, **limits: int) -> tuple[int, int]:
    return image_size(Image(data=data), media_root=None, limits=MediaLimits(**limits))


def first_pixel(data: bytes) -> tuple[int, ...]:
    picture = read(data)
    assert picture.mode == "RGB"
    return picture.getpixel((0, 0))


def close(found: tuple[int, ...], wanted: tuple[int, ...], by: int = 3) -> bool:
    return all(abs(a - b) <= by for a, b in zip(found, wanted, strict=True))


def png(width: int, height: int, depth: int, color: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand, for kinds that Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


def noise(mode: str = "RGB") -> PIL.Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values).convert(mode)


# What is read as what


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_each_format_is_read_with_its_size_and_color(format: str) -> None:
    data = saved(PIL.Image.new("RGB", (30, 20), (250, 10, 10)), format)

    assert size(data) == (20, 30)
    assert read(data).size == (30, 20)
    assert close(first_pixel(data), (250, 10, 10))


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_gray_bilevel_and_palette_images_become_rgb(mode: str) -> None:
    assert first_pixel(saved(PIL.Image.new("RGB", (4, 4), WHITE).convert(mode))) == WHITE
    assert first_pixel(saved(PIL.Image.new("RGB", (4, 4), BLACK).convert(mode))) == BLACK


def test_cmyk_is_converted() -> None:
    cyan, paper = PIL.Image.new("CMYK", (8, 8), (255, 0, 0, 0)), PIL.Image.new("CMYK", (8, 8))

    assert close(first_pixel(saved(cyan, "JPEG")), (0, 255, 255))
    assert first_pixel(saved(cyan, "TIFF")) == (0, 255, 255)
    assert first_pixel(saved(paper, "TIFF")) == WHITE


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_alpha_lies_on_white(format: str) -> None:
    clear, half, full = ((255, 0, 0, alpha) for alpha in (0, 128, 255))
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}

    assert first_pixel(saved(PIL.Image.new("RGBA", (4, 4), clear), format, **options)) == WHITE
    assert first_pixel(saved(PIL.Image.new("RGBA", (4, 4), half), format, **options)) == (255, 127, 127)
    assert first_pixel(saved(PIL.Image.new("RGBA", (4, 4), full), format, **options)) == RED


def test_gray_with_alpha_lies_on_white() -> None:
    assert first_pixel(saved(PIL.Image.new("LA", (4, 4), (0, 0)))) == WHITE
    assert first_pixel(saved(PIL.Image.new("LA", (4, 4), (0, 255)))) == BLACK


def test_a_transparent_palette_entry_lies_on_white() -> None:
    picture = PIL.Image.new("P", (2, 1), 0)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)

    for format in ("PNG", "GIF"):
        shown = read(saved(picture, format, transparency=0))
        assert [shown.getpixel((x, 0)) for x in (0, 1)] == [WHITE, (0, 0, 255)]


def test_a_transparent_color_lies_on_white() -> None:
    assert first_pixel(saved(PIL.Image.new("RGB", (4, 4), RED), transparency=RED)) == WHITE
    assert first_pixel(saved(PIL.Image.new("L", (4, 4), 9), transparency=9)) == WHITE


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_not_clipped(format: str) -> None:
    values = np.array([[0, 256, 0x8000, 0xFFFF]], np.uint16)

    shown = np.asarray(read(saved(PIL.Image.fromarray(values), format)))

    assert shown[0, :, 0].tolist() == [0, 1, 128, 255]


def test_16_bit_big_endian_tiff_is_scaled() -> None:
    picture = PIL.Image.frombytes("I;16B", (2, 1), struct.pack(">HH", 0x8000, 0xFFFF))

    assert np.asarray(read(saved(picture, "TIFF")))[0, :, 0].tolist() == [128, 255]


def test_16_bit_color_is_scaled() -> None:
    data = png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 0xFFFF, 0x8000, 0x0100))

    assert first_pixel(data) == (255, 128, 1)


def test_a_transparent_16_bit_gray_lies_on_white() -> None:
    data = png(2, 1, 16, 0, b"\0" + struct.pack(">HH", 0x1234, 0x2000), (b"tRNS", struct.pack(">H", 0x1234)))

    assert np.asarray(read(data))[0, :, 0].tolist() == [255, 0x20]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),  # 0 to 1: black to white
        ([0.2, 0.2, 0.2], [51, 51, 51]),
        ([-10.0, 0.0, 10.0], [0, 128, 255]),  # others: stretched
        ([7.0, 7.0, 7.0], [0, 0, 0]),
        ([float("nan"), 0.0, float("inf")], [0, 0, 255]),
    ],
)
def test_floats_become_8_bits(values: list[float], wanted: list[int]) -> None:
    picture = PIL.Image.fromarray(np.array([values], np.float32))

    assert np.asarray(read(saved(picture, "TIFF")))[0, :, 0].tolist() == wanted


def test_32_bit_integers_are_stretched() -> None:
    picture = PIL.Image.fromarray(np.array([[-1000, 0, 1000]], np.int32))

    assert np.asarray(read(saved(picture, "TIFF")))[0, :, 0].tolist() == [0, 128, 255]


def test_the_first_frame_of_a_gif_is_read() -> None:
    first, second = PIL.Image.new("RGB", (8, 8), RED), PIL.Image.new("RGB", (8, 8), (0, 0, 255))

    assert first_pixel(saved(first, "GIF", save_all=True, append_images=[second])) == RED


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_turned_and_the_size_with_it(format: str, orientation: int) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 255  # the top left corner
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = PIL.Image.Exif()
    exif[0x112] = orientation
    data = saved(PIL.Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif)

    assert size(data) == (16, 32)
    shown = np.asarray(read(data))
    assert shown.shape == upright.shape
    assert np.abs(shown.astype(int) - upright).mean() < 4


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_an_image_with_broken_exif_is_read_as_it_is_stored() -> None:
    data = saved(PIL.Image.new("RGB", (8, 16), RED), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x01")

    assert size(data) == (16, 8)
    assert read(data).size == (8, 16)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_the_size_is_known_without_decoding_a_pixel(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(noise(), format)
    loaded: list[str] = []
    for plugin in {type(PIL.Image.open(BytesIO(data))), PIL.ImageFile.ImageFile}:
        monkeypatch.setattr(plugin, "load", lambda picture: loaded.append(picture.format))

    assert size(data) == (40, 60)
    assert loaded == []


def test_an_image_is_read_from_its_path(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(saved(PIL.Image.new("RGB", (3, 2), RED)))

    assert image_size(Image("a.png"), media_root=tmp_path) == (2, 3)
    assert read_image(Image("a.png"), media_root=tmp_path).getpixel((0, 0)) == RED


def test_bytes_win_over_the_path_beside_them() -> None:
    image = Image(path="gone.png", data=saved(PIL.Image.new("RGB", (3, 2), RED)))

    assert image_size(image, media_root=None) == (2, 3)


# What is refused


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_cut_image_is_an_error_that_says_so(format: str) -> None:
    whole = saved(noise(), format)
    read(whole)

    with pytest.raises(MediaError, match=r"cut short|damaged"):
        read(whole[: len(whole) // 2])


def test_a_bomb_is_refused_by_our_limit_without_taking_memory() -> None:
    bomb = png(60_000, 60_000, 8, 2, bytes(1000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    for open_it in (size, read):
        with pytest.raises(MediaError, match=r"3,600,000,000 pixels, above max_image_pixels = 100,000,000"):
            open_it(bomb)

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_our_limit_alone_decides_and_pillows_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 10)
    data = saved(PIL.Image.new("RGB", (30, 20)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(data, max_image_pixels=600).size == (30, 20)
        with pytest.raises(MediaError, match="600 pixels, above max_image_pixels = 599"):
            size(data, max_image_pixels=599)

    assert PIL.Image.MAX_IMAGE_PIXELS == 10


def test_pillows_limit_is_put_back_after_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 10)
    data = saved(PIL.Image.new("RGB", (30, 20)))
    sizes: list[tuple[int, int]] = []
    threads = [
        threading.Thread(target=lambda: sizes.extend(read(data).size for _ in range(50))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sizes == [(30, 20)] * 200
    assert PIL.Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        b"P6\n1 1\n255\n\0\0\0",  # PPM, which Pillow could read
        b"<html>404 Not Found</html>",
    ],
    ids=["eps", "svg", "ppm", "html"],
)
def test_other_formats_are_refused_with_the_bytes_they_begin_with(data: bytes) -> None:
    with pytest.raises(MediaError, match="is not a readable JPEG, PNG, WebP, GIF, BMP or TIFF") as caught:
        read(data)

    assert repr(data[:12]) in str(caught.value)


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()

    for image in (Image(data=b""), Image("a.png")):
        with pytest.raises(MediaError, match=r"is empty \(0 bytes\)"):
            image_size(image, media_root=tmp_path)


def test_a_reference_to_nothing_is_an_error() -> None:
    with pytest.raises(MediaError, match="neither a path nor bytes"):
        image_size(Image(), media_root=None)


def test_a_file_above_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(MediaError, match="has 9 bytes, above max_file_bytes = 8"):
        size(b"not a PNG", max_file_bytes=8)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mutated_images_raise_nothing_but_media_errors() -> None:
    rng = random.Random(0)
    originals = [
        *(saved(noise(), format) for format in ("PNG", "JPEG", "WEBP", "BMP", "TIFF")),
        *(saved(noise("P"), format) for format in ("PNG", "GIF")),
        *(saved(noise(), "TIFF", compression=kind) for kind in ("tiff_lzw", "jpeg", "tiff_adobe_deflate")),
    ]
    refused = 0
    for _ in range(200):
        data = mutated(rng.choice(originals), rng)
        try:
            height, width = size(data)
            assert read(data).size == (width, height)
        except MediaError:
            refused += 1
    assert 20 < refused < 195  # neither all nor none, or the fuzz shows nothing


# Where a file may lie


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A media_root with one file in it, and a secret beside it."""
    (tmp_path / "secret.png").write_bytes(b"secret")
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a b.png").write_bytes(b"picture")
    return folder


def test_a_relative_path_is_taken_from_the_media_root(root: Path) -> None:
    assert resolve("images/../images/a b.png", root) == root / "images" / "a b.png"


def test_an_absolute_path_inside_the_media_root_is_allowed(root: Path) -> None:
    assert resolve(str(root / "images" / "a b.png"), root) == root / "images" / "a b.png"


@pytest.mark.parametrize("form", ["file://{}", "file:{}", "FILE://localhost{}"])
def test_a_file_uri_inside_the_media_root_is_allowed(root: Path, form: str) -> None:
    assert resolve(form.format(root / "images" / "a%20b.png"), root) == root / "images" / "a b.png"


def test_a_link_inside_the_media_root_is_followed(root: Path) -> None:
    (root / "link.png").symlink_to(root / "images" / "a b.png")

    assert resolve("link.png", root) == root / "images" / "a b.png"


@pytest.mark.parametrize(
    "path",
    [
        "../secret.png",
        "images/../../secret.png",
        "{}",
        "file://{}",
        "file:../secret.png",
        "file:%2E%2E/secret.png",
    ],
)
def test_nothing_outside_the_media_root_is_reached(root: Path, path: str) -> None:
    path = path.format(root.parent / "secret.png")

    with pytest.raises(MediaError, match="outside the media_root") as caught:
        resolve(path, root)

    assert str(caught.value).startswith(repr(path))


def test_no_message_has_an_absolute_path_that_the_user_did_not_write(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages reach ``dropped.jsonl``, which may be shown to others."""
    monkeypatch.chdir(root.parent)
    (root / "link.png").symlink_to(root.parent / "secret.png")
    found = []
    for path in ("none.png", "../secret.png", "link.png", "images", "images/a b.png/c", "x" * 5000):
        with pytest.raises(MediaError) as caught:
            resolve(path, Path("data"))
        found.append(str(caught.value))

    assert "'none.png' does not exist in 'data'." in found[0]
    assert "'link.png' lies outside the media_root 'data' (from there, '../secret.png')" in found[2]
    assert not [message for message in found if str(root.parent) in message]


def test_a_link_out_of_the_media_root_is_refused(root: Path) -> None:
    (root / "link.png").symlink_to(root.parent / "secret.png")
    (root / "up").symlink_to(root.parent)

    for path in ("link.png", "up/secret.png"):
        with pytest.raises(MediaError, match="outside the media_root"):
            resolve(path, root)


def test_a_sibling_folder_with_the_same_beginning_is_outside(root: Path) -> None:
    (root.parent / "data2").mkdir()
    (root.parent / "data2" / "a.png").touch()

    with pytest.raises(MediaError, match="outside the media_root"):
        resolve("../data2/a.png", root)


def test_without_a_media_root_the_caller_is_trusted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)

    assert resolve("../secret.png", None) == root.parent / "secret.png"


@pytest.mark.parametrize("path", ["http://host/a.png", "HTTPS://host/a.png", "s3://bucket/a.png", "data:,a"])
def test_a_url_is_refused_and_nothing_is_fetched(root: Path, path: str) -> None:
    for folder in (root, None):
        with pytest.raises(MediaError, match=r"is a URL, and nothing is fetched\. Download it"):
            resolve(path, folder)


def test_a_file_uri_of_another_machine_is_refused(root: Path) -> None:
    with pytest.raises(MediaError, match="names another machine"):
        resolve("file://host/a.png", root)


def test_a_missing_file_is_named_with_what_to_do(root: Path) -> None:
    with pytest.raises(MediaError, match=r"'images/b\.png' does not exist in .*set media_root"):
        resolve("images/b.png", root)


def test_a_folder_is_refused(root: Path) -> None:
    with pytest.raises(MediaError, match="'images' is a folder"):
        resolve("images", root)


def test_a_pipe_is_refused_without_waiting_for_it(root: Path) -> None:
    os.mkfifo(root / "pipe.png")

    with pytest.raises(MediaError, match="is a pipe, socket or device"):
        resolve("pipe.png", root)


def test_a_device_is_refused_even_from_a_trusted_caller() -> None:
    with pytest.raises(MediaError, match="is a pipe, socket or device"):
        resolve("/dev/zero", None)


@pytest.mark.parametrize("path", ["a\0.png", "\ud800.png", "x" * 5000, "images/a b.png/c.png"], ids=ascii)
def test_a_path_that_cannot_be_one_is_a_media_error(root: Path, path: str) -> None:
    with pytest.raises(MediaError) as caught:
        resolve(path, root)

    assert len(str(caught.value)) < 500


def test_a_circle_of_links_is_a_media_error(root: Path) -> None:
    (root / "loop.png").symlink_to(root / "loop.png")

    with pytest.raises(MediaError, match=r"loop\.png"):
        resolve("loop.png", root)


def test_an_open_medium_is_closed_after_use(root: Path) -> None:
    with open_medium(Image("images/a b.png"), root, DEFAULT_LIMITS) as file:
        assert file.read() == b"picture"

    assert file.closed


_GIANTS = """
import sys, time
from vlcpt.data.media.open import GIANT_PIXELS, giants_in_turn
for _ in range(3):
    with giants_in_turn(GIANT_PIXELS):
        print("in", flush=True)
        time.sleep(0.05)
        print("out", flush=True)
"""


def test_giant_images_are_held_one_at_a_time_by_all_processes(tmp_path: Path) -> None:
    """Each line goes to one file, in the order in which it was written."""
    with (tmp_path / "order").open("w") as file:
        started = [subprocess.Popen([sys.executable, "-c", _GIANTS], stdout=file) for _ in range(3)]
        assert [process.wait() for process in started] == [0, 0, 0]
    assert (tmp_path / "order").read_text().split() == ["in", "out"] * 9


def test_other_images_do_not_wait_for_a_giant_and_a_killed_worker_lets_the_next_go_on() -> None:
    holds = "import time\n" + _GIANTS.replace("0.05", "600")
    with subprocess.Popen([sys.executable, "-c", holds], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        with giants_in_turn(GIANT_PIXELS - 1):
            assert process.poll() is None
        process.kill()
        with giants_in_turn(GIANT_PIXELS):
            assert process.wait() == -9


@pytest.mark.slow
@pytest.mark.alone
def test_several_workers_together_need_the_memory_of_one_giant_image(tmp_path: Path, tiny_processor) -> None:
    for number in range(4):
        PIL.Image.new("RGB", (10_000, 9_990), (number, 9, 9)).save(
            tmp_path / f"{number}.png", compress_level=1
        )
    rows = [
        {"text": f"<image>a <trainable_text>b {n}</trainable_text>", "images": [str(tmp_path / f"{n}.png")]}
        for n in range(4)
    ]
    dataset = CPTDataset(rows, tiny_processor, max_length=2_000, packing=False, max_pixels=100_000)
    most = {}
    for workers in (1, 4):
        with peak_memory() as peak:
            assert len(list(DataLoader(dataset, batch_size=None, num_workers=workers))) == 4
        most[workers] = peak[0]

    pixels = 3 * 10_000 * 9_990
    assert most[1] > pixels  # or it was not seen
    assert most[4] < most[1] + 2 * pixels  # each alone has three of the four


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The most bytes that this process and its children hold at once, above now; shared ones once."""
    own, peak, ended = psutil.Process(), [0], threading.Event()
    before = own.memory_full_info().pss

    def watch() -> None:
        while not ended.wait(0.02):
            total = 0
            for process in (own, *own.children()):
                with suppress(psutil.Error):  # it has just ended
                    total += process.memory_full_info().pss
            peak[0] = max(peak[0], total - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()
