"""Whether a media file is whole, by the sizes that its container states; no pixel is decoded."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from vlcpt.data.documents import Medium
from vlcpt.data.media.open import DEFAULT_LIMITS, MediaError, MediaLimits, open_medium, refuse_heif

MAX_PARTS = 1_000_000
_CHUNK = 1 << 16


class BrokenFileError(Exception):
    """What is wrong with a file, without its name."""


class FileParts:
    """An open file that says which of its parts is missing.

    Args:
        file: Open for reading, and able to seek.

    Example:
        >>> from io import BytesIO
        >>> FileParts(BytesIO(b"abc")).read(1, 4, "the header")
        Traceback (most recent call last):
        ...
        vlcpt.data.media.whole.BrokenFileError: it ends after 3 bytes, inside the header
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = file.seek(0, os.SEEK_END)
        self._parts = 0

    def read(self, start: int, count: int, what: str) -> bytes:
        """Exactly ``count`` bytes from ``start``, which belong to ``what``."""
        self.need(start + count, what)
        self._file.seek(start)
        return self._file.read(count)

    def need(self, stop: int, what: str) -> None:
        """Raise if the file ends before byte ``stop``, the end of ``what``."""
        if stop > self.size:
            raise BrokenFileError(f"it ends after {self.size:,} bytes, inside {what}")

    def part(self) -> None:
        """Count one more part, so that no file keeps a walk busy for long."""
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise BrokenFileError(f"it has over {MAX_PARTS:,} parts")

    def find(self, wanted: bytes, start: int) -> int:
        """The first place of two or fewer bytes at or after ``start``; -1 if there is none."""
        while start < self.size:
            self._file.seek(start)
            chunk = self._file.read(_CHUNK + len(wanted) - 1)
            if (found := chunk.find(wanted)) >= 0:
                return start + found
            start += _CHUNK
        return -1

    def has_after(self, wanted: bytes, start: int) -> bool:
        """Whether ``wanted`` occurs at or after ``start``; looked for from the end, where it mostly is."""
        stop = self.size
        while stop > start:
            begin = max(start, stop - _CHUNK)
            self._file.seek(begin)
            if wanted in self._file.read(min(stop + len(wanted) - 1, self.size) - begin):
                return True
            stop = begin
        return False


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


# Matroska's elements, by their ids; all others are stepped over.
_SEGMENT, _CLUSTER, _INFO, _SEEK_HEAD = 0x18538067, 0x1F43B675, 0x1549A966, 0x114D9B74
_DURATION, _SCALE, _TIMESTAMP, _BLOCK, _SIMPLE_BLOCK, _BLOCK_GROUP = 0x4489, 0x2AD7B1, 0xE7, 0xA1, 0xA3, 0xA0
_SEEK, _SEEK_POSITION = 0x4DBB, 0x53AC


def walk_avi(file: FileParts) -> None:
    """RIFF after RIFF (a file of more than a gigabyte has several), or chunk by chunk without a size."""
    place, found = 0, 0
    while place + 12 <= file.size:
        file.part()
        name, size = struct.unpack("<4sI", file.read(place, 8, "a header"))
        if name != b"RIFF":
            break  # what others put behind it
        found += 1
        if size in (0, 2**32 - 1):  # written where the size was not known yet
            _walk_riff_chunks(file, place + 12)
            return
        place += 8 + size + size % 2
        file.need(place - size % 2, f"its part {found}, which its header says ends at byte {place:,}")


def _walk_riff_chunks(file: FileParts, place: int) -> None:
    pictures = False
    while place < file.size:
        file.part()
        name, size = struct.unpack("<4sI", file.read(place, 8, "a chunk's header"))
        if name == b"LIST":
            kind = file.read(place + 8, 4, "a list")
            pictures |= kind == b"movi"
            # What is inside the pictures' list may be all there is; other lists are small.
            place += 12 if kind in (b"movi", b"rec ") else 8 + size + size % 2
        else:
            place += 8 + size + size % 2
        file.need(place - size % 2, f"the chunk {name!r}")
    if not pictures:
        raise BrokenFileError("it has no pictures: no list 'movi'")


def walk_mp4(file: FileParts) -> None:
    """Box by box: the index (moov) and the frames (mdat) are there, and no box ends outside."""
    place = 0
    index, frames, fragments, open_ended = -1, False, 0, False
    promised = 0
    while place < file.size:
        file.part()
        rest = file.size - place
        name = file.read(place + 4, 4, "a box's header") if rest >= 8 else b""
        whole = index >= 0 and frames and not fragments
        if whole and not (name and all(0x20 < byte < 0x7F or byte == 0xA9 for byte in name)):
            break  # padding behind a file that has all that it needs
        size, head = int.from_bytes(file.read(place, 8, "a box's header")[:4], "big"), 8
        if size == 1:
            size, head = int.from_bytes(file.read(place + 8, 8, "a box's header"), "big"), 16
        elif size == 0:
            size, open_ended = rest, name == b"mdat"
        shown = name.decode("latin-1") if name.isascii() else repr(name)
        if size < head:
            raise BrokenFileError(f"the box {shown!r} at byte {place:,} has the size {size}")
        file.need(place + size, f"the box {shown!r}, which its header says ends at byte {place + size:,}")
        if name == b"moov":
            index = place
        elif name == b"sidx":
            promised = max(promised, place + size + _fragments_promised(file, place + head, size - head))
        frames |= name == b"mdat"
        fragments += name == b"moof"
        place += size
    if index < 0:
        raise BrokenFileError("it has no index: no box 'moov', which many programs write last")
    if not frames:
        raise BrokenFileError("it has no frames: no box 'mdat'")
    file.need(promised, f"the fragments, which its index says end at byte {promised:,}")
    if open_ended:
        stop = max(_chunk_ends(file, index), default=0)
        file.need(stop, f"the frames, which its index says end at byte {stop:,}")


def _fragments_promised(file: FileParts, start: int, size: int) -> int:
    """Bytes behind a segment index (sidx) that it accounts for."""
    wide = 8 if size and file.read(start, 1, "the box 'sidx'")[0] else 4
    head = 12 + 2 * wide + 4
    if size < head:
        raise BrokenFileError("the box 'sidx' is too short")
    header = file.read(start, head, "the box 'sidx'")
    count = int.from_bytes(header[-2:], "big")
    if size < head + 12 * count:
        raise BrokenFileError("the box 'sidx' is too short")
    entries = file.read(start + head, 12 * count, "the box 'sidx'")
    sizes = (int.from_bytes(entries[at : at + 4], "big") for at in range(0, len(entries), 12))
    # The highest bit marks a reference to another index, whose own bytes are counted too.
    return int.from_bytes(header[-4 - wide : -4], "big") + sum(one & (2**31 - 1) for one in sizes)


def _boxes(file: FileParts, start: int, stop: int, path: tuple[bytes, ...]) -> Iterator[tuple[int, int]]:
    """Where the contents of the boxes at ``path`` begin and end."""
    while start + 8 <= stop:
        file.part()
        size, name = struct.unpack(">I4s", file.read(start, 8, "a box's header"))
        head = 8
        if size == 1:
            size, head = int.from_bytes(file.read(start + 8, 8, "a box's header"), "big"), 16
        size = size or stop - start
        if size < head or start + size > stop:
            raise BrokenFileError(f"the box {name!r} at byte {start:,} does not fit into the one around it")
        if name == path[0]:
            if len(path) == 1:
                yield start + head, start + size
            else:
                yield from _boxes(file, start + head, start + size, path[1:])
        start += size


def _chunk_ends(file: FileParts, index: int) -> Iterator[int]:
    """Where the last chunk of each track ends: its place and the sizes of its frames."""
    size = int.from_bytes(file.read(index, 4, "the index"), "big")
    tables = _boxes(file, index + 8, index + size, (b"trak", b"mdia", b"minf", b"stbl"))
    for start, stop in tables:
        found = {
            name: next(_boxes(file, start, stop, (name,)), None)
            for name in (b"stco", b"co64", b"stsc", b"stsz")
        }
        places, runs, sizes = found[b"stco"] or found[b"co64"], found[b"stsc"], found[b"stsz"]
        if not (places and runs and sizes):
            continue
        wide = 4 if found[b"stco"] else 8
        chunks = _number(file, places[0] + 4, 4)
        last_run = _number(file, runs[0] + 4, 4)
        same, count = _number(file, sizes[0] + 4, 4), _number(file, sizes[0] + 8, 4)
        if not (chunks and last_run and count):
            continue
        in_last = min(_number(file, runs[0] + 8 + 12 * (last_run - 1) + 4, 4), count, 1_000_000)
        last = _number(file, places[0] + 8 + wide * (chunks - 1), wide)
        if same:
            yield last + same * in_last
            continue
        data = file.read(sizes[0] + 12 + 4 * (count - in_last), 4 * in_last, "the index")
        yield last + sum(struct.unpack(f">{in_last}I", data))


def _number(file: FileParts, start: int, width: int) -> int:
    return int.from_bytes(file.read(start, width, "the index"), "big")


def walk_matroska(file: FileParts) -> None:
    """By the size of the segment; where none is stated, block by block, and by the duration if it is."""
    place, size = _skip_to_segment(file)
    if size is not None:
        file.need(place + size, f"the segment, which its header says ends at byte {place + size:,}")
        return
    first = place
    duration, scale, reached, cluster, clusters = 0.0, 1_000_000, 0, 0, 0
    while place < file.size:
        file.part()
        name, length, place = _element(file, place)
        if name in (_CLUSTER, _BLOCK_GROUP, _INFO, _SEEK_HEAD, _SEEK):
            clusters += name == _CLUSTER
            if length is not None:
                file.need(place + length, f"the element {name:X}")
            continue  # look inside
        if length is None:
            raise BrokenFileError(f"the element {name:X} before byte {place:,} has no size")
        file.need(place + length, f"the element {name:X}")
        if name == _TIMESTAMP:
            cluster = _integer(file, place, length)
        elif name in (_SIMPLE_BLOCK, _BLOCK) and length >= 4:
            head = file.read(place, min(length, 11), "a block")
            track = 9 - head[0].bit_length()
            if track + 2 <= len(head):
                reached = max(reached, cluster + int.from_bytes(head[track : track + 2], "big", signed=True))
        elif name == _SCALE:
            scale = _integer(file, place, length) or scale
        elif name == _DURATION and length in (4, 8):
            (duration,) = struct.unpack(
                ">f" if length == 4 else ">d", file.read(place, length, "the duration")
            )
        elif name == _SEEK_POSITION:
            file.need(first + _integer(file, place, length) + 1, "the parts that its index names")
        place += length
    if not clusters:
        raise BrokenFileError("it has no frames: no cluster")
    # The last frame's own length is not in `reached`: no video shows one for two seconds and a tenth of it.
    if duration * 0.9 * scale > reached * scale + 2e9:
        seconds = scale / 1e9
        raise BrokenFileError(f"it ends at second {reached * seconds:.1f} of {duration * seconds:.1f}")


def _skip_to_segment(file: FileParts) -> tuple[int, int | None]:
    """Where the segment's content begins, and its size if it is stated."""
    place = 0
    while True:
        file.part()
        name, size, place = _element(file, place)
        if name == _SEGMENT:
            return place, size
        if size is None:
            raise BrokenFileError(f"the element {name:X} before byte {place:,} has no size")
        place += size
        file.need(place, f"the element {name:X}")


def _element(file: FileParts, place: int) -> tuple[int, int | None, int]:
    """Id, size (None: not stated) and the place of the content."""
    head = file.read(place, min(12, file.size - place), "an element's header")
    first = 9 - head[0].bit_length() if head else 9
    if first > 4 and head:
        raise BrokenFileError(f"at byte {place:,} there is no element but 0x{head[0]:02x}")
    if len(head) <= first:
        raise BrokenFileError(f"it ends after {file.size:,} bytes, inside an element's header")
    width = 9 - head[first].bit_length()
    if width > 8:
        raise BrokenFileError(f"the element at byte {place:,} has no readable size")
    if len(head) < first + width:
        raise BrokenFileError(f"it ends after {file.size:,} bytes, inside an element's header")
    mask = (1 << 7 * width) - 1
    size = int.from_bytes(head[first : first + width], "big") & mask
    return int.from_bytes(head[:first], "big"), None if size == mask else size, place + first + width


def _integer(file: FileParts, place: int, length: int) -> int:
    return int.from_bytes(file.read(place, length, "a number"), "big") if length <= 8 else 0


_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"II\0*", b"MM*\0")
_MP4_STARTS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")


def check_container(medium: Medium, *, media_root: Path | None, limits: MediaLimits = DEFAULT_LIMITS) -> None:
    """Walk the parts of a file to its end, by the sizes that they state.

    Little is read: headers, and the places between them. A fragmented MP4 without an index, or a WebM or
    AVI that was never finished, cut exactly between two parts, looks whole; damage inside a part shows only
    when it is decoded. JPEG is looked through from its end for the end marker.

    Args:
        medium: An image or a video.
        media_root: See :func:`vlcpt.data.media.open.resolve`.

    Raises:
        MediaError: If the file may not be opened, is of no kind that is read, or is not whole.

    Example:
        >>> from io import BytesIO
        >>> import PIL.Image
        >>> from vlcpt.data.documents import Image
        >>> file = BytesIO()
        >>> PIL.Image.new("L", (30, 20)).save(file, "PNG")
        >>> check_container(Image(data=file.getvalue()), media_root=None)
        >>> check_container(Image(data=file.getvalue()[:-20]), media_root=None)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        vlcpt.data.media.open.MediaError: image given as bytes is cut short or damaged: it ends after ...
    """
    with open_medium(medium, media_root, limits) as file:
        start = file.read(64)
        refuse_heif(medium, start)
        walk = _walk_of(start)
        if walk is None:
            raise MediaError(
                f"{medium} is no JPEG, PNG, WebP, GIF, BMP, TIFF, MP4, MOV, WebM, MKV or AVI file; it begins "
                f"with {start[:12]!r}. Convert it to one of these."
            )
        try:
            walk(FileParts(file))
        except BrokenFileError as error:
            raise MediaError(
                f"{medium} is cut short or damaged: {error}. Copy, download or encode it again, or remove it "
                "from the row."
            ) from None
        except OSError as error:
            raise MediaError(f"{medium} cannot be read: {error.strerror}. Check the disk.") from None


def _walk_of(start: bytes) -> Callable[[FileParts], None] | None:
    """The walk for a file that begins so."""
    if start[:8] == b"\x89PNG\r\n\x1a\n":
        return walk_png
    if start[:3] == b"\xff\xd8\xff":
        return walk_jpeg
    if start[:6] in (b"GIF87a", b"GIF89a"):
        return walk_gif
    if start[:4] in _TIFF_STARTS:
        return walk_tiff
    if start[:4] == b"RIFF":
        return {b"WEBP": walk_webp, b"AVI ": walk_avi}.get(start[8:12])
    if start[:4] == b"\x1aE\xdf\xa3":
        return walk_matroska
    if start[4:8] in _MP4_STARTS:
        return walk_mp4
    return walk_bmp if start[:2] == b"BM" else None
