"""Rows of CSV and TSV files by byte offsets."""

from __future__ import annotations

import csv
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import BinaryIO

import orjson

from vlcpt.data.documents import DocumentError, Source
from vlcpt.data.rows.base import check_names
from vlcpt.data.rows.decoding import not_utf8
from vlcpt.data.rows.fields import Row
from vlcpt.data.rows.text_files import PlacedRows, Places

# Cells of these fields may hold JSON; that of a path may also begin with a bracket and be none.
_LISTS = frozenset(
    [
        *("images", "videos", "conversations", "messages", "segments", "texts", "text_list", "image_info"),
        *("image_files", "history", "similarity_matrix"),
        *("file_names", "image_file_names", "video_file_names"),
    ]
)
_ALONE = frozenset(("image", "video"))
_SWITCHES = frozenset(("label", "kto_tag"))
_SHOWN = {",": "a comma", "\t": "a tab", ";": "a semicolon", "|": "a bar"}
_KIND = {",": "CSV", "\t": "TSV"}


class DelimitedRows(PlacedRows):
    """A CSV or TSV file.

    An empty cell is an absent field, and a row of empty cells is none. Cells of fields that are lists hold
    JSON. A row above ``max_row_bytes`` ends the reading: a quote that is not closed makes one row of all that
    follows.
    """

    def _places(self) -> Places:
        self._delimiter = "\t" if self._path.suffix.lower() == ".tsv" else ","
        self._columns: list[str] = []
        starts, stops, lines = array("q"), array("q"), array("q")
        with self._path.open("rb") as file, _long_cells():
            for start, stop, line, cells in self._records(file):
                if not any(cells):
                    continue
                if not self._columns:
                    self._columns = self._header(cells)
                    continue
                starts.append(start)
                stops.append(stop)
                lines.append(line)
        return starts, stops, lines

    def row(self, number: int) -> Row:
        with _long_cells():
            (cells,) = self._reader(StringIO(self._bytes(number).decode(), newline="\n"))
        if len(cells) != len(self._columns):
            raise DocumentError(
                f"the row has {len(cells)} cells and the header {len(self._columns)}. Put a cell that holds "
                f"{_SHOWN[self._delimiter]} or a line break into double quotes.",
                kind="row",
            )
        return {
            column: _value(column, cell) for column, cell in zip(self._columns, cells, strict=True) if cell
        }

    def _reader(self, lines: Iterator[str]) -> Iterator[list[str]]:
        # Strict: a quote that is not closed would take the rest of the file for one cell.
        return csv.reader(lines, delimiter=self._delimiter, strict=True)

    def _records(self, file: BinaryIO) -> Iterator[tuple[int, int, int, list[str]]]:
        """Where each record begins and ends, its first line, and its cells."""
        place, number, start, first = 0, 0, 0, 1

        def lines() -> Iterator[str]:
            nonlocal place, number
            # No more than a row may have is read, wherever its end is.
            while line := file.readline(self._most - (place - start) + 1):
                number += 1
                if place - start + len(line) > self._most:
                    raise DocumentError(
                        f"the row has more bytes than max_row_bytes = {self._most:,}. Split it into several "
                        "rows, or raise the limit. A double quote that is not closed makes one row of all "
                        "that follows.",
                        kind="source",
                        source=Source(self._name, first),
                    )
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    found = not_utf8(self._around(place, len(line)), error.start, self._name)
                    raise found.at(Source(self._name, number)) from None
                place += len(line)
                yield text.removeprefix("\ufeff") if number == 1 else text

        reader = self._reader(lines())
        while True:
            start, first = place, number + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                todo = "Inside double quotes write each quote twice, and close each cell that is opened."
                reason = f"{error}. {todo}"
                if "new-line character" in str(error):  # of old Macs
                    reason = (
                        "lines end in a carriage return alone. Write each as a line feed: tr '\\r' '\\n'."
                    )
                raise DocumentError(
                    f"cannot be read as {_KIND[self._delimiter]}: {reason}",
                    kind="source",
                    source=Source(self._name, first),
                ) from None
            yield start, place, first, cells

    def _header(self, cells: list[str]) -> list[str]:
        # Pandas writes its index without a name.
        names = [name.strip() or f"column {number + 1}" for number, name in enumerate(cells)]
        check_names(self._name, names)
        other = next((one for one in ",\t;|" if one != self._delimiter and one in names[0]), None)
        if len(names) == 1 and other is not None:
            raise DocumentError(
                f"the header {names[0][:80]!r} is one column, and is parted by {_SHOWN[other]}. A .csv is "
                "parted by commas, a .tsv by tabs: rename the file, or write it so.",
                kind="source",
                field=self._name,
            )
        return names


def _value(column: str, cell: str) -> object:
    """What a cell holds; lists are JSON, all else is text."""
    if column in _SWITCHES and cell.lower() in ("true", "false"):
        return cell.lower() == "true"
    if (column not in _LISTS and column not in _ALONE) or cell.lstrip()[:1] not in ("[", "{"):
        return cell
    try:
        return orjson.loads(cell)
    except orjson.JSONDecodeError as error:
        if column in _ALONE:
            return cell
        raise DocumentError(
            f'expected JSON, such as ["a.png"], found {cell[:80]!r}: {error}. Strings in JSON have double '
            "quotes.",
            kind="json",
            field=column,
        ) from None


@contextmanager
def _long_cells() -> Iterator[None]:
    """The csv module refuses a cell of more than 131,072 characters; its limit is one for the process."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
