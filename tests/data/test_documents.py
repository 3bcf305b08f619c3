"""Documents: one form for equal content, weights in range, errors that name their place."""

import pickle

import numpy as np
import pytest

from vlcpt import Document, DocumentError, Image, Source, Text, Video


def test_a_source_is_written_as_file_and_line():
    assert str(Source("data/train.jsonl", 17)) == "data/train.jsonl:17"


@pytest.mark.parametrize(
    ("error", "written"),
    [
        (DocumentError("bad"), "bad"),
        (DocumentError("bad", field="text"), "text: bad"),
        (DocumentError("bad", field="text", offset=0), "text, character 0: bad"),
        (DocumentError("bad", source=Source("a.jsonl", 3)), "a.jsonl:3: bad"),
        (
            DocumentError("bad", source=Source("a.jsonl", 3), field="images[2]"),
            "a.jsonl:3: images[2]: bad",
        ),
    ],
)
def test_an_error_says_file_line_field_and_offset_as_far_as_known(error, written):
    assert str(error) == written
    assert isinstance(error, ValueError)


def test_an_error_survives_a_workers_pickle():
    error = DocumentError("bad", kind="markup", source=Source("a.jsonl", 3), field="text", offset=7)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.reason, copy.kind, copy.source, copy.field, copy.offset) == (
        "bad",
        "markup",
        Source("a.jsonl", 3),
        "text",
        7,
    )
    assert str(copy) == str(error)


def test_a_place_is_filled_in_only_where_none_is_known():
    inner = DocumentError("bad", kind="reference", field="images[0]", offset=1)
    outer = inner.at(Source("a.jsonl", 3), "images")
    assert str(outer) == "a.jsonl:3: images[0], character 1: bad"
    assert outer.kind == "reference"
    assert outer.at(Source("b.jsonl", 9)).source == Source("a.jsonl", 3)


@pytest.mark.parametrize("weight", [0, -1.0, 100.5, float("nan"), float("inf")])
def test_a_weight_out_of_range_is_refused(weight):
    with pytest.raises(
        DocumentError, match=r"the weight \S+ is out of range\. Use a number above 0, up to 100"
    ):
        Text("a", trainable=True, weight=weight)


def test_weights_at_the_ends_of_the_range_are_taken():
    assert Text("a", trainable=True, weight=100).weight == 100
    assert Text("a", trainable=True, weight=5e-324).weight > 0


def test_context_has_no_weight_of_its_own():
    assert Text("a", weight=7.0) == Text("a", weight=-3.0) == Text("a")


def test_a_numpy_weight_is_written_as_a_number():
    document = Document((Text("a", trainable=True, weight=np.float64(0.25)),))
    assert document.to_markup() == '<trainable_text weight="0.25">a</trainable_text>'


def test_half_of_a_surrogate_pair_is_refused():
    with pytest.raises(DocumentError, match=r"half of a surrogate pair \('\\ud83d'\) is not a character"):
        Text("a\ud83d")


def test_equal_neighbours_merge_and_empty_texts_vanish():
    document = Document(
        (
            Text("a"),
            Text("", trainable=True),
            Text("b"),
            Text("c", trainable=True),
            Text("d", trainable=True),
            Text("e", trainable=True, weight=0.5),
            Image("x.png"),
            Text(""),
            Image("x.png"),
            Text("f"),
        )
    )
    assert document.segments == (
        Text("ab"),
        Text("cd", trainable=True),
        Text("e", trainable=True, weight=0.5),
        Image("x.png"),
        Image("x.png"),
        Text("f"),
    )


def test_documents_are_equal_when_their_segments_are():
    one = Document((Text("a"),), id="1", source=Source("a", 1), media_root="/data", tagged=False)
    assert one == Document((Text("a"),), id="2")
    assert one != Document((Text("a", trainable=True),))


def test_images_and_videos_come_in_reading_order():
    document = Document((Image("2.png"), Text("a"), Video("1.mp4"), Image("1.png")))
    assert [image.path for image in document.images] == ["2.png", "1.png"]
    assert [video.path for video in document.videos] == ["1.mp4"]


def test_a_document_is_called_by_its_id_then_by_its_source():
    assert Document((), id="page 4", source=Source("a.jsonl", 2)).name == "page 4"
    assert Document((), source=Source("a.jsonl", 2)).name == "a.jsonl:2"
    assert Document(()).name == "document"


def test_bytes_are_not_shown():
    assert str(Image(data=b"x" * 1000)) == "image given as bytes"
    assert "xxx" not in repr(Video(data=b"x" * 1000))


@pytest.mark.parametrize(
    ("segments", "markup"),
    [
        ((Text("a", trainable=True),), "<trainable_text>a</trainable_text>"),
        ((Text("a", trainable=True, weight=0.5),), '<trainable_text weight="0.5">a</trainable_text>'),
        # Without a tag, `untagged: train` would train it.
        ((Text("a"),), "<trainable_text></trainable_text>a"),
        ((Image("a.png"), Video("a.mp4")), "<image><video>"),
        ((Text("\\<image>", trainable=True),), r"<trainable_text>\\\<image></trainable_text>"),
        ((Text("a\\"), Image("a.png")), "<trainable_text></trainable_text>a\\\\<image>"),
        ((Image("a.png"), Text("a\\")), "<trainable_text></trainable_text><image>a\\"),
    ],
)
def test_markup_is_written_with_as_few_backslashes_as_it_needs(segments, markup):
    assert Document(segments).to_markup() == markup
