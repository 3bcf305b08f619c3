"""Bad rows harm nothing: each is one message at once, or one line of the account, and the others train."""

import json
import os
import struct
import time
import zlib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support import avi, png
from vlcpt import CPTDataset, DocumentError
from vlcpt.cli import app
from vlcpt.data.media.open import MediaLimits
from vlcpt.demo import base_path

LIMITS = MediaLimits(max_file_bytes=2_000_000, max_video_frames=20)
OPEN, CLOSE = "<trainable_text>", "</trainable_text>"


def with_image(image: object) -> dict[str, object]:
    return {"text": f"a <image> {OPEN}b{CLOSE}", "images": [image]}


def with_video(video: object) -> dict[str, object]:
    return {"text": f"a <video> {OPEN}b{CLOSE}", "videos": [video]}


GOOD = {"text": f"one {OPEN}two{CLOSE}"}
# What is wrong, the line, the ledger's reason, and what the message says.
BAD: dict[str, tuple[object, str, str]] = {
    "cut line": ('{"text": "a', "json", "not JSON"),
    "key twice": ('{"text": "a", "text": "b"}', "json", "the key 'text' stands twice in one object"),
    "not UTF-8": (b'{"text": "\xff"}', "encoding", "byte 10 is not UTF-8"),
    "half a character": ('{"text": "\\ud800"}', "json", "surrogate"),
    "NaN": ('{"text": "a", "n": NaN}', "json", "not JSON"),
    "no object": ("[1, 2]", "json", "expected an object in {}, found list"),
    "no text": ({"txt": "a"}, "row", "text: the field is missing"),
    "text of another type": ({"text": 7}, "row", "text: expected a string, found int"),
    "id of another type": ({**GOOD, "id": [1]}, "row", "id: expected a string, found list"),
    "nested": ({"text": f"a{OPEN}b{OPEN}c{CLOSE}"}, "markup", "character 18: <trainable_text> opens inside"),
    "unclosed": ({"text": f"a{OPEN}b"}, "markup", "character 1: <trainable_text> is not closed"),
    "unopened": ({"text": f"a{CLOSE}"}, "markup", "character 1: </trainable_text> closes nothing"),
    "malformed": ({"text": "<trainable_text weight=1>a"}, "markup", "begins like a tag but is none"),
    "weight": ({"text": f'<trainable_text weight="101">a{CLOSE}'}, "markup", 'weight="101" is not a number'),
    "two styles": ({"text": "<image><IMG1>", "images": ["a.png"] * 2}, "markup", "<IMG1> follows <image>"),
    "too few files": ({"text": "a<image>"}, "markers", "1 <image> marker but 'images' lists 0 files"),
    "too many files": (
        {"text": "a", "images": ["a.png"]},
        "markers",
        "0 <image> markers but 'images' lists 1",
    ),
    "no reference": (with_image(None), "reference", "images[0]: a media reference must be a path"),
    "unknown key": (with_image({"path": "a.png", "max_pixel": 9}), "reference", "Did you mean 'max_pixels'?"),
    "bad data URI": (with_image("data:image/png;base64,?"), "reference", "holds no valid base64"),
    "missing": (with_image("none.png"), "medium", "'none.png' does not exist"),
    "outside": (with_image("../secret.png"), "medium", "'../secret.png' lies outside the media_root"),
    "absolute": (with_image("/etc/hostname"), "medium", "'/etc/hostname' lies outside the media_root"),
    "file URI": (with_image("file:///etc/hostname"), "medium", "lies outside the media_root"),
    "link": (with_image("link.png"), "medium", "'link.png' lies outside the media_root"),
    "URL": (with_image("https://example.org/a.png"), "medium", "is a URL, and nothing is fetched"),
    "folder": (with_image("folder"), "medium", "'folder' is a folder"),
    "device": (with_image("zero"), "medium", "lies outside the media_root"),
    "pipe": (with_image("pipe"), "medium", "'pipe' is a pipe, socket or device"),
    "link to a pipe": (with_video("pipe-link.mp4"), "medium", "is a pipe, socket or device"),
    "video URL": (with_video("http://example.org/a.mp4"), "medium", "is a URL, and nothing is fetched"),
    "images no list": ({"text": "a <image>", "images": "a.png"}, "row", "images: expected a list"),
    "pixels of another type": (
        with_image({"path": "a.png", "max_pixels": "many"}),
        "reference",
        "max_pixels",
    ),
    "SVG": (with_image("a.svg"), "medium", "is not a readable JPEG, PNG, WebP, GIF, BMP or TIFF"),
    "EPS named PNG": (with_image("eps.png"), "medium", "is not a readable JPEG, PNG, WebP, GIF, BMP or TIFF"),
    "many pixels": (with_image("many.png"), "medium", "above max_image_pixels"),
    "video missing": (with_video("none.mp4"), "medium", "'none.mp4' does not exist"),
    "video outside": (with_video("../secret.png"), "medium", "lies outside the media_root"),
    "SVG named MP4": (with_video("svg.mp4"), "medium", "is not an MP4, MOV, WebM, MKV or AVI file"),
    "HLS of local files": (with_video("hls.mp4"), "medium", "is not an MP4, MOV, WebM, MKV or AVI file"),
    "too many frames": (with_video("frames.avi"), "medium", "over max_video_frames = 20 frames"),
    "too many bytes": (with_image("bytes.png"), "medium", "above max_file_bytes = 2,000,000"),
    "video too large": (with_video({"path": "wide.avi"}), "medium_too_large", "Set max_pixels to"),
    "empty": (with_image("empty.png"), "medium", "empty.png is empty (0 bytes)"),
    "no image": (with_image("page.html"), "medium", "is not a readable JPEG, PNG, WebP, GIF, BMP or TIFF"),
    "cut image": (with_image("cut.jpg"), "medium", "cut.jpg is not a readable"),
    "bomb": (with_image("bomb.png"), "medium", "3,600,000,000 pixels, above max_image_pixels"),
    "thin": (with_image("thin.png"), "medium", "Crop it"),
    "enlarged": (
        with_image({"path": "a.png", "min_pixels": 1e12}),
        "medium",
        "min_pixels asks for more than",
    ),
    "no video": (with_video("a.png"), "medium", "is not an MP4, MOV, WebM, MKV or AVI file"),
    "playlist": (with_video("list.mp4"), "medium", "is not an MP4, MOV, WebM, MKV or AVI file"),
    "cut video": (with_video("cut.avi"), "medium", "cut.avi cannot be decoded"),
    "too large": (with_image("large.png"), "medium_too_large", "Set max_pixels to"),
}


def huge(width: int, height: int) -> bytes:
    """A PNG whose header promises pixels that are not there."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 50) + b"IDAT" + bytes(54)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    (data / "folder").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(png(1))
    (data / "link.png").symlink_to(tmp_path / "secret.png")
    (data / "zero").symlink_to("/dev/zero")
    os.mkfifo(data / "pipe")
    (data / "pipe-link.mp4").symlink_to("pipe")
    for name, content in {
        "a.png": png(1),
        "empty.png": b"",
        "page.html": b"<html>404</html>",
        "cut.jpg": b"\xff\xd8\xff\xe0\0",
        "bomb.png": huge(60_000, 60_000),
        "thin.png": png(1, 900, 4),
        "list.mp4": b"#EXTM3U\n/etc/hostname\n",
        "cut.avi": avi(1)[:300],
        "large.png": png(1, 600, 600),
        "a.svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "svg.mp4": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "hls.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ncut.avi\n",
        "many.png": huge(20_000, 20_000),
        "frames.avi": avi(1, frames=40),
        "bytes.png": png(1) + bytes(2_000_000),
        "wide.avi": avi(1, frames=8, width=308, height=308),
    }.items():
        (data / name).write_bytes(content)
    return data


def write(folder: Path, lines: list[object]) -> Path:
    path = folder / "train.jsonl"
    written = [one if isinstance(one, str | bytes) else json.dumps(one) for one in lines]
    path.write_bytes(b"".join((one if isinstance(one, bytes) else one.encode()) + b"\n" for one in written))
    return path


@pytest.mark.parametrize("what", BAD)
def test_each_is_one_message_within_a_second(folder, tiny_processor, what):
    line, kind, message = BAD[what]
    path = write(folder, [GOOD, line])
    before = time.process_time()
    with pytest.raises(DocumentError) as caught:
        CPTDataset(path, tiny_processor, max_length=64, limits=LIMITS)
    assert time.process_time() - before < 1

    told = str(caught.value)
    assert told.startswith(f"{path}:2: ")
    assert message in told
    assert caught.value.kind == kind
    assert "\n" not in told and len(told) < 700
    assert told.endswith((".", "?"))  # what to do, said to its end


def test_all_together_are_counted_by_reason_and_the_others_train(folder, tiny_processor):
    lines = [one for line, _, _ in BAD.values() for one in (GOOD, line)]
    path = write(folder, lines)
    dataset = CPTDataset(
        path, tiny_processor, max_length=64, on_bad_data="skip", max_bad_fraction=0.5, limits=LIMITS
    )
    total = dataset.ledger.total
    dataset.ledger.write(folder / "out")

    kinds = [kind for _, kind, _ in BAD.values()]
    assert total.documents["read"] == 2 * len(BAD) > 60
    assert total.documents["used"] == len(BAD)
    assert total.dropped_documents == {kind: kinds.count(kind) for kind in kinds}
    written = [json.loads(line) for line in (folder / "out/dropped.jsonl").read_text().splitlines()]
    assert [(one["line"], one["reason"]) for one in written] == [(2 * n + 2, k) for n, k in enumerate(kinds)]
    for (_, _, message), one in zip(BAD.values(), written, strict=True):
        assert message.rpartition(": ")[2] in one["detail"]
    samples = [sample for number in range(len(dataset)) for sample in dataset[number]]
    assert len(samples) == len(BAD)
    assert sum(int((sample.labels != -100).sum()) for sample in samples) == total.tokens["targets"] > 0


def test_a_run_that_a_bad_row_stops_leaves_nothing_that_looks_whole(folder):
    write(folder, [GOOD, BAD["outside"][0]])
    config = folder / "my.yaml"
    config.write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: train.jsonl\noutput_dir: out\nuse_cpu: true\n"
    )
    result = CliRunner().invoke(app, ["train", str(config)])

    assert result.exit_code == 1, result.output
    progress = ("is read; loading", "format vlcpt")
    (message,) = (line for line in result.stderr.splitlines() if not any(known in line for known in progress))
    assert "train.jsonl:2: images: '../secret.png' lies" in message
    assert "Traceback" not in result.output
    assert not [
        path for path in folder.rglob("*") if path.name in ("ledger.json", "dropped.jsonl", "config.yaml")
    ]
