"""Whether an image file is whole, by the sizes that it states itself; no pixel is decoded."""

from __future__ import annotations

import struct
from typing import Literal

import numpy as np

from vlcpt.data.file_parts import BrokenFileError, FileParts

ByteOrder = Literal["little", "big"]

_TIFF_OFFSETS = {273: "strip", 324: "tile"}  # the tag of places, and what lies there
_TIFF_COUNTS = {273: 279, 324: 325}
# Bytes of a value, by the number of its type.
_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_TIFF_SIZES |= {16: 8, 17: 8, 18: 8}


def walk_png(file: FileParts) -> None:
    """Chunk by chunk to IEND."""
    place, pixels = 8, False
    while True:
        file.part()
        length, name = struct.unpack(">I4s", file.read(place, 8, "the chunks, before IEND"))
        if not (name.isalpha() and name.isascii()) or length > 2**31 - 1:
            raise BrokenFileError(f"at byte {place:,} there is no chunk but {name!r}")
        place += 12 + length
        file.need(place, f"the chunk {name.decode()}")
        pixels |= name == b"IDAT"
        if name == b"IEND":
            if not pixels:
                raise BrokenFileError("it has no pixels: no chunk IDAT")
            return


def walk_jpeg(file: FileParts) -> None:
    """Segment by segment to the first scan, then to the end marker.

    Inside a scan the marker cannot occur; so it is looked for from the end of the file, and what
    follows it (a second picture, a maker's own data) does no harm.
    """
    place = 2
    while True:
        file.part()
        first, marker = file.read(place, 2, "the header, before the picture")
        if first != 0xFF:  # like decoders, look past what is no segment
            place = file.find(b"\xff", place)
            if place < 0:
                raise BrokenFileError(f"it ends after {file.size:,} bytes, before the picture")
            continue
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:  # alone, or fill
            place += 1 if marker == 0xFF else 2
            continue
        if marker == 0xD9:
            raise BrokenFileError("it has no picture before its end marker")
        length = int.from_bytes(file.read(place + 2, 2, f"the segment FF{marker:02X}"), "big")
        if length < 2:
            raise BrokenFileError(f"the segment FF{marker:02X} at byte {place:,} has the length {length}")
        place += 2 + length
        file.need(place, f"the segment FF{marker:02X}")
        if marker == 0xDA:
            break
    if not file.has_after(b"\xff\xd9", place):
        raise BrokenFileError(f"it ends after {file.size:,} bytes, without the end marker FFD9")


def walk_webp(file: FileParts) -> None:
    """The size in the RIFF header."""
    size = int.from_bytes(file.read(4, 4, "the header"), "little")
    file.need(8 + size, f"the picture, which its header says ends at byte {8 + size:,}")


def walk_gif(file: FileParts) -> None:
    """Block by block to the trailer."""
    place = 13 + _color_table(file.read(10, 3, "the header")[0])
    frames = 0
    while True:
        kind = file.read(place, 1, "the blocks, before the trailer")[0]
        if kind == 0x3B:
            if not frames:
                raise BrokenFileError("it has no frame before its trailer")
            return
        if kind == 0x21:
            place += 2
        elif kind == 0x2C:
            frames += 1
            place += 11 + _color_table(file.read(place + 9, 1, "a frame's header")[0])
        elif kind == 0x00:  # some writers pad between blocks, and Pillow looks past it
            file.part()
            place += 1
            continue
        else:
            raise BrokenFileError(f"at byte {place:,} there is no block but 0x{kind:02x}")
        what = "an extension" if kind == 0x21 else f"frame {frames}"
        while (length := file.read(place, 1, what)[0]) > 0:
            file.part()
            place += 1 + length
        place += 1


def walk_bmp(file: FileParts) -> None:
    """Where the header says that the pixels end."""
    stated, offset, header = struct.unpack("<I4xII", file.read(2, 16, "the header"))
    if header == 12:
        width, height, _, depth = struct.unpack("<HHHH", file.read(18, 8, "the header"))
        packed, size = 0, 0
    else:
        width, height, _, depth, packed, size = struct.unpack("<iiHHII", file.read(18, 20, "the header"))
    if packed in (0, 3, 6):  # not compressed: rows of whole words
        stop = offset + (abs(width) * depth + 31) // 32 * 4 * abs(height)
    else:
        stop = offset + size if size else stated
    file.need(stop, f"the pixels, which its header says end at byte {stop:,}")


def walk_tiff(file: FileParts) -> None:
    """Directory by directory: each value, strip and tile lies inside the file."""
    start = file.read(0, 8, "the header")
    order: ByteOrder = "little" if start[:2] == b"II" else "big"
    big = 43 in (start[2], start[3])
    if big:
        start = file.read(0, 16, "the header")
    wide = 8 if big else 4
    place = int.from_bytes(start[8:16] if big else start[4:8], order)
    seen: set[int] = set()
    while place:
        file.part()
        if place in seen:
            raise BrokenFileError(f"its directories lead back to byte {place:,}")
        seen.add(place)
        head = 8 if big else 2
        count = int.from_bytes(file.read(place, head, "a directory"), order)
        entry = 4 + 2 * wide
        file.need(place + head + count * entry, f"a directory of {count:,} entries")
        if not 0 < count <= 65_535:
            raise BrokenFileError(f"the directory at byte {place:,} has {count:,} entries")
        entries = file.read(place + head, count * entry + wide, "a directory")
        place = int.from_bytes(entries[-wide:], order)
        values: dict[int, np.ndarray] = {}
        for at in range(0, count * entry, entry):
            file.part()
            one = entries[at : at + entry]
            tag = int.from_bytes(one[:2], order)
            values |= {tag: _tiff_values(file, tag, one, order, wide)}
        for tag, what in _TIFF_OFFSETS.items():
            places = values.get(tag, np.zeros(0, np.uint64))
            counts = values.get(_TIFF_COUNTS[tag], np.zeros(0, np.uint64))
            stops = places + (counts if len(counts) == len(places) else np.uint64(0))
            if len(stops):
                largest = int(max(stops.max(), places.max()))  # sums near 2^64 wrap
                file.need(largest, f"a {what} that its directory says ends at byte {largest:,}")


def _tiff_values(file: FileParts, tag: int, entry: bytes, order: ByteOrder, wide: int) -> np.ndarray:
    """Places and sizes of strips and tiles; of other tags, only that the values are there."""
    kind, count = int.from_bytes(entry[2:4], order), int.from_bytes(entry[4 : 4 + wide], order)
    size = _TIFF_SIZES.get(kind, 0)
    what = f"the values of tag {tag}"
    if size * count <= wide:
        data = entry[4 + wide : 4 + wide + size * count]
    else:
        start = int.from_bytes(entry[4 + wide :], order)
        file.need(start + size * count, what)
        if tag not in _TIFF_OFFSETS and tag not in _TIFF_COUNTS.values():
            return np.zeros(0, np.uint64)
        if count > 1_000_000:
            raise BrokenFileError(f"it has {count:,} strips or tiles")
        data = file.read(start, size * count, what)
    if size not in (2, 4, 8):
        return np.zeros(0, np.uint64)
    return np.frombuffer(data, f"{'<' if order == 'little' else '>'}u{size}").astype(np.uint64)


def _color_table(flags: int) -> int:
    """Bytes of the color table that follows."""
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0
