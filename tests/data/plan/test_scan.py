"""What reading rows gives: lines of documents that can be trained on, and what is wrong with the others."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.strategies import texts, weights
from tests.support import opened, png
from vlcpt import Document, DocumentError, Image, Text, parse_markup
from vlcpt.data.encode import tokens
from vlcpt.data.encode.encoder import DocumentEncoder, numbers_of
from vlcpt.data.encode.vision import EncodingOptions
from vlcpt.data.plan.scan import Reading, Scan, SourceScanner

shared = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
media = st.sampled_from([Image(data=png(0, 28, 28)), Image(data=b"broken")])
rows = st.lists(
    st.builds(Document, st.lists(st.builds(Text, texts, st.booleans(), weights), max_size=5).map(tuple))
    | st.builds(Document, st.lists(st.builds(Text, texts, st.booleans()) | media, max_size=3).map(tuple))
    | st.fixed_dictionaries(
        {"text": st.sampled_from(["<trainable_text></trainable_text>no", "untagged", 7])}
    ),
    min_size=1,
    max_size=12,
)


def scan(encoder: DocumentEncoder, documents: list[object], max_length: int, *, stops: bool) -> Scan:
    source = opened(documents, format="vlcpt")
    reading = Reading(max_length, on_bad_data="error" if stops else "skip")
    return SourceScanner(source, encoder, reading)[0]


@settings(shared, max_examples=100)
@given(rows, st.sampled_from(["auto", "always", "never"]), st.sampled_from([4, 20, 200]))
def test_a_scan_says_of_each_row_what_its_tokens_say(tiny_processor, documents, train_eos, max_length):
    """Against the tokens of each document alone, and the sums that the ledger needs."""
    encoder = DocumentEncoder(tiny_processor, EncodingOptions(train_eos=train_eos))
    source = opened(documents, format="vlcpt")
    found = SourceScanner(source, encoder, Reading(max_length, on_overlong="drop", on_bad_data="skip"))[0]
    lines, expected = {int(line["row"]): line for line in found.lines}, {}
    for row in range(len(source)):
        try:
            document = source.document(row)
            numbers = numbers_of(document, encoder.tokens(document))
        except DocumentError:
            continue
        if numbers["targets"] and numbers["length"] <= max_length:
            expected[row] = numbers
    assert lines.keys() == expected.keys()
    assert sorted([*lines, *(unused.row for unused in found.unused)]) == list(range(len(source)))
    for row, numbers in expected.items():
        names = {
            "read": "tokens",
            "stop": "length",
            "targets": "targets",
            "media": "pads",
            "images": "images",
        }
        names |= {"videos": "videos", "targets_without_context": "without_context", "checksum": "checksum"}
        assert {name: lines[row][name] for name in names} == {
            name: numbers[number] for name, number in names.items()
        }
        kept = sum(int(lines[row][name]) for name in ("targets", "context", "media", "special", "trimmed"))
        assert kept == lines[row]["read"]


@pytest.mark.parametrize("stops", [True, False])
def test_a_word_that_spans_cut_too_often_is_a_bad_row(tiny_processor, monkeypatch, stops):
    monkeypatch.setattr(tokens, "_MOST_AGAIN", 1000)
    cut = "".join(f"c<trainable_text>l</trainable_text>{letter}" for letter in "oses" * 100)
    found = scan(
        DocumentEncoder(tiny_processor), [{"text": "a b"}, {"text": cut}, {"text": "c d"}], 64, stops=stops
    )
    if stops:
        assert str(found.error).startswith("rows:2: text: its spans cut a word of")
        assert len(found.lines) == 1
    else:
        (unused,) = found.unused
        assert (unused.row, unused.dropped.reason, unused.is_bad) == (1, "markup", True)
        assert len(found.lines) == 2
    with pytest.raises(DocumentError, match="its spans cut a word of"):
        DocumentEncoder(tiny_processor).tokens(parse_markup(cut))
