"""Long documents: media whole, every target once, and advice that helps where a medium cannot fit."""

import re
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import avi, png
from vlcpt import Document, DocumentError, Image, Source, Text, Video
from vlcpt.data.encode.encoder import DocumentEncoder, TokenStream
from vlcpt.data.encode.vision import EncodingOptions, PlacedMedium
from vlcpt.data.plan.split import split_stream

START, PAD, END, TEXT = 1, 2, 3, 9


def stream_of(pieces: list[tuple[str, int]]) -> TokenStream:
    """``("c", 3)`` is three context tokens, ``("t", 2)`` two targets, ``("m", 4)`` a medium of four pads."""
    ids: list[int] = []
    targets: list[bool] = []
    media = []
    for kind, count in pieces:
        if kind == "m":
            media.append(
                PlacedMedium(Image("a.png"), len(ids), (1, 2, 2 * count), (28, 28 * count), 784, 2, 14)
            )
            ids += [START, *[PAD] * count, END]
            targets += [False] * (count + 2)
        else:
            ids += [TEXT] * count
            targets += [kind == "t"] * count
    labels = np.where(targets, ids, -100)
    labels[0] = -100
    return TokenStream(np.array(ids), labels, (labels >= 0) * 1.0, tuple(media), 0, 0)


pieces = st.lists(st.tuples(st.sampled_from("ccttm"), st.integers(1, 9)), min_size=1, max_size=14).map(
    stream_of
)


@settings(max_examples=600, deadline=None)
@given(pieces, st.integers(2, 30))
def test_parts_fit_keep_media_whole_and_hold_every_target_once(stream, max_length):
    targets = np.flatnonzero(stream.labels >= 0).tolist()
    is_text = stream.input_ids == TEXT
    kind = None
    try:
        parts = split_stream(stream, max_length, source=Source("a.jsonl", 3))
    except DocumentError as error:
        kind = error.kind
    if kind is not None:
        assert kind == "medium_too_large"
        # Neighbouring media need more than what the text tokens around them leave.
        groups = "".join("t" if text else "m" for text in is_text).split("t")
        assert max(map(len, groups)) + 2 > max_length
        return

    trained = []
    for number, part in enumerate(parts):
        assert 0 <= part.start < part.stop <= len(stream)
        assert part.length <= max_length
        # The split that the part begins after is after a text token, which it repeats.
        assert part.repeated == (part.start > 0 or number > 0)
        assert not part.repeated or is_text[part.start]
        # A part ends with its last target.
        assert stream.labels[part.stop - 1] >= 0
        inside = [place for place in targets if part.start + part.repeated <= place < part.stop]
        assert len(inside) == part.targets > 0
        trained += inside
        for placed in stream.media:
            overlap = range(max(part.start, placed.start), min(part.stop, placed.stop))
            assert len(overlap) in (0, placed.tokens + 2)
    assert trained == targets


def test_a_document_that_fits_is_one_part_up_to_its_last_target():
    (part,) = split_stream(stream_of([("c", 2), ("m", 3), ("t", 4), ("c", 5)]), 11)
    assert (part.start, part.stop, part.repeated, part.targets) == (0, 11, False, 4)


def test_a_later_part_opens_with_the_token_before_it():
    found = split_stream(stream_of([("c", 1), ("t", 9)]), 4)
    assert [(part.start, part.stop, part.repeated, part.targets) for part in found] == [
        (0, 4, False, 3),
        (3, 7, True, 3),
        (6, 10, True, 3),
    ]


def test_a_medium_moves_whole_into_the_next_part():
    # 0-3 text, 4-7 a medium, 8-9 text: a cut at 6 would fall inside, one at 8 directly after.
    found = split_stream(stream_of([("c", 1), ("t", 3), ("m", 2), ("t", 2)]), 7)
    assert [(part.start, part.stop) for part in found] == [(0, 4), (3, 10)]


def test_parts_without_a_target_are_left_away():
    found = split_stream(stream_of([("c", 20), ("t", 1), ("c", 20), ("t", 1), ("c", 20)]), 6)
    assert [part.targets for part in found] == [1, 1]
    assert split_stream(stream_of([("c", 20)]), 6) == []


def test_what_follows_the_last_target_does_not_make_a_document_long():
    assert len(split_stream(stream_of([("c", 1), ("t", 3), ("m", 50), ("c", 9)]), 4)) == 1


@pytest.mark.parametrize("on_overlong", ["drop", "error"])
def test_a_longer_document_that_is_not_to_be_split_is_an_error(on_overlong):
    stream = stream_of([("c", 1), ("t", 9), ("c", 9)])
    with pytest.raises(DocumentError) as caught:
        split_stream(stream, 9, on_overlong=on_overlong, source=Source("a.jsonl", 3))
    assert str(caught.value) == (
        "a.jsonl:3: 10 tokens up to the last target, more than max_length 9. "
        "Raise max_length, or set on_overlong: split."
    )
    assert caught.value.kind == "overlong"
    assert len(split_stream(stream, 10, on_overlong=on_overlong)) == 1
    with pytest.raises(
        DocumentError, match=r"Raise max_length, lower max_pixels, or set on_overlong: split\."
    ):
        split_stream(stream_of([("c", 1), ("m", 2), ("t", 9)]), 9, on_overlong=on_overlong)


CLIP = avi(0, frames=32, rate=8, width=168, height=168)


def group(*media):
    return Document((Text("a"), *media, Text("b", trainable=True)))


@pytest.mark.parametrize(
    "document",
    [
        group(Image("a.png", png(0, 448, 448))),
        group(Image("a.png", png(0, 60, 1600))),
        group(Image("a.png", png(0, 40, 7500))),  # thin: few pixels, many tokens
        group(Image("a.png", png(0, 30, 30), min_pixels=200_000)),  # enlarged
        group(Image("a.png", png(0, 448, 448)), Image("b.png", png(1, 200, 300))),
        group(
            Image("a.png", png(0, 448, 448)), Image("b.png", png(1, 28, 28)), Image("c.png", png(2, 400, 90))
        ),
        group(*(Image("a.png", png(0, 448, 448)) for _ in range(4))),
        group(Video("a.mp4", CLIP)),
        group(Image("a.png", png(0, 448, 448)), Video("a.mp4", CLIP), Image("b.png", png(0, 448, 448))),
        group(Video("a.mp4", CLIP, min_pixels=100_000)),
    ],
)
@pytest.mark.parametrize("max_length", [33, 64, 101])
def test_the_max_pixels_that_an_error_names_really_fits(tiny_processor, document, max_length):
    stream = DocumentEncoder(tiny_processor).tokens(document)
    with pytest.raises(DocumentError) as caught:
        split_stream(stream, max_length, source=Source("a.jsonl", 3))
    message = str(caught.value)
    largest = max(stream.media, key=lambda placed: placed.tokens)
    assert message.startswith(f"a.jsonl:3: {largest.medium} takes {largest.tokens} tokens")
    assert f"does not fit max_length {max_length}. Set max_pixels to" in message
    assert ("stands with" in message) == (len(stream.media) > 1)

    limit = int(re.search(r"Set max_pixels to (\d+) or less", message).group(1))
    smaller = DocumentEncoder(tiny_processor, EncodingOptions(max_pixels=limit)).tokens(document)
    assert split_stream(smaller, max_length)
    if len(stream.media) == 1:  # and does not shrink a medium more than it must
        assert sum(placed.tokens for placed in smaller.media) > 0.4 * (max_length - 4)


@pytest.mark.parametrize(
    ("media", "where"),
    [
        ([Image("a.png", png(0, 448, 448), max_pixels=300_000)], " in the row"),
        (
            [Image("a.png", png(0, 448, 448), max_pixels=300_000), Image("b.png", png(0, 448, 448))],
            " in the row and in the configuration",
        ),
    ],
)
def test_advice_goes_where_it_has_an_effect(tiny_processor, media, where):
    """What a row says of a medium wins over the configuration."""
    stream = DocumentEncoder(tiny_processor).tokens(group(*media))
    with pytest.raises(DocumentError, match=rf"Set max_pixels{where} to (\d+) or less, or raise") as caught:
        split_stream(stream, 32)

    limit = int(re.search(r"(\d+) or less", caught.value.reason).group(1))
    lower = [replace(one, max_pixels=limit if one.max_pixels else None) for one in media]
    smaller = DocumentEncoder(tiny_processor, EncodingOptions(max_pixels=limit)).tokens(group(*lower))
    assert split_stream(smaller, 32)


def test_advice_names_the_lower_limit_that_it_would_fall_below(tiny_processor):
    stream = DocumentEncoder(tiny_processor, EncodingOptions(min_pixels=100_000)).tokens(
        group(Image("a.png", png(0, 448, 448)))
    )
    with pytest.raises(
        DocumentError, match=r"max_pixels to \d+ or less, and min_pixels, wherever it is set, to no"
    ):
        split_stream(stream, 32)


def test_advice_for_a_thousand_neighbouring_images_takes_no_time():
    """It tried every limit on every image: ten seconds for one hostile row."""
    images = [
        PlacedMedium(Image("a.png"), 1 + 156 * number, (1, 22, 28), (308, 392), 784, 2, 14)
        for number in range(1000)
    ]
    length = images[-1].stop + 1
    labels = np.full(length, -100)
    labels[-1] = 7
    stream = TokenStream(np.zeros(length, np.int64), labels, (labels > 0) * 1.0, tuple(images), 0, 0)

    before = time.process_time()
    with pytest.raises(DocumentError, match=r"stands with 999 more media .* Set max_pixels to \d+ or less"):
        split_stream(stream, 4096)
    assert time.process_time() - before < 1


def test_where_no_max_pixels_helps_the_error_names_a_max_length_that_does(tiny_processor):
    document = group(*(Image("a.png", png(0, 28, 28)) for _ in range(6)))
    stream = DocumentEncoder(tiny_processor).tokens(document)
    with pytest.raises(DocumentError, match=r"Raise max_length to 20 or more\.") as caught:
        split_stream(stream, 8)
    assert "a.png takes 1 tokens and stands with 5 more media without text between" in caught.value.reason
    assert len(split_stream(stream, 20)) == 2  # end-of-text is left for the second


def test_a_medium_between_texts_that_fits_exactly_is_taken():
    stream = stream_of([("c", 1), ("m", 4), ("t", 30)])
    assert split_stream(stream, 8)[0].stop == 8
    with pytest.raises(DocumentError, match=r"a\.png takes 4 tokens, which does not fit max_length 7\."):
        split_stream(stream, 7)
