"""What a person reads in a terminal."""

import itertools
import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from transformers import ProcessorMixin

from vlcpt import CPTDataset, parse_markup
from vlcpt.data.encode.encoder import DocumentEncoder
from vlcpt.data.plan.ledger import Ledger
from vlcpt.data.plan.split import split_stream
from vlcpt.model.tuning import TowerRow
from vlcpt.report.check import memory_table
from vlcpt.report.memory import MemoryEstimate, Moment
from vlcpt.report.reliance import NatsSums
from vlcpt.report.summary import summarise, summary_table
from vlcpt.report.terminal import (
    continuation_lines,
    document_lines,
    ledger_table,
    number,
    results_table,
    towers_table,
)


def shown(thing: object, width: int = 100, **options: object) -> str:
    output = StringIO()
    Console(file=output, width=width, **options).print(thing)  # type: ignore[arg-type]
    return output.getvalue()


def inspected(
    markup: str, processor: ProcessorMixin, images: list[str] | None = None, **options: object
) -> str:
    document = parse_markup(markup, images or [])
    stream = DocumentEncoder(processor).tokens(document)
    parts = split_stream(stream, int(str(options.pop("max_length", 4096))))
    output = StringIO()
    console = Console(file=output, width=200, **options)  # type: ignore[arg-type]
    for line in document_lines("a.jsonl:1", stream, parts, processor.tokenizer, console):
        console.print(line)
    return output.getvalue()


def test_without_colours_exactly_the_targets_stand_in_brackets(tiny_processor: ProcessorMixin) -> None:
    text = inspected("one <trainable_text>two</trainable_text> three", tiny_processor)

    assert text.splitlines()[1].startswith("one« two»")


def test_with_colours_there_are_no_brackets(tiny_processor: ProcessorMixin) -> None:
    text = inspected("one <trainable_text>two</trainable_text>", tiny_processor, force_terminal=True)

    assert "«" not in text
    assert "\x1b[" in text


def test_a_mediums_tokens_are_folded_into_one_label(tiny_processor: ProcessorMixin, tmp_path: Path) -> None:
    Image.new("RGB", (112, 56)).save(tmp_path / "a.png")
    text = inspected("<image>a", tiny_processor, [str(tmp_path / "a.png")])

    assert "8 tokens, 4×2]" in text
    assert "<|image_pad|>" not in text


def test_chinese_and_emoji_are_not_cut(tiny_processor: ProcessorMixin) -> None:
    text = inspected("安全阀<trainable_text>👩‍🔧修理</trainable_text>", tiny_processor)

    assert "安全阀«👩‍🔧修理" in text
    assert "\ufffd" not in text


def test_a_weight_is_shown_at_the_end_of_its_span(tiny_processor: ProcessorMixin) -> None:
    text = inspected('one <trainable_text weight="0.3">two</trainable_text> three', tiny_processor)

    assert text.count("×0.3") == 1


def test_parts_and_what_is_trimmed_are_marked(tiny_processor: ProcessorMixin) -> None:
    words = "one two three four five six"
    split = inspected(f"<trainable_text>{words}</trainable_text>", tiny_processor, max_length=4)
    trimmed = inspected("<trainable_text>one</trainable_text> two three", tiny_processor)

    assert "✂" in split and "parts" in split
    assert "┊" in trimmed


def test_the_ledger_table_shows_every_reason(tiny_processor: ProcessorMixin) -> None:
    rows = [{"text": "a <trainable_text>b</trainable_text>"}] * 200 + [{"text": "</trainable_text>"}]
    dataset = CPTDataset(rows, tiny_processor, max_length=64, on_bad_data="skip")
    text = shown(ledger_table(dataset.ledger))

    assert "documents read" in text and "201" in text
    assert "dropped: markup" in text
    assert "packs" in text


def test_tables_fit_a_narrow_terminal(tiny_processor: ProcessorMixin) -> None:
    result = {
        "loss": 1.0,
        "perplexity": 2.7183,
        "bits_per_byte": None,
        "targets": 5,
        "base_loss": 2.0,
        "shuffled_images_loss": None,
        "blank_images_loss": None,
    }
    rows = [TowerRow(tower="vision", how="frozen", trained=0, total=448_224, dtype="float32")]
    dataset = CPTDataset([{"text": "a b c"}], tiny_processor, max_length=64)

    for table in (results_table({"new": result}), towers_table(rows), ledger_table(dataset.ledger)):  # type: ignore[dict-item]
        assert max(map(len, shown(table, width=60).splitlines())) <= 60


def test_captions_are_one_line_of_80_columns() -> None:
    result = {"loss": 1.0, "perplexity": 2.7, "bits_per_byte": None, "targets": 5, "base_loss": 2.0}
    result |= {"shuffled_images_loss": None, "blank_images_loss": None}
    log = [{"step": 1, "loss": 1.0, "eval_new_loss": 1.0, "eval_new_reliance": 0.5}]
    kinds: tuple[Moment, ...] = ("looking", "learning", "stepping")
    estimates = [MemoryEstimate(one, 2**30, 0, 2**30, 2**30, 0, 0) for one in kinds]
    moments = itertools.permutations(estimates, 2)
    tables = (
        results_table({"new": result}),  # type: ignore[dict-item]
        summary_table(summarise(log)),
        *(memory_table(dict(zip(("as configured", "checkpointing"), two, strict=True))) for two in moments),
        NatsSums(["new"]).sheet(),
    )

    for table in tables:
        assert table.caption in shown(table, width=80).splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_number_of_a_ledger_or_an_evaluation_is_cut(width: int) -> None:
    names = ["manuals, held out", "papers", "web pages", "replay"]
    ledger = Ledger(names)
    for place, account in enumerate(ledger.sources.values()):
        account.documents.update(read=1_234_567 + place, used=1_234_560 + place)
        account.tokens.update(read=9_234_567_890 + place, targets=8_234_567_890 + place)
        account.dropped_documents.update(markup=7)
    result = {
        "loss": 1.2345,
        "perplexity": 12345.6,
        "bits_per_byte": 1.234,
        "targets": 8_234_567_890,
        "base_loss": 2.3456,
        "shuffled_images_loss": None,
        "blank_images_loss": 12.5,
    }
    for table in (ledger_table(ledger), results_table(dict.fromkeys(names, result))):  # type: ignore[arg-type]
        text = shown(table, width=width)
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        numbers = text.partition("nats per target")[0].splitlines()
        for label, cells in table.rows:
            lines = [line.split() for line in numbers if line.strip().startswith(label.strip())]
            found = [word for words in lines for word in words[len(label.split()) :]]
            assert [cell for cell in cells if cell] == found
        blocks = sum(line.strip().startswith(table.rows[0][0]) for line in numbers)
        assert blocks > 1 or width > 40
        assert blocks == 1 or width < 200


def test_a_chinese_name_of_a_source_stands_in_one_line_of_its_column() -> None:
    ledger = Ledger(["维修手册", "报告"])
    ledger.sources["报告"].documents.update(read=7, used=7)
    text = shown(ledger_table(ledger), width=60)
    assert [line.split() for line in text.splitlines() if "手册" in line] == [["维修手册", "报告", "total"]]


def test_numbers_have_three_digits_and_no_exponent() -> None:
    assert [number(value) for value in (1.2345, 12.345, 123.45, 12345.6)] == ["1.23", "12.3", "123", "12,346"]


def test_ledger_json_has_the_documented_keys(tiny_processor: ProcessorMixin, tmp_path: Path) -> None:
    CPTDataset([{"text": "a b"}], tiny_processor, max_length=64).ledger.write(tmp_path)
    ledger = json.loads((tmp_path / "ledger.json").read_text())

    assert set(ledger) == {"sources", "total", "samples", "packs", "fill"}
    assert {"read", "used", "not_drawn", "dropped", "untagged", "split"} <= set(ledger["total"]["documents"])


def nats_lines(text: str, nats: dict[str, float], processor: ProcessorMixin, **options: object) -> str:
    """A document as it is shown where its tokens, by their text, have such nats, and the others none."""
    stream = DocumentEncoder(processor).tokens(parse_markup(text))
    values = np.array([nats.get(processor.tokenizer.decode([one]), 0.0) for one in stream.input_ids])
    console = Console(file=StringIO(), width=200, **options)  # type: ignore[arg-type]
    lines = document_lines("a", stream, split_stream(stream, 64), processor.tokenizer, console, values)
    with console.capture() as shown:
        console.print(lines[1])
    return shown.get().strip()


def test_without_colours_a_word_over_the_threshold_has_the_sum_of_its_tokens(
    tiny_processor: ProcessorMixin,
) -> None:
    shown = nats_lines("a circle, then", {" c": 1.25, "le": 0.5}, tiny_processor)  # " c", "ir", "c", "le"

    assert shown == "a« circle»(+1.8)«, then<|endoftext|>»"


def test_with_colours_targets_are_coloured_by_their_nats(tiny_processor: ProcessorMixin) -> None:
    colours = {"force_terminal": True, "color_system": "truecolor"}

    little, much = (nats_lines("a circle", {" c": nats}, tiny_processor, **colours) for nats in (0.01, 3.0))

    assert "\x1b[4m c" in little and "\x1b[4m c" not in much  # underlined alone
    assert "(+" not in much and little.partition(" c")[2] == much.partition(" c")[2]


def test_an_evaluation_says_how_many_targets_need_their_image_where_images_were_measured() -> None:
    keys = ("bits_per_byte", "base_loss", "shuffled_images_loss", "blank_images_loss", "reliance")
    text: dict[str, object] = {"loss": 1.0, "perplexity": 2.7, "targets": 5, **dict.fromkeys(keys)}
    seen = text | {"reliance": {"nats_per_target": 0.5, "share_over_0.1": 0.314}}

    both = dict(results_table({"seen": seen, "text": text}).rows)  # type: ignore[dict-item]
    assert both["targets over 0.1 nats"] == ["31%", "–"]
    assert "targets over 0.1 nats" not in dict(results_table({"text": text}).rows)  # type: ignore[dict-item]


def test_no_half_of_a_character_ends_a_continuation():
    one = {
        "document": "a",
        "source": "",
        "media": [],
        "before": "",
        "continuation": "阀\ufffd",
        "truth": "门",
    }

    assert [line.plain for line in continuation_lines("held", [one])][2] == "  model  阀"
