"""Whether a video file is whole, by the sizes that it states itself; no frame is decoded."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from vlcpt.data.file_parts import BrokenFileError, FileParts

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
