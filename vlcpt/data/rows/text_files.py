"""Rows of text files: JSON lines and lists by byte offsets; ``.txt`` and ``.md``, a row each."""

from __future__ import annotations

import json
import os
import re
from abc import abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import orjson

from vlcpt.data.documents import DocumentError, Source
from vlcpt.data.media.files import BESIDE, media_beside
from vlcpt.data.rows.base import (
    MAX_ROW_BYTES,
    FileState,
    Rows,
    check_row_size,
    file_state,
    require_regular,
)
from vlcpt.data.rows.decoding import BOM, check_wide, text_of
from vlcpt.data.rows.fields import Row

TEXT_SUFFIXES = (".txt", ".md")

_CHUNK = 1 << 20
_HEAD = 1 << 14  # bytes that tell an encoding
_SPACED = re.compile(rb'"\s+:')
_GAP = re.compile(r"[ \t\n\r]*")

Places = tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]
"""The byte at which each row starts, the one after its end, and its line or number in the file."""


class PlacedRows(Rows):
    """Rows of a file through an index of their places: random access, memory for the index and one row.

    Args:
        path: The file, without compression.
        name: What messages call it.
        max_row_bytes: See :class:`Rows`.
    """

    def __init__(self, path: Path, name: str | None = None, max_row_bytes: int = MAX_ROW_BYTES) -> None:
        super().__init__(name or str(path), max_row_bytes)
        self._path = path
        try:
            with path.open("rb") as file:
                check_wide(file.read(_HEAD), self._name)
            self._starts, self._stops, self._lines = self._places()
        except DocumentError as error:
            raise error if error.source else error.at(None, self._name) from None

    @abstractmethod
    def _places(self) -> Places: ...

    def __len__(self) -> int:
        return len(self._starts)

    def source(self, number: int) -> Source:
        return Source(self._name, int(self._lines[number]))

    def _bytes(self, number: int) -> bytes:
        start, stop = int(self._starts[number]), int(self._stops[number])
        check_row_size(stop - start, self._most)
        # By number, not as a file object: that takes three times as long, for each row.
        file = os.open(self._path, os.O_RDONLY)
        try:
            return os.pread(file, stop - start, start)
        finally:
            os.close(file)

    def _around(self, start: int, size: int) -> bytes:
        """A row with what stands around it: one line is often too short to tell encodings apart."""
        with self._path.open("rb") as file:
            file.seek(max(0, start - _HEAD))
            return file.read(_HEAD * 4 + size)


class JsonRows(PlacedRows):
    """The objects of a ``.jsonl`` file, a line each, or of the list in a ``.json`` file.

    Many files on the Hub that are called ``.json`` have one object a line, too.
    """

    def _places(self) -> Places:
        if self._path.suffix.lower() == ".json":
            with self._path.open("rb") as file:
                line = file.readline(_CHUNK)  # of a list on one line, not all
            first = line.removeprefix(BOM).strip()
            if not (first.startswith(b"{") and (first.endswith(b"}") or len(line) == _CHUNK)):
                _check_strings(self._path, self._most)
                return _places_in_list(self._path.read_bytes(), self._name)
        # One array that grows, not parts that are joined at last: that would hold them twice.
        bounds, done, blank = array("q", [0]), 0, []
        with self._path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                ends = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + (done + 1)
                bounds.frombytes(ends.astype(np.int64).tobytes())
                done += len(chunk)
            if bounds[-1] != done:  # the last line may end without a newline
                bounds.append(done)
            starts, stops = np.frombuffer(bounds, np.int64)[:-1], np.frombuffer(bounds, np.int64)[1:]
            for number in np.flatnonzero(stops - starts <= len(BOM) + 2).tolist():
                file.seek(int(starts[number]))
                if not file.read(int(stops[number] - starts[number])).removeprefix(BOM).strip():
                    blank.append(number)
        lines: Sequence[int] | np.ndarray = range(1, len(starts) + 1)
        if blank:
            starts, stops, lines = (np.delete(one, blank) for one in (starts, stops, np.array(lines)))
        return starts, stops, lines

    def row(self, number: int) -> Row:
        line = self._bytes(number)
        try:
            return json_object(line, self._name)
        except DocumentError as error:
            if error.kind == "encoding":
                text_of(line, self._name, self._around(int(self._starts[number]), len(line)))
            raise


def _places_in_list(data: bytes, name: str) -> Places:
    text = text_of(data, name)
    starts, stops = array("q"), array("q")
    byte, done = len(BOM) if data.startswith(BOM) else 0, 0
    try:
        for start, stop in _entries(text):
            starts.append(byte + len(text[done:start].encode()))
            byte = starts[-1] + len(text[start:stop].encode())
            stops.append(byte)
            done = stop
    except json.JSONDecodeError as error:
        raise DocumentError(f"not JSON: {error}.", kind="json") from None
    except RecursionError:
        raise _too_deep() from None
    return starts, stops, range(1, len(starts) + 1)


def _entries(text: str) -> Iterator[tuple[int, int]]:
    """Where each entry of a list in JSON begins and ends, in characters."""
    decoder = json.JSONDecoder()
    place = _after_gap(text, 0)
    if not text.startswith("[", place):
        found = decoder.decode(text)
        raise DocumentError(f"expected a list of rows, found {type(found).__name__}.", kind="source")
    place = _after_gap(text, place + 1)
    is_open = not text.startswith("]", place)
    while is_open:
        _, stop = decoder.raw_decode(text, place)
        yield place, stop
        place = _after_gap(text, stop)
        is_open = text.startswith(",", place)
        if not is_open and not text.startswith("]", place):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
        place = _after_gap(text, place + 1) if is_open else place
    if (end := _after_gap(text, place + 1)) != len(text):
        raise json.JSONDecodeError("Extra data", text, end)


def _after_gap(text: str, place: int) -> int:
    match = _GAP.match(text, place)
    return match.end() if match else place


def json_object(line: bytes, file: str = "") -> dict[str, object]:
    """A row from its JSON.

    Args:
        line: In UTF-8, with or without a mark at its start.
        file: Its file's name, for the command that converts another encoding.

    Example:
        >>> json_object(b'{"text": "a"}')
        {'text': 'a'}
        >>> json_object(b'{"text": "a", "text": "b"}')
        Traceback (most recent call last):
        vlcpt.data.documents.DocumentError: the key 'text' stands twice in one object. Rename or remove one.
    """
    try:
        row = orjson.loads(line.removeprefix(BOM))
    except orjson.JSONDecodeError as error:
        text_of(line, file)  # another encoding has its own error
        raise DocumentError(f"not JSON: {error}.", kind="json") from None
    if not isinstance(row, dict):
        raise DocumentError(f"expected an object in {{}}, found {type(row).__name__}.", kind="json")
    # With as many ends of keys as there are keys left, none was dropped.
    if line.count(b'":') != _count_keys(row) or _SPACED.search(line):
        try:
            json.loads(line, object_pairs_hook=_refuse_repeats)
        except RecursionError:
            raise _too_deep() from None
    return row


def _count_keys(row: object) -> int:
    found, todo = 0, [row]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            found += len(one)
            todo += one.values()
        elif isinstance(one, list):
            todo += one
    return found


def _refuse_repeats(pairs: list[tuple[str, object]]) -> None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise DocumentError(
                f"the key {key[:100]!r} stands twice in one object. Rename or remove one.", kind="json"
            )
        seen.add(key)


def _too_deep() -> DocumentError:
    return DocumentError("not JSON that can be read: it is nested too deeply.", kind="json")


def _check_strings(path: Path, most: int) -> None:
    """Raise for a JSON file with a text above a limit: a list is read as one, so its rows are too late.

    Args:
        path: The file, without compression.
        most: Bytes between two quotes.
    """
    if path.stat().st_size <= most:
        return
    with path.open("rb") as file:
        done = last = 0
        while chunk := file.read(_CHUNK):
            quotes = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord('"')) + done
            done += len(chunk)
            bounds = np.concatenate([[last], quotes, [done] if done - last > most else []])
            gaps = np.diff(bounds)
            if len(gaps) and gaps.max() > most:
                raise DocumentError(
                    f"a text at byte {int(bounds[gaps.argmax()]):,} is longer than max_row_bytes = {most:,}. "
                    "Split it into several rows, or raise the limit.",
                    kind="source",
                )
            last = int(quotes[-1]) if len(quotes) else last


class TextRows(Rows):
    """Text files, each of them one row.

    Args:
        folder: Where they are.
        files: The files.
        looks_beside: Whether media files that lie with them are named as not read.
        max_row_bytes: See :class:`Rows`.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[Path],
        *,
        looks_beside: bool = False,
        max_row_bytes: int = MAX_ROW_BYTES,
    ) -> None:
        super().__init__(str(folder), max_row_bytes)
        self._files = files
        self._looks_beside = looks_beside
        for file in files:
            require_regular(file)

    def __len__(self) -> int:
        return len(self._files)

    def source(self, number: int) -> Source:
        return Source(str(self._files[number]), 1)

    def state(self) -> list[FileState]:
        """What tells whether they changed."""
        return [file_state(file) for file in self._files]

    def left_out(self) -> Mapping[str, int]:
        """Media files that lie with them, which may be theirs."""
        return {BESIDE: media_beside(self._name)} if self._looks_beside else {}

    def row(self, number: int) -> Row:
        file = self._files[number]
        check_row_size(file.stat().st_size, self._most)
        # Line ends of any system are one character, as when Python reads a text.
        return {"text": text_of(file.read_bytes(), str(file)).replace("\r\n", "\n").replace("\r", "\n")}
