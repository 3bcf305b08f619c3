"""Draw docs/demo.svg, the README's picture of a run's terminal: ``python docs/make_demo_svg.py``.

It runs ``vlcpt demo`` and draws what the run printed, without the ledger and with most of the steps left out.
"""

import os
import tempfile
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

from vlcpt.demo.run import run_demo
from vlcpt.report.screen import Screen

WIDTH = 84
SHOWN_STEPS = 3  # at the start and at the end


def main() -> None:
    output = Path(__file__).resolve().with_name("demo.svg")
    # Colours without a terminal's progress bars.
    screen = Screen(file=StringIO(), width=WIDTH, color_system="truecolor", legacy_windows=False)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run_demo(Path("vlcpt-demo"), console=screen)
        os.chdir(output.parent)
    assert isinstance(screen.file, StringIO)
    printed = [Text.from_ansi(line) for line in screen.file.getvalue().splitlines()]

    console = Console(
        record=True,
        width=WIDTH,
        force_terminal=True,
        color_system="truecolor",
        file=StringIO(),
        legacy_windows=False,
    )
    console.print(Text("$ vlcpt demo", style="bold"))
    for line in chosen(printed):
        console.print(line)
    console.save_svg(str(output), title="vlcpt demo")


def chosen(printed: list[Text]) -> list[Text]:
    """What trains, the first and last steps, the comparison."""
    starts = [number for number, line in enumerate(printed) if line.plain.startswith("what trains")]
    ends = [number for number, line in enumerate(printed) if line.plain.startswith("Your own data next")]
    lines = [line for line in printed[starts[0] : ends[0]] if line.plain.strip()]
    steps = [number for number, line in enumerate(lines) if line.plain.startswith("step ")]
    first, last = steps[SHOWN_STEPS], steps[-SHOWN_STEPS]
    return [*lines[:first], Text("…", style="dim"), *lines[last:]]


if __name__ == "__main__":
    main()
