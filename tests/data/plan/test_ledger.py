"""The ledger: every document and token once, written whole or not at all."""

import json
import os

import numpy as np
import pytest

from vlcpt import CPTDataset, Image
from vlcpt.data.encode.encoder import TokenStream
from vlcpt.data.encode.vision import PlacedMedium
from vlcpt.data.plan.ledger import DOCUMENT_COUNTS, TOKEN_COUNTS, Dropped, Ledger, count_tokens
from vlcpt.data.plan.split import Part, split_stream
from vlcpt.file_writes import WriteError


def stream() -> TokenStream:
    """0 begins a span, 1-4 a medium of 2 pads, 5-8 targets, 9-10 context, 11 a target, 12 context, 13 end."""
    labels = np.full(14, -100)
    labels[[5, 6, 7, 8, 11]] = 7
    medium = PlacedMedium(Image("a.png"), 1, (1, 2, 4), (28, 56), 784, 2, 14)
    return TokenStream(np.arange(14), labels, (labels > 0) * 1.0, (medium,), 1, 0)


def test_the_tokens_of_a_document_are_counted_by_what_becomes_of_them():
    counts = count_tokens(stream(), split_stream(stream(), 100))
    assert counts.read == 14
    assert counts.targets == 5
    assert counts.media == 2
    assert counts.special == 2  # vision start and end; end-of-text is trimmed
    assert counts.context == 3  # the first token, 9 and 10
    assert counts.trimmed == 2
    assert counts.targets_without_context == 1
    assert counts.repeated == 0


def test_repeated_tokens_and_those_between_parts_are_outside_or_trimmed():
    parts = split_stream(stream(), 7)
    assert [(part.start, part.stop, part.repeated) for part in parts] == [(0, 7, False), (6, 12, True)]
    counts = count_tokens(stream(), parts)
    assert counts.repeated == 1
    assert counts.targets == 5
    assert counts.targets + counts.context + counts.media + counts.special + counts.trimmed == 14


def test_a_part_that_is_left_away_is_trimmed():
    counts = count_tokens(stream(), [Part(10, 12, True, 1)])
    assert (counts.targets, counts.media, counts.special) == (1, 0, 0)
    # All but the lost target, which is context wherever it stands.
    assert (counts.trimmed, counts.context, counts.targets_without_context) == (12, 1, 1)


def test_a_lost_target_is_counted_also_where_its_part_has_no_other(tiny_processor):
    text = "<trainable_text>a</trainable_text>" + " b c d e f g h i j" * 20
    rows = [{"text": text + "<trainable_text> z</trainable_text>"}]
    ledger = CPTDataset(rows, tiny_processor, max_length=40, train_eos="never").ledger
    assert ledger.sources["rows"].tokens["targets_without_context"] == 1
    ledger.check()


def test_a_document_whose_one_target_is_lost_is_dropped_and_says_so(tiny_processor):
    rows = [{"text": "<trainable_text>a</trainable_text> b"}, {"text": "a"}]
    ledger = CPTDataset(rows, tiny_processor, max_length=40).ledger
    (dropped,) = ledger.dropped
    assert (dropped.line, dropped.reason) == (1, "without_targets")
    assert dropped.detail == "its only target is its first token, which nothing predicts"
    assert ledger.total.tokens["targets_without_context"] == 1  # of the other, which has its end of text
    ledger.check()


def test_the_sources_are_written_with_every_count():
    ledger = Ledger(["a", "b"])
    ledger.sources["a"].documents.update(read=3, used=2)
    ledger.sources["a"].dropped_documents.update(markup=1)
    ledger.sources["b"].documents.update(read=1, used=1)
    ledger.check()
    found = ledger.as_json()
    assert set(found) == {"sources", "total", "samples", "packs", "fill"}
    assert list(found["sources"]) == ["a", "b"]
    for source in (*found["sources"].values(), found["total"]):
        assert set(source["documents"]) == {*DOCUMENT_COUNTS, "dropped"}
        assert set(source["tokens"]) == {*TOKEN_COUNTS, "dropped"}
    assert found["total"]["documents"]["read"] == 4
    assert found["total"]["documents"]["dropped"] == {"markup": 1}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("documents", "the ledger of 'a' does not balance: 2 documents were read but 0 are accounted for"),
        ("tokens", "the ledger of 'a' does not balance: 2 tokens were read but 0 are accounted for"),
    ],
)
def test_what_does_not_balance_is_an_error(kind, message):
    ledger = Ledger(["a"])
    getattr(ledger.sources["a"], kind)["read"] += 2
    with pytest.raises(RuntimeError, match=message):
        ledger.check()


def test_the_table_has_what_adds_up_and_deeper_what_does_not():
    ledger = Ledger(["a"])
    account = ledger.sources["a"]
    account.documents.update(read=5, used=3, not_drawn=1, untagged=2, split=1)
    account.tokens.update(read=50, targets=8)
    account.dropped_documents.update(without_targets=1)
    account.dropped_tokens.update(without_targets=42, medium=0)
    ledger.check()
    assert [(label, *cells) for label, cells in ledger.table()[1]] == [
        ("documents read", "5"),
        ("    of these untagged", "2"),
        ("  used", "3"),
        ("    of these split", "1"),
        ("  not drawn", "1"),
        ("  dropped: without targets", "1"),
        ("tokens read", "50"),
        ("  targets", "8"),
        ("  dropped: without targets", "42"),
    ]


def test_two_files_are_written_and_nothing_beside_them(tmp_path):
    ledger = Ledger(["a"])
    ledger.dropped.append(Dropped("a.jsonl", 7, "页 7", "markup", "not closed"))
    ledger.write(tmp_path / "new" / "folder")
    files = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert files == ["dropped.jsonl", "ledger.json"]
    line = (tmp_path / "new" / "folder" / "dropped.jsonl").read_text(encoding="utf-8")
    assert json.loads(line) == {
        "source": "a.jsonl",
        "line": 7,
        "id": "页 7",
        "reason": "markup",
        "detail": "not closed",
    }
    assert "页" in line
    assert json.loads((tmp_path / "new" / "folder" / "ledger.json").read_text()) == ledger.as_json()


def test_a_document_without_an_id_has_its_place_for_one(tmp_path):
    ledger = Ledger(["a"])
    ledger.dropped.append(Dropped("a.jsonl", 7, None, "markup", "not closed"))
    ledger.write(tmp_path)
    assert json.loads((tmp_path / "dropped.jsonl").read_text())["id"] == "a.jsonl:7"


def test_a_write_that_fails_leaves_the_old_file_and_no_partial_one(tmp_path, monkeypatch):
    ledger = Ledger(["a"])
    ledger.write(tmp_path)
    before = (tmp_path / "ledger.json").read_text()
    ledger.packs = 99
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:  # after the file and the folder of dropped.jsonl
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        WriteError,
        match=r"ledger\.json \(the account of the data\) could not be written: No space left on device\. It "
        r"takes about \d+\.\d kB, and .* are free there\. Make room",
    ):
        ledger.write(tmp_path)
    assert (tmp_path / "ledger.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dropped.jsonl", "ledger.json"]
