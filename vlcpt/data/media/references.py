"""What a row may hold for an image or a video, read into :class:`Image` or :class:`Video`."""

from __future__ import annotations

import base64
import binascii
import difflib
import io
import os
import re
import struct
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import TypeGuard

import numpy as np
import PIL.Image
from PIL.ExifTags import Base
from PIL.Image import Transpose

from vlcpt.data.documents import DocumentError, Image, Medium, Video

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # all others off: EPS starts Ghostscript

# What Pillow raises on a broken file: its readers do not look first. tests/data/media fuzzes them.
# fmt: off
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error,
                 ArithmeticError, RuntimeError, MemoryError)
# fmt: on

# EXIF's eight ways to hold a camera, as what turns the picture upright.
UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


def picture_bytes(picture: PIL.Image.Image) -> bytes:
    """The file of a picture in memory; the same picture always gives the same bytes.

    One that was opened and not decoded yet gives the file that it was opened from, so that the limits on
    files hold for it, and forked workers do not share a place in that file. Pixels become a TIFF of RGB
    without compression, ten times faster than a PNG.

    Raises:
        DocumentError: If the file was closed before the pixels were decoded, or they cannot be.

    Example:
        >>> picture = PIL.Image.new("CMYK", (2, 1), (0, 255, 0, 0))
        >>> PIL.Image.open(io.BytesIO(picture_bytes(picture))).getpixel((0, 0))
        (255, 0, 255)
    """
    try:
        if getattr(picture, "tile", None):  # what is left to decode
            data = _file_of(picture)
            if picture.format in (*IMAGE_FORMATS, "MPO") and _is_first_frame(picture):
                return data
            if picture.format == "EPS":
                raise _error("EPS would be drawn by another program, Ghostscript. Convert it to PNG.")
            if picture.format not in (*IMAGE_FORMATS, "MPO"):
                picture = PIL.Image.open(io.BytesIO(data), formats=[str(picture.format)])
        picture.load()
        file = io.BytesIO()
        if picture.mode == "P" and "transparency" in picture.info:  # what it means only a file says
            picture.save(file, "PNG", compress_level=0, exif=picture.getexif())
        else:
            shown = as_shown(picture)
            # A copy has no tags: what is written is not as the file was that it came from.
            (shown.copy() if shown is picture else shown).save(file, "TIFF", compression="raw")
        return file.getvalue()
    except PILLOW_ERRORS as error:
        if isinstance(error, DocumentError):
            raise
        raise _error(
            f"its pixels cannot be decoded ({type(error).__name__}: {error}). Look at the file that it was "
            "opened from, or remove it from the row."
        ) from error


def orientation(picture: PIL.Image.Image) -> int:
    """EXIF's orientation, 1 to 8, from the header: 1 where there is none or EXIF itself is broken.

    Example:
        >>> orientation(PIL.Image.new("L", (1, 1)))
        1
    """
    if picture.format == "TIFF":
        return 1  # Pillow turns TIFF files itself, size included
    try:
        # The base class's method: that of PNG decodes the pixels to look for EXIF behind them.
        value = PIL.Image.Image.getexif(picture).get(Base.Orientation)
    except PILLOW_ERRORS:
        return 1  # as browsers do
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _is_first_frame(picture: PIL.Image.Image) -> bool:
    """Whether the file alone says which pixels are meant: no other frame was sought, no draft asked for."""
    is_draft = picture.format == "JPEG" and getattr(picture, "decoderconfig", None)
    return picture.tell() == 0 and not is_draft


def _file_of(picture: PIL.Image.Image) -> bytes:
    """All bytes of the file that a picture was opened from; the position in it stays as it was."""
    file = getattr(picture, "fp", None)
    if file is None or getattr(file, "closed", False):
        raise _error(
            "it was opened, but its file was closed before its pixels were decoded. Call its load() before "
            "that, or give the file's path in its place."
        )
    if isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO):
        # Not by seek and read: the place in the file is one for all forked workers.
        return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)
    place = file.tell()
    file.seek(0)
    data: bytes = file.read()
    file.seek(place)
    return data


def as_shown(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Decoded pixels as RGB, upright, on white; the same picture where it is that already.

    Example:
        >>> as_shown(PIL.Image.new("LA", (2, 1), (0, 0))).getpixel((0, 0))
        (255, 255, 255)
    """
    turn = UPRIGHT.get(orientation(picture))
    rgb = _to_rgb(picture)
    return rgb if turn is None else rgb.transpose(turn)


def _to_rgb(opened: PIL.Image.Image) -> PIL.Image.Image:
    if opened.mode in ("I", "F") or opened.mode.startswith("I;16"):
        return _eight_bits(opened).convert("RGB")
    if not opened.has_transparency_data:
        # Most photos: a copy of one of 12 megapixels takes as long as half of its decoding.
        return opened if opened.mode == "RGB" else opened.convert("RGB")
    rgba = opened.convert("RGBA")
    white = PIL.Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _eight_bits(opened: PIL.Image.Image) -> PIL.Image.Image:
    values = np.asarray(opened)
    if opened.mode.startswith("I;16"):
        # The high byte, as Pillow itself takes it of 16-bit RGB; convert("L") would clip at 255.
        eight = (values >> 8).astype(np.uint8)
        if (transparent := opened.info.get("transparency")) is not None:
            eight[values == transparent] = 255
        return PIL.Image.fromarray(eight)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if opened.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    # nan is black, an infinity is the nearest end
    share = (np.nan_to_num(values.astype(np.float64), nan=low) - low) / ((high - low) or 1.0)
    return PIL.Image.fromarray((share.clip(0, 1) * 255).round().astype(np.uint8))


def _wrong(reason: str) -> DocumentError:
    return DocumentError(reason, kind="reference")


def _error(reason: str) -> DocumentError:
    return DocumentError(f"a PIL image: {reason}", kind="medium")


_BARE = re.compile(r"[A-Za-z0-9+/]{100,}=*")
_BARE_FOR_URLS = re.compile(r"[A-Za-z0-9_-]{100,}=*")
_LONGEST_PATH = 4096  # of Linux; what is longer is no name of a file, whatever it looks like
# The base64 of the first bytes of PNG, JPEG (twice: the alphabet for URLs), GIF and WebP.
_BARE_STARTS = ("iVBORw0KGgo", "/9j/", "_9j_", "R0lGOD", "UklGR")
SIZES = {kind: tuple(one.name for one in fields(kind)[2:]) for kind in (Image, Video)}
"""The keys of each kind of medium that may also stand beside a reference: limits on pixels and frames."""

# What other tools write beside a reference and nothing here is like: named as not read.
HINTS = frozenset(
    (
        *("detail", "cache_control", "nframes", "min_frames", "total_pixels"),
        *("resized_height", "resized_width", "video_start", "video_end"),
    )
)


def medium_at(
    kind: type[Image] | type[Video],
    reference: object,
    place: str = "",
    beside: Mapping[str, object] | None = None,
) -> Medium:
    """An :class:`Image` or a :class:`Video` from what a row may hold.

    Args:
        kind: What it is.
        reference: A path, a ``data:`` URI, bytes, a dict, a medium, or for images a ``PIL.Image``.
        place: Where it stands in the row, for messages.
        beside: Has sizes for a reference that has none of its own.

    Raises:
        DocumentError: If the reference is none of these, or has an unknown or wrongly typed key.

    Example:
        >>> medium_at(Image, "a.png", "images[0]", {"max_pixels": 50176, "detail": "low"})
        Image(path='a.png', min_pixels=None, max_pixels=50176)
    """
    sizes = {key: beside[key] for key in SIZES[kind] if beside.get(key) is not None} if beside else {}
    try:
        reference = _with_keys(reference, sizes) if sizes else reference
        return reference if isinstance(reference, kind) else kind(**_reference_fields(reference, kind))  # type: ignore[arg-type]
    except DocumentError as error:
        raise error.at(None, place) from None


def _with_keys(reference: object, keys: Mapping[str, object]) -> object:
    if isinstance(reference, Image | Video):
        reference = {("bytes" if name == "data" else name): value for name, value in vars(reference).items()}
    if isinstance(reference, Mapping):  # its own win
        return {**reference, **{key: value for key, value in keys.items() if reference.get(key) is None}}
    if isinstance(reference, str):
        return {"path": reference, **keys}
    return (
        {"bytes": reference, **keys} if isinstance(reference, bytes) or is_picture(reference) else reference
    )


def is_picture(value: object) -> TypeGuard[PIL.Image.Image]:
    """Whether a value is a ``PIL.Image``, without loading Pillow where nobody has.

    Example:
        >>> is_picture("a.png")
        False
    """
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(value, pillow.Image)


def _reference_fields(reference: object, kind: type[Image] | type[Video]) -> dict[str, object]:
    if isinstance(reference, str | os.PathLike):
        reference = {"path": reference}
    elif isinstance(reference, bytes | bytearray) and reference:  # a binary column of a table
        reference = {"bytes": bytes(reference)}
    elif kind is Image and is_picture(reference):
        reference = {"bytes": reference}
    if not isinstance(reference, Mapping):
        raise _wrong(
            f"a media reference must be a path, a data: URI, or a dict with 'path' or 'bytes'; "
            f"found {type(reference).__name__}."
        )
    known = ("path", "bytes", *SIZES[kind])
    values: dict[str, object] = {}
    for key, value in reference.items():
        # Null is how Arrow fills the keys that other references have.
        if value is None or (isinstance(key, str) and key in HINTS):
            continue
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(sorted(known))}."
            raise _wrong(f"a media reference has no key {key!r:.60}.{hint}")
        if kind is Image and key in ("path", "bytes") and (is_picture(value) or isinstance(value, Image)):
            # Chats have a picture where others have its path: under 'url'.
            key, value = "bytes", value.data if isinstance(value, Image) else picture_bytes(value)
        values[key] = _checked(key, value)
    low, high = values.get("min_pixels"), values.get("max_pixels")
    if isinstance(low, int) and isinstance(high, int) and low > high:
        raise _wrong(
            f"'min_pixels' {low} of a media reference is above its 'max_pixels' {high}. Swap or remove one."
        )
    data, path = values.pop("bytes", None), values.pop("path", None)
    if data is None and path is None:
        raise _wrong("a media reference needs 'path' or 'bytes'; both are missing.")
    if isinstance(path, str) and data is None:
        path, data = _path_or_data(path)
    return values | {"path": path, "data": data}


def without_pictures(rows: list[object]) -> list[object]:
    """Rows with an :class:`Image` in place of every ``PIL.Image``; one that cannot be read is empty.

    Pillow's own pickle forgets the transparency of a palette, and decodes what was only opened.

    Example:
        >>> without_pictures([{"text": "a"}])
        [{'text': 'a'}]
    """
    known: dict[int, Image] = {}  # one picture may be in many rows

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        if not is_picture(value):
            return value
        if id(value) not in known:
            try:
                known[id(value)] = Image(data=picture_bytes(value))
            except DocumentError:
                known[id(value)] = Image()  # planning said what is wrong with it
        return known[id(value)]

    return [plain(row) for row in rows]


def _checked(key: str, value: object) -> object:
    """The value of one key of a media reference, or an error that names its type."""
    if key in ("path", "bytes"):
        wanted: type = str if key == "path" else bytes
        if key == "path" and isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, wanted):
            return value
        if key == "bytes" and isinstance(value, str):  # JSON has no bytes
            is_uri = value[:5].lower() == "data:"
            return _path_or_data(value)[1] if is_uri else _decoded(value, "'bytes' of a media reference")
        raise _wrong(f"{key!r} of a media reference must be {wanted.__name__}; found {type(value).__name__}.")
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e300
    if not number or (key != "fps" and value != int(value)):  # type: ignore[call-overload]
        raise _wrong(f"{key!r} of a media reference must be a number above 0; found {value!r:.60}.")
    return float(value) if key == "fps" else int(value)  # type: ignore[arg-type, call-overload]


def _path_or_data(reference: str) -> tuple[str | None, bytes | None]:
    """A path, or the bytes of a ``data:`` URI."""
    if reference[:5].lower() != "data:":
        if not reference:
            raise _wrong("a media reference is an empty path.")
        start = "".join(reference[:120].split())
        if (
            (len(reference) > 64 and start.startswith(_BARE_STARTS) and "." not in reference)
            or (len(reference) > _LONGEST_PATH and _BARE_FOR_URLS.fullmatch(start))
            or (len(reference) > 255 and _BARE.fullmatch(start))
        ):
            raise _wrong(
                f"{reference[:40]!r}… is base64 without a header. Write it as data:image/…;base64,… with the "
                'kind of the file, or as {"bytes": …}.'
            )
        return reference, None
    header, comma, payload = reference.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise _wrong(
            "a data: URI must have the form data:image/png;base64,…; "
            f"found {reference[:40]!r}… Encode the file as base64."
        )
    return None, _decoded(payload, "a data: URI")


def _decoded(text: str, what: str) -> bytes:
    """Base64 as MIME writes it: with line breaks, of which a decoder that checks all else knows nothing."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise _wrong(f"{what} holds no valid base64: {error}.") from None
