"""Documents of text alone are scanned together, with what scanning each of them by itself gives."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.strategies import texts, weights
from tests.support import png
from vlcpt import Document, DocumentError, Image, Text, parse_markup
from vlcpt.data.encode import tokens
from vlcpt.data.encode.encoder import DocumentEncoder
from vlcpt.data.encode.vision import EncodingOptions
from vlcpt.data.plan import scan as scanning
from vlcpt.data.plan.scan import Reading, Scan, SourceScanner
from vlcpt.data.sources import open_source

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
    source = open_source(documents, format="vlcpt")
    reading = Reading(max_length, on_bad_data="error" if stops else "skip")
    return SourceScanner(source, encoder, reading)[0]


@pytest.fixture(scope="module", params=["with offsets", "in batches"])
def encoders(request, tiny_processor):
    """One encoder for each choice of ``train_eos``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENIZERS_PARALLELISM", "false" if request.param == "in batches" else "true")
        found = {
            train_eos: DocumentEncoder(tiny_processor, EncodingOptions(train_eos=train_eos))
            for train_eos in ("auto", "always", "never")
        }
    assert all(one.runs._in_batches == (request.param == "in batches") for one in found.values())
    return found


@settings(shared, max_examples=200)
@given(
    rows,
    st.sampled_from(["auto", "always", "never"]),
    st.sampled_from([4, 20, 200]),
    st.sampled_from([1, 3, 64]),
    st.booleans(),
)
def test_texts_scanned_together_equal_texts_scanned_alone(
    encoders, documents, train_eos, max_length, ahead, stops
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scanning, "AHEAD", ahead)
        together = scan(encoders[train_eos], documents, max_length, stops=stops)
        patch.setattr(scanning, "_is_text", lambda document: False)
        alone = scan(encoders[train_eos], documents, max_length, stops=stops)

    assert np.array_equal(together.lines, alone.lines)
    assert (together.marks, together.dropped_tokens) == (alone.marks, alone.dropped_tokens)
    assert together.unused == alone.unused
    assert str(together.error) == str(alone.error)


def test_no_text_is_encoded_twice_where_no_edge_cuts_a_token(tiny_processor, monkeypatch):
    encoder = DocumentEncoder(tiny_processor)
    monkeypatch.setattr(encoder, "tokens", lambda document: pytest.fail(f"alone: {document}"))
    rows = [
        {"text": "a pump <trainable_text>closes the valve</trainable_text>"},
        {"text": "untagged"},
        {"text": "泵 <trainable_text>关闭阀门。</trainable_text> é"},
    ] * 50
    found = scan(encoder, rows, 2048, stops=True)
    assert found.error is None
    assert found.lines["first"].sum() == 150


def test_a_text_without_targets_too_long_or_cut_is_not_encoded_again(tiny_processor, monkeypatch):
    """Its tokens are known by then; a corpus of books would be encoded twice."""
    encoder = DocumentEncoder(tiny_processor)
    monkeypatch.setattr(encoder, "tokens", lambda document: pytest.fail(f"again: {document}"))
    monkeypatch.setattr(encoder.runs, "tokenize", lambda texts: pytest.fail(f"again: {texts}"))
    rows = [
        {"text": "none <trainable_text></trainable_text>"},
        {"text": "<trainable_text>" + "a pump closes " * 100 + "</trainable_text>"},
        {"text": "a pump, th<trainable_text>e</trainable_text> valve"},
    ]
    found = scan(encoder, rows, 64, stops=True)
    assert found.error is None
    assert [unused.row for unused in found.unused] == [0]
    assert found.lines["first"].tolist().index(True, 1) > 1  # its first document is in parts
    assert found.marks["cut_edges"] > 0


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


def test_rows_with_large_texts_are_not_gathered(tiny_processor, monkeypatch):
    """Sixty-four documents of a megabyte each would be held at once."""
    sizes: list[int] = []

    def scan_texts(encoder: object, documents: list[Document], max_length: int) -> list[None]:
        sizes.append(len(documents))
        return [None] * len(documents)

    monkeypatch.setattr(scanning, "scan_texts", scan_texts)
    rows = [{"text": "word " * 14_000}] * 3 + [{"text": "a"}] * 70
    scan(DocumentEncoder(tiny_processor), rows, 2048, stops=True)
    assert sizes == [1, 1, 1, 64, 6]
