"""Tables and marks on terminals of any width, without colours, and of ASCII."""

import io

import pytest
from rich.cells import cell_len
from rich.text import Text

from vlcpt.report.screen import Screen, Sheet, plain_table, say
from vlcpt.report.terminal import legend

CAPTION = "loss in nats per target; base: without this training; shuffled: the next document's images"
NAMES = ("old_general_documents", "中文手册与维修记录维修记录", "total", "a/b.c", "x")
SHEET = Sheet("ledger", NAMES, [("documents read", ["1,234,567"] * 5), ("  used", ["1"] * 5)], CAPTION)


def shown(item: object, width: int, encoding: str = "utf-8") -> list[str]:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    Screen(file=stream, width=width).print(item)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding).splitlines()  # type: ignore[attr-defined]


@pytest.fixture
def replacing() -> None:
    """The command's way with characters that a terminal lacks."""
    from vlcpt.__main__ import print_everywhere

    print_everywhere()


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_table_fits_and_its_caption_is_as_wide_as_the_terminal(width: int) -> None:
    lines = shown(SHEET, width)

    assert max(map(cell_len, lines)) <= width
    start = next(number for number, line in enumerate(lines) if line.startswith("loss in nats"))
    assert " ".join(" ".join(lines[start:]).split()) == CAPTION
    assert len(lines) - start <= -(-len(CAPTION) // width) + 1
    assert " ".join(lines).count("1,234,567") == 5  # no number is in two lines


def test_a_title_stands_in_one_line_over_a_narrow_table() -> None:
    title = "which targets need their image"

    assert shown(Sheet(title, ["x"], [("a", ["1"])]), 80)[0].rstrip() == title


def test_a_long_name_is_cut_into_lines_of_one_length() -> None:
    lines = [line.strip() for line in shown(Sheet("", NAMES[:1], [("a", ["1"])]), 80)]

    assert "old_general" in lines and "_documents" in lines


@pytest.mark.usefixtures("replacing")
def test_columns_of_names_that_ascii_lacks_are_as_wide_as_what_is_shown() -> None:
    table = plain_table()
    for name in ("名字", "÷"):
        table.add_column(name)
    table.add_row("照片…", "1")
    _, head, rule, row, *_ = (line.rstrip() for line in shown(table, 40, "ascii"))

    assert (head, row) == (" ??      /", " ??...   1")
    assert set(rule) == {" ", "-"}


@pytest.mark.parametrize("no_color", [True, False])
def test_targets_have_marks_where_colours_are_not_wanted(no_color: bool) -> None:
    screen = Screen(file=io.StringIO(), force_terminal=True, color_system="256", no_color=no_color)

    assert ("«trained»" in legend(screen).plain) == no_color


def test_a_brief_screen_shows_results_alone_and_logs_warnings(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    screen = Screen(brief=True)
    screen.print(Text("a table"))
    say(screen, "reading")
    say(screen, "the disk is nearly full", "yellow")
    say(screen, "saved in runs/[a]", is_result=True)

    assert capsys.readouterr().out == "saved in runs/[a]\n"
    assert [one.getMessage() for one in caplog.records] == ["the disk is nearly full"]
