"""Draw docs/targets.svg, which tokens train, for docs/training.md: ``python docs/make_targets_svg.py``."""

import os
import tempfile
from io import StringIO
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

from vlcpt import load_processor, parse_markup
from vlcpt.data.encode.encoder import DocumentEncoder
from vlcpt.data.plan.split import split_stream
from vlcpt.demo import base_path
from vlcpt.report.terminal import document_lines

MARKUP = (
    "<image>\nFig. 1 <trainable_text>shows the relief valve.</trainable_text> See page 12. "
    '<trainable_text weight="0.5">它在三点四兆帕时打开。</trainable_text>'
)


def main() -> None:
    output = Path(__file__).resolve().with_name("targets.svg")
    console = Console(
        record=True,
        width=94,
        force_terminal=True,
        color_system="truecolor",
        file=StringIO(),
        legacy_windows=False,
    )
    processor = load_processor(base_path())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Image.new("RGB", (112, 84), "white").save("valve.png")
        document = parse_markup(MARKUP, ["valve.png"])
        stream = DocumentEncoder(processor).tokens(document)
        os.chdir(output.parent)
    lines = document_lines("train.jsonl:1", stream, split_stream(stream, 4096), processor.tokenizer, console)
    legend = Text.assemble(
        ("trained", "black on green3"),
        " token by token   ",
        ("context", "dim"),
        "   ",
        ("[image]", "cyan"),
        " folded   ",
        ("×0.5", "magenta"),
        " weight",
    )
    for line in (Text(MARKUP), Text(), *lines, legend):
        console.print(line)
    console.save_svg(str(output), title="vlcpt inspect")


if __name__ == "__main__":
    main()
