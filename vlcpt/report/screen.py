"""A terminal that shows text as it is, and tables that fit it; control characters in a text have no effect.

Ids, file names and texts come from data that strangers may have written. An escape sequence in one of them
could hide lines, fake them, or set the window's title; square brackets would be read as styles.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import rich.markup
import rich.progress
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Controls but for tab and newline, characters that turn the reading direction, and halves of characters,
# which a terminal cannot be sent at all.
_STEERING = (
    *(code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"),
    *(0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029),
)
_SHOWN = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _STEERING}
_SHOWN |= {code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)}


def visible(text: str) -> str:
    """Text with control characters written out.

    Example:
        >>> print(visible("a\x1b[2Jb"))
        a\\x1b[2Jb
    """
    return text.translate(_SHOWN)


def _known_to(encoding: str, text: str) -> str:
    """The text as a terminal will show it that lacks some characters, so that columns get the right width."""
    try:
        return text.encode(encoding, "vlcpt").decode(encoding)  # see __main__.py
    except LookupError:
        return text


class Screen(Console):
    """A rich console that takes every string as it is: no markup, no emoji names, no control characters.

    A :class:`rich.text.Text` goes through as it is made; give it :func:`visible` text.

    Args:
        brief: Show only results (``is_result`` of :func:`say`), as ``--quiet`` asks for.

    Example:
        >>> Screen(width=40).print("[red]a[/red]\x1b[0m")
        [red]a[/red]\\x1b[0m
    """

    def __init__(self, *, brief: bool = False, **options: object) -> None:
        if brief:  # with no bar: bars take what others print through their console, which would lose it
            options |= {"quiet": True, "force_terminal": False}
        super().__init__(**{"markup": False, "emoji": False, **options})  # type: ignore[arg-type]
        self.brief = brief

    def render_str(self, text: str, **options: object) -> Text:
        """Where rich makes every string, a cell's or a title's too, into what it shows."""
        shown = text if self.encoding.startswith("utf") else _known_to(self.encoding, text)
        return super().render_str(visible(shown), **options)  # type: ignore[arg-type]


WARNING = "yellow"


def say(console: Console, line: str, style: str = "", *, is_result: bool = False) -> None:
    """Print a line as it is: file names hold brackets, which rich would take for styles.

    A terminal wraps it between words; a file or pipe gets it as one line.

    Args:
        style: Yellow for a warning, which a brief screen sends to the log.
        is_result: It is what came of a command: a brief screen shows it, too.

    Example:
        >>> say(Console(width=10), "a[b].jsonl is read")
        a[b].jsonl is read
        >>> quiet = Screen(brief=True)
        >>> say(quiet, "reading a.jsonl")
        >>> say(quiet, "saved in runs/a", is_result=True)
        saved in runs/a
    """
    if isinstance(console, Screen) and console.brief:
        if is_result:
            say(Screen(file=console.file), line, style)
        elif style == WARNING:
            logger.warning("%s", line)
        return
    console.print(Text(visible(line), style), soft_wrap=not console.is_terminal)


def shows_colour(console: Console) -> bool:
    """Whether colours can be seen, so that no marks are needed.

    Example:
        >>> shows_colour(Console(color_system="256", no_color=True))
        False
    """
    return console.color_system is not None and not console.no_color


def tracked(sequence: Iterable[T], description: str, *, console: Console) -> Iterable[T]:
    """Pass an iterable on, with a bar that is gone when it ends.

    Example:
        >>> from io import StringIO
        >>> list(tracked([1, 2], "reading [/red]", console=Screen(file=StringIO())))
        [1, 2]
    """
    # rich reads it as markup, and it may hold the name of a file.
    title = rich.markup.escape(visible(description))
    return rich.progress.track(sequence, title, console=console, transient=True)


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
        if self.title:  # as the caption below: the table's own would be as narrow as the table
            yield Text(visible(self.title), "italic")
        start = 0
        while start < len(self.columns):
            stop = len(self.columns)
            while stop > start + 1 and not self._fits(self._table(start, stop), console, options):
                stop -= 1
            yield self._table(start, stop)
            start = stop
        if self.caption:
            yield Text(visible(self.caption), "dim italic")

    def _fits(self, table: Table, console: Console, options: ConsoleOptions) -> bool:
        width = Measurement.get(console, options.update(max_width=10_000), table).maximum
        return width <= options.max_width

    def _table(self, start: int, stop: int) -> Table:
        table = plain_table(show_header=any(self.columns))
        table.add_column("", overflow="fold")
        for number in range(start, stop):
            name = self.columns[number]
            # As wide as a number or a word of the name needs: of a narrow terminal, labels take what is left.
            words = max(map(_width, name.split()), default=0)
            widest = max(*(cell_len(cells[number]) for _, cells in self.rows), words)
            table.add_column(name, justify="right", width=widest, overflow="fold")
        for label, cells in self.rows:
            table.add_row(label, *cells[start:stop])
        return table


def _width(word: str) -> int:
    """Cells of a column with this word in its head: a long one goes into lines of one length."""
    cells = cell_len(word)
    lines = -(-cells // _NAME)
    return -(-cells // lines) + (lines > 1 and cells > len(word))  # a Chinese character is not halved


class _Plain(box.Box):
    """A line below the head, which is of ASCII where a terminal has no other; rich would frame all cells."""

    def substitute(self, options: ConsoleOptions, safe: bool = True) -> box.Box:
        return _ASCII if options.ascii_only else self


_PLAIN = _Plain(str(box.SIMPLE))
_ASCII = box.Box(str(box.SIMPLE).replace("─", "-"), ascii=True)


def plain_table(title: str | None = None, *, show_header: bool = True) -> Table:
    """A table without frames, its title at its left.

    Example:
        >>> plain_table("ledger").title
        'ledger'
    """
    return Table(box=_PLAIN, title=title, title_justify="left", pad_edge=False, show_header=show_header)


class _Visible(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


class _Once(logging.Filter):
    """Lets only the first of the records through that have the same ``once``."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        key = getattr(record, "once", None)
        is_new = key is None or key not in self._shown
        self._shown.add(str(key))
        return is_new


@contextmanager
def shown_log(level: int) -> Iterator[None]:
    """Show what this package logs on stderr as it is, one line each, for as long as a command runs.

    Example:
        >>> with shown_log(logging.WARNING):
        ...     logging.getLogger("vlcpt").isEnabledFor(logging.INFO)
        False
    """
    ours, handler = logging.getLogger("vlcpt"), logging.StreamHandler(sys.stderr)
    before = (ours.level, ours.propagate)
    handler.setFormatter(_Visible("vlcpt: %(message)s"))
    handler.addFilter(_Once())
    ours.addHandler(handler)
    ours.setLevel(level)
    ours.propagate = False  # some libraries put a handler of their own on the root
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(before[0])
        ours.propagate = before[1]
