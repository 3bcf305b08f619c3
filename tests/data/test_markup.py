"""Markup: what each tag means, what is an error, and that writing and reading are inverse."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.strategies import PIECES, documents
from vlcpt import DocumentError, Image, Text, Video, parse_markup


def context(text):
    return Text(text)


def trained(text, weight=1.0):
    return Text(text, trainable=True, weight=weight)


@pytest.mark.parametrize(
    ("markup", "segments"),
    [
        ("a<trainable_text>b</trainable_text>c", [context("a"), trained("b"), context("c")]),
        ('<trainable_text weight="0.3">b</trainable_text>', [trained("b", 0.3)]),
        ('<trainable_text  weight="1e-2" >b</trainable_text>', [trained("b", 0.01)]),
        ('<trainable_text weight="100">b</trainable_text>', [trained("b", 100.0)]),
        ('<trainable_text weight=".5">b</trainable_text>', [trained("b", 0.5)]),
        ("<trainable_text >b</trainable_text>", [trained("b")]),
        # Neighbouring equal segments merge.
        ("<trainable_text>a</trainable_text><trainable_text>b</trainable_text>", [trained("ab")]),
        (
            '<trainable_text>a</trainable_text><trainable_text weight="2">b</trainable_text>',
            [trained("a"), trained("b", 2.0)],
        ),
        # Other angle brackets are text.
        ("<train><trainable><b>&lt;</b>", [trained("<train><trainable><b>&lt;</b>")]),
        ("<Image><img1><VID><IMG><VIDEO>", [trained("<Image><img1><VID><IMG><VIDEO>")]),
        ("<|image_pad|><|endoftext|>", [trained("<|image_pad|><|endoftext|>")]),
        ("", []),
    ],
)
def test_tags_become_segments(markup, segments):
    assert list(parse_markup(markup).segments) == segments


@pytest.mark.parametrize(
    "tag", ["<trainable_text>", "</trainable_text>", "<image>", "<video>", "<IMG1>", "<VID2>"]
)
@pytest.mark.parametrize("backslashes", [1, 2, 3, 4, 7, 8])
def test_half_of_the_backslashes_before_a_tag_stay_and_an_odd_one_makes_it_text(tag, backslashes):
    media = {"images": ["a"]} if tag in ("<image>", "<IMG1>") else {"videos": ["a"] * int(tag[-2] in "2o")}
    before, after = "", ""
    if backslashes % 2 == 0:
        before = "<trainable_text>" if tag == "</trainable_text>" else ""
        after = "</trainable_text>" if tag == "<trainable_text>" else ""
        media = {"videos": ["a", "b"]} if tag == "<VID2>" else media
        after += "<VID1>" if tag == "<VID2>" else ""
    else:
        media = {}

    document = parse_markup(before + "x" + "\\" * backslashes + tag + after, **media)

    kept = "x" + "\\" * (backslashes // 2) + (tag if backslashes % 2 else "")
    assert document.segments[0].text == kept


def test_backslashes_elsewhere_are_text():
    text = r"\n \\ C:\dir\<b> \ <trainable"
    assert parse_markup(text).segments == (trained(text),)


def test_markers_in_order_take_the_next_file():
    document = parse_markup(
        "<image>a<video><image>", ["1.png", {"path": "2.png", "max_pixels": 784}], ["v.mp4"]
    )
    assert document.segments == (
        Image("1.png"),
        trained("a"),
        Video("v.mp4"),
        Image("2.png", max_pixels=784),
    )


def test_markers_by_number_name_their_file():
    document = parse_markup("<IMG2>a<VID1><IMG1>", ["1.png", "2.png"], ["v.mp4"])
    assert document.segments == (Image("2.png"), trained("a"), Video("v.mp4"), Image("1.png"))


def test_a_marker_inside_a_span_parts_it():
    document = parse_markup('<trainable_text weight="2">a<image>b</trainable_text>', ["x.png"])
    assert document.segments == (trained("a", 2.0), Image("x.png"), trained("b", 2.0))


def test_empty_spans_vanish_and_are_counted():
    document = parse_markup(
        "a<trainable_text></trainable_text>b<trainable_text><image></trainable_text>", ["x"]
    )
    assert document.segments == (context("ab"), Image("x"))
    assert document.empty_spans == 2
    assert document.tagged


@pytest.mark.parametrize(("untagged", "trainable"), [("train", True), ("mask", False)])
def test_text_without_tags_follows_untagged(untagged, trainable):
    document = parse_markup("a<image>b", ["x"], untagged=untagged)
    assert document.segments == (Text("a", trainable), Image("x"), Text("b", trainable))
    assert not document.tagged


def test_untagged_error_refuses_text_without_tags():
    with pytest.raises(
        DocumentError, match=r"no <trainable_text> anywhere\. Mark what to train, or set untagged"
    ):
        parse_markup("a", untagged="error")
    assert parse_markup("<trainable_text></trainable_text>a", untagged="error").segments == (context("a"),)


OPEN, CLOSE = "<trainable_text>", "</trainable_text>"


@pytest.mark.parametrize(
    ("markup", "offset", "message"),
    [
        (
            f"ab{CLOSE}",
            2,
            r"</trainable_text> closes nothing. Put <trainable_text> before it, or write \</tr",
        ),
        (f"a{OPEN}b", 1, "<trainable_text> is not closed. Add </trainable_text>."),
        (
            f"a{OPEN}b{OPEN}c{CLOSE}",
            18,
            "opens inside the span that opened at character 1. Close that one first",
        ),
        (
            "<trainable_texts>",
            0,
            "'<trainable_texts>' begins like a tag but is none. Tags are <trainable_text>",
        ),
        ("ab<trainable_text", 2, "'<trainable_text' begins like a tag but is none"),
        ("</trainable_text >", 0, "'</trainable_text >' begins like a tag but is none"),
        ("<trainable_text weight=0.3>", 0, "begins like a tag but is none"),
        ("<trainable_text weight='0.3'>", 0, "begins like a tag but is none"),
        ('<trainable_text weight="1" weight="2">', 0, "begins like a tag but is none"),
        ('<trainable_text lang="en">', 0, "put a backslash before it for the characters"),
        ('<trainable_textweight="1">', 0, "begins like a tag but is none"),
        ('<trainable_text weight="0">', 0, 'weight="0" is not a number above 0, up to 100.'),
        ('<trainable_text weight="-1">', 0, 'weight="-1" is not a number above 0'),
        ('<trainable_text weight="100.1">', 0, 'weight="100.1" is not a number above 0'),
        ('<trainable_text weight="nan">', 0, 'weight="nan" is not a number'),
        ('<trainable_text weight="1e999">', 0, 'weight="1e999" is not a number'),
        ('<trainable_text weight="1e-999">', 0, 'weight="1e-999" is not a number'),
        ('<trainable_text weight="1_0">', 0, 'weight="1_0" is not a number'),
        ('<trainable_text weight="１">', 0, 'weight="１" is not a number'),
        ('<trainable_text weight="">', 0, 'weight="" is not a number'),
    ],
)
def test_wrong_tags_are_errors_with_their_offset(markup, offset, message):
    with pytest.raises(DocumentError) as caught:
        parse_markup(markup)
    assert caught.value.offset == offset
    assert caught.value.field == "text"
    assert caught.value.kind == "markup"
    assert message in caught.value.reason


MISSPELT = [
    *("<Trainable_Text>", "<TRAINABLE_TEXT weight=0.5>", "<trainable-text>", "<trainabletext>"),
    *(
        "<trainable text>",
        "< trainable_text >",
        "</ trainable_text>",
        "</trainble_text>",
        "<trainable__text>",
    ),
    *("<trainable_tex>", "<rainable_text>", "<trianable_text>", "<tra1nable_text>", "<|trainable_text|>"),
    *("<trainable_test>", "<\u200btrainable_text>", "<trainable\u00a0text>", "</TrainableText>"),
]


@pytest.mark.parametrize("tag", MISSPELT)
def test_a_tag_that_is_misspelt_is_an_error_with_its_place(tag):
    with pytest.raises(DocumentError) as caught:
        parse_markup(f"中文 {tag}b")
    assert (caught.value.field, caught.value.offset, caught.value.kind) == ("text", 3, "markup")
    assert caught.value.reason.startswith(
        f"{tag + 'b'!r} begins like a tag but is none. Tags are <trainable_te"
    )


@pytest.mark.parametrize("tag", MISSPELT)
@pytest.mark.parametrize("backslashes", [1, 2, 3, 4])
def test_backslashes_before_a_misspelt_tag_are_those_before_a_tag(tag, backslashes):
    markup = "x" + "\\" * backslashes + tag
    if backslashes % 2:
        assert parse_markup(markup).segments == (trained("x" + "\\" * (backslashes // 2) + tag),)
    else:
        with pytest.raises(DocumentError, match="begins like a tag but is none"):
            parse_markup(markup)


@pytest.mark.parametrize(
    "text",
    [
        "<table><tr><td>x</td></tr></table>",
        "<train>a</train><trainable>b</trainable><text>c</text>",
        "<train_text>a</train_text>",  # five letters fewer
        "<trained_text>a</trained_text>",
        "<untrainable_text><trainable_te><trainable te",
        "trainable_text> x < 3 && y > 4 trainable_text",
        "if (a<trainable && text>b)",
        "<\ntrain\nable\n",
    ],
)
def test_honest_tags_and_comparisons_are_text(text):
    assert parse_markup(text).segments == (trained(text),)


def _edits(one: str, other: str) -> int:
    """Letters that are other, more, less or swapped with their neighbour, by the textbook's table."""
    table = {(i, -1): i + 1 for i in range(-1, len(one))} | {(-1, j): j + 1 for j in range(-1, len(other))}
    for i, letter in enumerate(one):
        for j, twin in enumerate(other):
            table[i, j] = min(
                table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (letter != twin)
            )
            if i and j and letter == other[j - 1] and one[i - 1] == twin:
                table[i, j] = min(table[i, j], table[i - 2, j - 2] + 1)
    return table[len(one) - 1, len(other) - 1]


@settings(max_examples=500)
@given(st.data())
def test_what_is_one_letter_off_is_an_error_and_what_is_two_is_text(data):
    name = "trainabletext"
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(name) - 1))
        letter, kept = (
            data.draw(st.sampled_from(["", "q", "é", "qt", name[place : place + 2][::-1]])),
            place + 1,
        )
        name = name[:place] + letter + name[kept + (len(letter) == 2) * data.draw(st.integers(0, 1)) :]
    gaps = st.sampled_from(["", "", "", "_", "-", " ", "  "])
    written = "".join(letter + data.draw(gaps) for letter in name)
    if data.draw(st.booleans()):
        written = written.upper()
    tag = f"<{data.draw(gaps)}{data.draw(st.sampled_from(['', '/']))}{written}>"
    wrong = min(_edits(name[:length], "trainabletext") for length in range(len(name) + 1)) <= 1

    if wrong:  # the tag itself is one that is not closed, or closes nothing
        with pytest.raises(DocumentError, match=r"begins like a tag but is none|not closed|closes nothing"):
            parse_markup(tag)
    else:
        assert parse_markup(tag).segments == (trained(tag),)


@pytest.mark.parametrize(
    ("markup", "images", "message"),
    [
        (
            "<image>",
            [],
            "the text has 1 <image> marker but 'images' lists 0 files. Give each marker one file",
        ),
        (
            "a",
            ["a"],
            "the text has 0 <image> markers but 'images' lists 1 file. Give each marker one file, in re",
        ),
        ("<image><image>", ["a"] * 3, "the text has 2 <image> markers but 'images' lists 3 files"),
        ("<IMG1>", ["a", "b"], "the text has 1 <image> marker but 'images' lists 2 files"),
        ("<IMG1><IMG1>", ["a"], "text, character 6: <IMG1> is used twice. Each file is used exactly once."),
        ("<IMG1><IMG01>", ["a"], "<IMG01> is used twice"),
        ("a<IMG2>", ["a"], "text, character 1: <IMG2> names file 2 but 'images' lists 1. Numbers start at 1"),
        ("<IMG0>", ["a"], "<IMG0> names file 0 but 'images' lists 1"),
        (
            "<image><IMG1>",
            ["a"],
            "<IMG1> follows <image> at character 0: a document uses either <image>/<video>",
        ),
        ("<IMG1><video>", ["a"], "<video> follows <IMG1> at character 0"),
        ("<image>", [7], "images[0]: a media reference must be a path"),
        ("<image>", [{"bytes": None, "path": None}], "images[0]: a media reference needs 'path' or 'bytes'"),
        ("<image>", "a", "images: expected a list of media references, found str."),
    ],
)
def test_markers_and_files_that_differ_are_errors(markup, images, message):
    with pytest.raises(DocumentError) as caught:
        parse_markup(markup, images)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("markup", "images", "offset"),
    [
        ("ab<image>c<image>d<image>", ["a"], 10),  # the first marker that has no file
        ("<image>", [], 0),
        ("ab<image>c", ["a", "b"], 10),  # a file without a marker: where it could stand
        ("a<IMG2>bc", ["a", "b"], 9),
        ("", ["a"], 0),
    ],
)
def test_markers_and_files_that_differ_in_number_have_an_offset(markup, images, offset):
    with pytest.raises(
        DocumentError, match=rf"^text, character {offset}: the text has \d <image> marker"
    ) as caught:
        parse_markup(markup, images)
    assert (caught.value.field, caught.value.offset, caught.value.kind) == ("text", offset, "markers")


@settings(max_examples=500)
@given(documents)
def test_written_markup_parses_to_an_equal_document(document):
    markup = document.to_markup()
    parsed = parse_markup(markup, document.images, document.videos)
    assert parsed == document
    # No text is a tag in disguise for the other ways to treat untagged text either.
    if parsed.tagged:
        assert parse_markup(markup, document.images, document.videos, untagged="mask") == document
    assert parsed.to_markup() == markup


@settings(max_examples=500)
@given(documents, st.randoms(use_true_random=False))
def test_damaged_markup_is_a_document_or_a_document_error_at_once(document, rng: random.Random):
    markup = document.to_markup()
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randint(0, len(markup)), rng.choice([0, 1, 1, 5, 20])
        markup = markup[:place] + rng.choice(["", *PIECES]) + markup[place + length :]

    found = error = None
    before = time.process_time()
    try:
        found = parse_markup(markup, document.images, document.videos)
    except DocumentError as caught:
        error = caught
    assert time.process_time() - before < 0.05
    if found is not None:
        assert parse_markup(found.to_markup(), found.images, found.videos) == found
    else:
        assert error.reason
        assert error.offset is None or 0 <= error.offset <= len(markup)


@pytest.mark.parametrize(
    "markup",
    [
        "\\" * 200_000 + "<image>",
        "\\<image>" * 20_000,
        "<trainable_text" + " " * 200_000,
        '<trainable_text weight="' + "1" * 200_000,
        "<trainable_text></trainable_text>" * 5_000,
        "<IMG" + "1" * 200_000 + ">",
        "<" * 200_000,
        "<trainable_te" * 20_000,
        "<" + "t r a i n a b l e " * 20_000,
        "< - _ / - _ " * 20_000,
        ("<" + " " * 50) * 5_000,
    ],
)
def test_no_markup_takes_more_than_linear_time(markup):
    message, spent = "", []
    for _ in range(3):  # a busy machine may slow down one
        before = time.process_time()
        try:
            parse_markup(markup)
        except DocumentError as error:
            message = str(error)
        spent.append(time.process_time() - before)
    assert min(spent) < 0.5
    assert len(message) < 500
