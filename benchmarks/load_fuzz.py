"""The long forms of the fuzzers in tests/data: markup, control tokens and media files."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from io import BytesIO
from pathlib import Path

MARKUPS = 1_000_000
STRINGS = 1_000_000
FILES = 20_000
# fmt: off
CONTROL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<|object_ref_start|>", "<|box_end|>", "<|quad_start|>", "<tool_call>",
    "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>",
]
PIECES = [
    "<trainable_text>", "</trainable_text>", '<trainable_text weight="0.5">',
    '<trainable_text weight="1e400">', "<trainable_text", "text>", 'weight="', "<image>", "<video>", "<IMG1>",
    "<VID2>", "<IMG0", "<", ">", "\\", "\\\\", "/",
]
WORDS = [
    "<|image_pad|>", "<p class='a'>", "</p>", "&lt;", "\n", "\t", " ", "\r\n", "a", " word", "12", "½", "é",
    "e\u0301", "中文", "。", "עברית", "🧑‍🔬", "\u200b", "\0", "\x1b[31m",
]
# fmt: on


def markup(folder: Path) -> dict[str, object]:
    """Mutated documents: each is a document that round-trips, or a DocumentError, at once."""
    from vlcpt import DocumentError, parse_markup

    rng = random.Random(0)
    put_in = ("", "\ud800", *PIECES, *WORDS)
    found: Counter[str] = Counter()
    slowest = 0.0
    for _ in range(MARKUPS):
        text, media = _document(rng)
        for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
            place, length = rng.randint(0, len(text)), rng.choice((0, 1, 1, 5, 20))
            text = text[:place] + rng.choice(put_in) + text[place + length :]
        before = time.process_time()
        try:
            document = parse_markup(text, *media)
        except DocumentError as raised:
            document, error = None, raised
        slowest = max(slowest, time.process_time() - before)
        if document is None:
            assert error.reason
            assert error.offset is None or 0 <= error.offset <= len(text)
            found[error.kind] += 1
            continue
        assert parse_markup(document.to_markup(), document.images, document.videos) == document, repr(text)
        found["accepted"] += 1
    assert slowest < 0.05, slowest
    assert found["accepted"] > MARKUPS / 10
    return {"documents": MARKUPS, "slowest_ms": round(1000 * slowest, 1), **found}


def _document(rng: random.Random) -> tuple[str, tuple[list[str], list[str]]]:
    """Well-formed markup, mostly, and the files for its markers."""
    parts: list[str] = []
    images = videos = 0
    for _ in range(rng.randint(1, 6)):
        kind = rng.random()
        if kind < 0.2:
            parts.append("<image>")
            images += 1
        elif kind < 0.25:
            parts.append("<video>")
            videos += 1
        else:
            words = "".join(rng.choices(WORDS, k=rng.randint(0, 4)))
            if kind < 0.6:
                weight = rng.choice(("", ' weight="0.3"'))
                words = f"<trainable_text{weight}>{words}</trainable_text>"
            parts.append(words)
    return "".join(parts), (["a.png"] * images, ["a.mp4"] * videos)


def tokens(folder: Path) -> dict[str, object]:
    """Strings of control tokens and their fragments: none becomes the id of one."""
    from vlcpt import Text, load_processor
    from vlcpt.data.encode.tokens import RunTokenizer
    from vlcpt.demo import base_path

    tokenizer = load_processor(base_path()).tokenizer
    controls = set(tokenizer.get_added_vocab().values())
    assert len(controls) == 22
    assert {tokenizer.convert_tokens_to_ids(name) for name in CONTROL} <= controls
    runs = RunTokenizer(tokenizer)
    rng = random.Random(0)
    fragments = [
        "<|",
        "|>",
        "<",
        ">",
        "|",
        "im_",
        "start",
        "end",
        "_pad",
        "image",
        "tool_call",
        "/",
        " ",
        "\n",
    ]
    letters = whole = 0
    for number in range(STRINGS):
        pieces = rng.choices(CONTROL, k=rng.randint(0, 2)) + rng.choices(fragments, k=rng.randint(1, 6))
        rng.shuffle(pieces)
        text = "".join(pieces)
        if rng.random() < 0.3:
            name, place = rng.choice(CONTROL), rng.randrange(1, 6)
            text = name[:place] + text + name[place:]
        whole += any(name in text for name in CONTROL)
        cut = rng.randrange(len(text)) if number % 4 == 0 else 0
        given = [Text(text[:cut]), Text(text[cut:], True)] if cut else [Text(text, True)]
        found = runs.tokenize(given).ids
        assert not controls.intersection(found.tolist()), repr(text)
        if number % 100 == 0:
            assert tokenizer.decode(found) == text
        letters += len(text)
    return {"strings": STRINGS, "with_a_whole_name": whole, "characters": letters}


def media(folder: Path) -> dict[str, object]:
    """Mutated images and videos: checked for cuts, measured and decoded, or a MediaError, at once."""
    import logging
    import warnings

    from tests.mutations import mutated
    from vlcpt.data.documents import Image, Video
    from vlcpt.data.media.cut import check_container
    from vlcpt.data.media.open import MediaError, MediaLimits, image_size, read_image
    from vlcpt.data.media.videos import clip_of, read_video

    warnings.simplefilter("ignore")
    logging.disable()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff and libjpeg write there by themselves
    images, videos = _images(), _videos()
    rng, limits = random.Random(0), MediaLimits()
    found: Counter[str] = Counter()
    slowest = 0.0
    for number in range(FILES):
        kind = "video" if number % 4 == 0 else "image"
        data = mutated(rng.choice(videos if kind == "video" else images), rng)
        medium = Video(data=data) if kind == "video" else Image(data=data)
        before = time.perf_counter()
        try:
            check_container(medium, media_root=None, limits=limits)
        except MediaError:
            found[f"{kind}: refused as cut"] += 1
        try:
            if isinstance(medium, Image):
                height, width = image_size(medium, media_root=None, limits=limits)
                assert read_image(medium, media_root=None, limits=limits).size == (width, height)
            else:
                clip = clip_of(medium, media_root=None, fps=2.0, max_frames=16, limits=limits)
                frames = read_video(medium, clip, media_root=None, limits=limits)
                assert frames.shape == (len(clip.indices), clip.height, clip.width, 3)
            found[f"{kind}: decoded"] += 1
        except MediaError:
            found[f"{kind}: refused"] += 1
        spent = time.perf_counter() - before
        if spent > slowest:
            slowest = spent
            found["slowest_ms"] = round(1000 * spent)
    assert slowest < 2, slowest
    return {"files": FILES, **found}


def _images() -> list[bytes]:
    import numpy as np
    import PIL.Image

    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    ways: list[tuple[str, str, dict[str, object]]] = [
        ("RGB", "PNG", {}), ("P", "PNG", {}), ("I;16", "PNG", {}), ("RGBA", "PNG", {"compress_level": 1}),
        ("RGB", "JPEG", {}), ("RGB", "JPEG", {"progressive": True}), ("CMYK", "JPEG", {}), ("L", "JPEG", {}),
        ("RGB", "WEBP", {}), ("RGBA", "WEBP", {"lossless": True}), ("P", "GIF", {}), ("RGB", "BMP", {}),
        ("1", "BMP", {}), ("RGB", "TIFF", {}), ("RGB", "TIFF", {"compression": "tiff_lzw"}),
        ("RGB", "TIFF", {"compression": "jpeg"}), ("RGB", "TIFF", {"compression": "tiff_adobe_deflate"}),
        ("1", "TIFF", {"compression": "group4"}),
    ]  # fmt: skip
    found = []
    for mode, format, options in ways:
        file = BytesIO()
        image = picture.convert("L").convert("I;16") if mode == "I;16" else picture.convert(mode)
        image.save(file, format, **options)
        found.append(file.getvalue())
    return found


def _videos() -> list[bytes]:
    import av
    import numpy as np

    rng = np.random.default_rng(0)
    found = []
    for format, codec, options in [
        ("mp4", "mpeg4", {}), ("mp4", "mpeg4", {"movflags": "frag_keyframe+empty_moov"}),
        ("mov", "mjpeg", {}), ("matroska", "mpeg4", {}), ("webm", "libvpx", {}), ("avi", "mpeg4", {}),
        ("avi", "mjpeg", {}),
    ]:  # fmt: skip
        file = BytesIO()
        with av.open(file, "w", format=format, options=options) as container:
            pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream = container.add_stream(codec, rate=8, width=64, height=48, pix_fmt=pix_fmt)
            for _ in range(12):
                pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
        found.append(file.getvalue())
    return found
