"""A table of numbers of which none is cut: what is too wide for a terminal comes in blocks of columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table

_NAME = 20  # cells of a name's line, at most: a Chinese character takes two


@dataclass(frozen=True)
class Sheet:
    """Labels, and a column of numbers for each source or set.

    Args:
        title: What it shows.
        columns: The columns' names.
        rows: A label and a cell of each column.
        caption: Below it.

    Example:
        >>> sheet = Sheet("counts", ["new", "old"], [("read", ["1,234,567", "12"])])
        >>> console = Console(width=20)
        >>> with console.capture() as narrow:
        ...     console.print(sheet)
        >>> [line.split() for line in narrow.get().splitlines() if "read" in line]
        [['read', '1,234,567'], ['read', '12']]
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    caption: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        done = 0
        while done < len(self.columns):
            count = len(self.columns) - done
            while count > 1 and not self._fits(self._table(done, done + count), console, options):
                count -= 1
            yield self._table(done, done + count)
            done += count

    def _fits(self, table: Table, console: Console, options: ConsoleOptions) -> bool:
        whole = Measurement.get(console, options.update(max_width=10_000), table).maximum
        return whole <= options.max_width

    def _table(self, start: int, stop: int) -> Table:
        table = Table(box=box.SIMPLE, pad_edge=False)
        if start == 0:
            table.title, table.title_justify = self.title, "left"
        if stop == len(self.columns) and self.caption:
            table.caption, table.caption_justify = self.caption, "left"
        table.add_column("")
        for number in range(start, stop):
            name = self.columns[number]
            # As wide as a number or a word of the name needs: of a narrow terminal, labels take what is left.
            words = max(map(cell_len, name.split()), default=0)
            widest = max(*(cell_len(cells[number]) for _, cells in self.rows), min(_NAME, words))
            table.add_column(name, justify="right", width=widest, overflow="fold")
        for label, cells in self.rows:
            table.add_row(label, *cells[start:stop])
        return table
