from functools import cache

import numpy as np
import pytest

from tests.support import png
from vlcpt import Document, Image, Text, parse_markup
from vlcpt.data.documents import TurnEdge
from vlcpt.data.encode.encoder import DocumentEncoder
from vlcpt.data.encode.pieces import pieces_of, shown_sums, token_texts
from vlcpt.data.plan.split import split_stream

MARKED = (
    'Der <trainable_text weight="0.3">Überdruck\n\n  ist</trainable_text> 阀门'
    "<trainable_text>打开🔧👩\u200d🔧</trainable_text> e\u0301 end"
)
encoder_of = cache(DocumentEncoder)  # with the real vocabulary it takes a second


def pieces(document, processor, max_length=512):
    stream = encoder_of(processor).tokens(document)
    found = pieces_of(stream, split_stream(stream, max_length), token_texts(processor.tokenizer))
    return stream, found


def test_each_token_writes_what_the_tokenizer_decodes(real_tokenizer):
    texts = token_texts(real_tokenizer)
    ids = np.random.default_rng(0).integers(0, len(real_tokenizer), 3000)

    for number in [*ids.tolist(), *range(151_643, len(real_tokenizer))]:
        assert texts.text(np.array([number])) == real_tokenizer.decode([number])


@pytest.mark.parametrize("max_length", [512, 12, 11, 10, 9])
def test_pieces_hold_the_whole_text_whatever_place_it_is_split_at(real_processor, max_length):
    """A part may end inside a character, which has more than one token."""
    stream, found = pieces(parse_markup(MARKED), real_processor, max_length)
    written = [one for one in found if one.kind in ("text", "control")]

    assert "".join(one.text for one in written) == real_processor.tokenizer.decode(stream.input_ids)
    assert all(sum(one.lengths) == len(one.text) for one in written)
    assert [one.start for one in written[1:]] == [one.stop for one in written[:-1]]
    assert sum(one.kind == "part" for one in found) == len(split_stream(stream, max_length)) * (
        max_length < 100
    )


def test_targets_are_the_text_of_the_spans(real_processor):
    _, found = pieces(parse_markup(MARKED), real_processor)

    targets = [(one.text, round(one.weight, 6)) for one in found if one.weight > 0]
    assert targets == [(" Überdruck\n\n  ist", 0.3), ("打开🔧👩\u200d🔧", 1.0)]


def test_a_control_token_is_told_from_the_same_characters_in_a_text(tiny_processor):
    document = Document(
        (TurnEdge("start"), Text("<|im_start|>user"), Text("a", trainable=True), TurnEdge("end"))
    )
    _, found = pieces(document, tiny_processor)

    assert [(one.kind, one.text) for one in found][:2] == [
        ("control", "<|im_start|>"),
        ("text", "<|im_start|>user"),
    ]


def test_what_cannot_reach_the_loss_is_trimmed(tiny_processor):
    document = Document(
        (Image(data=png(1)), Text("a"), Text("b", trainable=True), Text(" c"), Image(data=png(2)))
    )
    _, found = pieces(document, tiny_processor)

    assert [(one.kind, one.is_trimmed) for one in found] == [
        ("medium", False),
        ("text", False),
        ("text", False),
        ("text", True),
        ("medium", True),
        ("control", True),
    ]


def test_edges_that_cut_a_token_are_marked_where_they_are(real_processor):
    stream, found = pieces(
        parse_markup("The val<trainable_text>ve op</trainable_text>ens at 3"), real_processor
    )

    assert stream.cut_edges == 2
    marks = [place for place, one in enumerate(found) if one.kind == "cut"]
    assert [found[place - 1].text + "|" + found[place + 1].text for place in marks] == [
        "The val|ve op",
        "ve op|ens at 3",
    ]


def test_numbers_of_tokens_are_summed_over_whole_characters(real_processor):
    stream, found = pieces(parse_markup("a<trainable_text>👩\u200d🔧b</trainable_text>"), real_processor)
    (target,) = [one for one in found if one.kind == "text" and one.weight > 0]

    sums = shown_sums(target, np.ones(len(stream)), stream, token_texts(real_processor.tokenizer))
    assert len(sums) == len(target.lengths)
    assert sum(sums) == target.stop - target.start
    assert max(sums) > 1
