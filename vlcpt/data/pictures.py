"""Pictures that are in memory as a ``PIL.Image``, as the bytes of a file: everything after reads files."""

from __future__ import annotations

import io
import os
import struct

import PIL.Image
from PIL.ExifTags import Base
from PIL.Image import Transpose

from vlcpt.data.documents import DocumentError

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # all others off: EPS starts Ghostscript

# What Pillow raises on a broken file: its readers do not look first. tests/data/test_media.py fuzzes this.
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

# What a TIFF holds to the bit. A reader makes RGB of all others, so nothing is lost by doing so here; a
# palette has as many colours as it happens to have, in a copy perhaps more.
_PNG_MODES = ("1", "L", "P", "RGB", "I;16")  # these with a transparent colour, which a TIFF has not
_TIFF_MODES = ("1", "L", "LA", "RGB", "RGBA", "RGBX", "CMYK", "I", "F", "I;16", "I;16B", "I;16L")


def picture_bytes(picture: PIL.Image.Image) -> bytes:
    """The file of a picture in memory; the same picture always gives the same bytes.

    One that was opened and not decoded yet gives the file that it was opened from, so that the limits on
    files hold for it, and forked workers do not share a place in that file. Pixels become a TIFF without
    compression, ten times faster than a PNG.

    Raises:
        DocumentError: If the file was closed before the pixels were decoded, or they cannot be.

    Example:
        >>> picture = PIL.Image.new("CMYK", (2, 1), (0, 255, 0, 0))
        >>> PIL.Image.open(io.BytesIO(picture_bytes(picture))).tobytes() == picture.tobytes()
        True
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
        return _encoded(picture)
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
    return picture.tell() == 0 and not (picture.format == "JPEG" and getattr(picture, "decoderconfig", False))


def _file_of(picture: PIL.Image.Image) -> bytes:
    """The whole file that a picture was opened from, which is left where it stands."""
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


def _encoded(picture: PIL.Image.Image) -> bytes:
    """Decoded pixels as a file, upright."""
    if (turn := UPRIGHT.get(orientation(picture))) is not None:
        picture = picture.transpose(turn)
    file = io.BytesIO()
    if picture.has_transparency_data and picture.mode in _PNG_MODES:
        picture.save(file, "PNG", compress_level=0)
        return file.getvalue()
    if picture.mode not in _TIFF_MODES:
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    picture.save(file, "TIFF", compression="raw")  # not as the file was that it came from
    return file.getvalue()


def _error(reason: str) -> DocumentError:
    return DocumentError(f"a PIL image: {reason}", kind="medium")
