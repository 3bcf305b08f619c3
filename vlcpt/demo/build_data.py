"""The demo's documents: handwritten digits, photographs and clips, read out in two languages.

The *old* domain is what the base model has learnt: English cards. The *new* domain, which the demo
teaches it, is a Chinese meter log. Held-out documents use scans of digits that nothing else uses.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Literal

import av
import numpy as np
from PIL import Image

CELL = 28  # Pixels of one merged vision token: a digit is one token.
ENGLISH = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CHINESE = "零一二三四五六七八九"
DIRECTIONS = {"left": "左", "right": "右", "up": "上", "down": "下"}
# scikit-image photographs whose docstring says CC0 or public domain.
PHOTOGRAPHS = {
    "camera": ("a man with a camera", "一个拍照的人"),
    "coffee": ("a cup of coffee", "一杯咖啡"),
    "chelsea": ("a cat", "一只猫"),
    "rocket": ("a rocket", "一枚火箭"),
    "brick": ("a brick wall", "一面砖墙"),
    "grass": ("grass", "一片草地"),
    "gravel": ("stones", "一些石子"),
    "horse": ("a horse", "一匹马"),
    "clock": ("a clock", "一个钟"),
}
GENERAL_TEXT = Path(__file__).with_name("general.txt")
HELD_OUT_SCANS = 350
Domain = Literal["old", "new"]
Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Sheet:
    """A document before it is written: its markup, and its media as files' bytes in reading order."""

    text: str
    images: list[bytes] = field(default_factory=list)
    videos: list[bytes] = field(default_factory=list)


def make_sheets(domain: Domain, split: Split, seed: int) -> Iterator[Sheet]:
    """Yield documents of a domain without end, the same for the same arguments."""
    random = Random(f"{domain} {split} {seed}")
    kinds = (_reading, _reading, _reading, _two_readings, _two_readings, _clip, _photograph)
    while True:
        yield random.choice(kinds)(domain, split, random)


def make_texts(seed: int) -> Iterator[Sheet]:
    """Yield text without media: general paragraphs, and the same short thing said in both languages.

    So the base knows Chinese words for what it sees, but has never said them about a picture.
    """
    random = Random(f"texts {seed}")
    paragraphs = GENERAL_TEXT.read_text(encoding="utf-8").splitlines()
    while True:
        if random.random() < 0.3:
            yield Sheet(_span(random.choice(paragraphs)))
        else:
            yield Sheet(_span(" = ".join(random.sample(_said_twice(random), 2))))


def _said_twice(random: Random) -> tuple[str, str]:
    digits = [random.randrange(10) for _ in range(random.randint(1, 6))]
    direction = random.choice(sorted(DIRECTIONS))
    return random.choice(
        (
            (_words(digits), _characters(digits)),
            (f"{ENGLISH[digits[0]]} moves {direction}", f"{CHINESE[digits[0]]}向{DIRECTIONS[direction]}移动"),
            random.choice(sorted(PHOTOGRAPHS.values())),
        )
    )


def _reading(domain: Domain, split: Split, random: Random) -> Sheet:
    digits, image = _row_of_digits(split, random)
    if domain == "old":
        return Sheet(f"<image>\nReading: {_span(_words(digits))}", [image])
    meter, unit = random.choice((("水表", "立方米"), ("电表", "度")))
    return Sheet(f"{meter}<image>\n读数：{_span(_characters(digits) + unit + '。')}", [image])


def _two_readings(domain: Domain, split: Split, random: Random) -> Sheet:
    (first, left), (second, right) = _row_of_digits(split, random), _row_of_digits(split, random)
    if domain == "old":
        text = f"Card one <image> says {_span(_words(first))}\nCard two <image> says {_span(_words(second))}"
    else:
        text = (
            f"上月<image>本月<image>\n记录：{_span(f'上月{_characters(first)}，本月{_characters(second)}。')}"
        )
    return Sheet(text, [left, right])


def _clip(domain: Domain, split: Split, random: Random) -> Sheet:
    digit, scan = _draw_digit(split, random)
    direction = random.choice(sorted(DIRECTIONS))
    clip = _encode_clip(_moving_frames(scan, direction, lane=random.choice((0, CELL))))
    if domain == "old":
        return Sheet(f"<video>\nClip: {_span(f'{ENGLISH[digit]} moves {direction}')}", videos=[clip])
    return Sheet(
        f"<video>\n短片：{_span(f'数字{CHINESE[digit]}向{DIRECTIONS[direction]}移动。')}", videos=[clip]
    )


def _photograph(domain: Domain, split: Split, random: Random) -> Sheet:
    name = random.choice(sorted(PHOTOGRAPHS))
    english, chinese = PHOTOGRAPHS[name]
    image = _crop_photograph(name, random)
    if domain == "old":
        return Sheet(f"<image>\nPhoto: {_span(english)}", [image])
    return Sheet(f"<image>\n照片：{_span(chinese + '。')}", [image])


def _span(text: str) -> str:
    return f"<trainable_text>{text}</trainable_text>"


def _words(digits: list[int]) -> str:
    return " ".join(ENGLISH[digit] for digit in digits)


def _characters(digits: list[int]) -> str:
    return "".join(CHINESE[digit] for digit in digits)


@cache
def _scans(split: Split) -> list[tuple[int, Image.Image]]:
    """(digit, dark ink on white, 10x10) for each scan of a split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = Random("scans").sample(range(len(digits.target)), len(digits.target))
    chosen = order[:HELD_OUT_SCANS] if split == "held_out" else order[HELD_OUT_SCANS:]
    return [
        (
            int(digits.target[n]),
            Image.fromarray(np.pad(np.uint8(255 - digits.images[n] * 255 / 16), 1, constant_values=255)),
        )
        for n in sorted(chosen)
    ]


def _draw_digit(split: Split, random: Random) -> tuple[int, np.ndarray]:
    """A digit and its 28x28 picture: a scan, enlarged, a little turned and moved, in 16 shades."""
    digit, scan = random.choice(_scans(split))
    scale = 8 / random.uniform(22, 26)
    turn = random.uniform(-0.15, 0.15)
    x, y = (CELL / 2 + random.uniform(-1.5, 1.5) for _ in "xy")
    cos, sin = scale * math.cos(turn), scale * math.sin(turn)
    # Maps a pixel of the picture to a point of the scan, whose middle is (5, 5).
    matrix = (cos, sin, 5 - cos * x - sin * y, -sin, cos, 5 + sin * x - cos * y)
    picture = scan.transform(
        (CELL, CELL), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=255
    )
    return digit, np.asarray(picture) // 17 * 17


def _row_of_digits(split: Split, random: Random) -> tuple[list[int], bytes]:
    """Three to six digits and the PNG that shows them side by side."""
    drawn = [_draw_digit(split, random) for _ in range(random.randint(3, 6))]
    picture = Image.fromarray(np.concatenate([scan for _, scan in drawn], axis=1))
    file = io.BytesIO()
    picture.quantize(16).save(file, "PNG", optimize=True, bits=4)
    return [digit for digit, _ in drawn], file.getvalue()


def _crop_photograph(name: str, random: Random) -> bytes:
    """A random square of a photograph, 56x56, as JPEG."""
    picture = _load_photograph(name)
    side = int(min(picture.size) * random.uniform(0.7, 1.0))
    left, top = random.randint(0, picture.width - side), random.randint(0, picture.height - side)
    crop = picture.crop((left, top, left + side, top + side)).resize(
        (2 * CELL, 2 * CELL), Image.Resampling.LANCZOS
    )
    file = io.BytesIO()
    crop.save(file, "JPEG", quality=85)
    return file.getvalue()


@cache
def _load_photograph(name: str) -> Image.Image:
    import skimage.data

    pixels = getattr(skimage.data, name)()
    picture = Image.fromarray(np.uint8(pixels * 255) if pixels.dtype == bool else pixels).convert("RGB")
    picture.thumbnail((160, 160), Image.Resampling.LANCZOS)
    return picture


def _moving_frames(scan: np.ndarray, direction: str, lane: int) -> list[np.ndarray]:
    """Eight frames of 56x56 in which a digit crosses one cell."""
    frames = []
    for step in range(8):
        forward = CELL * step // 7
        along = forward if direction in ("right", "down") else CELL - forward
        top, left = (lane, along) if direction in ("left", "right") else (along, lane)
        frame = np.full((2 * CELL, 2 * CELL), 255, dtype=np.uint8)
        frame[top : top + CELL, left : left + CELL] = scan
        frames.append(frame)
    return frames


def _encode_clip(frames: list[np.ndarray]) -> bytes:
    """Frames as an MP4 of two frames a second, the rate at which Qwen2.5-VL looks at video."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        # A fixed quantiser: x264's rate control differs in the last bit from one process to the next.
        stream = container.add_stream("libx264", rate=2, options={"qp": "20", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 2 * CELL, 2 * CELL, "yuv420p"
        for frame in frames:
            # Video's luma runs from 16 to 235.
            luma = np.round(16 + frame * (219 / 255)).astype(np.uint8)
            planes = np.concatenate([luma, np.full((CELL, 2 * CELL), 128, dtype=np.uint8)])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode())
    return file.getvalue()
