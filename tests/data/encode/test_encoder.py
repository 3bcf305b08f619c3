"""Documents to samples: targets are the spans' text, end-of-text, control tokens, the first token."""

import pickle
import re
import time
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.strategies import texts
from tests.support import avi, png
from vlcpt import Document, DocumentError, Image, Source, Text, Video, encode_document, parse_markup
from vlcpt.data.encode.encoder import DocumentEncoder
from vlcpt.data.encode.vision import EncodingOptions

EOS = "<|endoftext|>"
AVI = avi(0)
shared = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def solid(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", text).split())


def runs_of_spans(document: Document) -> list[str]:
    """The trained text, each stretch of neighbouring spans by itself: composing ends with it."""
    found = [""]
    for segment in document.segments:
        if isinstance(segment, Text) and segment.trainable:
            found[-1] += segment.text
        else:
            found.append("")
    return found


drawn = st.lists(
    st.builds(Text, texts, st.booleans(), st.sampled_from([1.0, 0.5]))
    | st.just(Image(data=png(0, 28, 28)))
    | st.just(Video(data=AVI, max_pixels=784)),
    max_size=7,
)


def check_targets(document: Document, processor) -> None:
    """The claims of the contract about one document that begins with context."""
    sample = encode_document(document, processor)
    tokenizer = processor.tokenizer
    ids, labels = sample.input_ids, sample.labels
    control = torch.tensor(sorted(tokenizer.get_added_vocab().values()))

    is_target = labels != -100
    assert torch.equal(labels[is_target], ids[is_target])
    assert torch.equal(is_target, sample.loss_weights > 0)
    targets = ids[is_target].tolist()
    if labels[-1] != -100:
        assert targets.pop() == tokenizer.convert_tokens_to_ids(EOS)
    spans = "".join(map(solid, runs_of_spans(document)))
    # Composed once more: a mark that opens a span may now stand behind another span's letter.
    assert solid(solid(tokenizer.decode(targets))) == solid(spans)
    # Control tokens stand where the media stand, and at the end.
    is_control = torch.isin(ids, control)
    wanted = torch.zeros_like(is_control)
    wanted[-1] = True
    pads = torch.isin(ids, torch.tensor([processor.image_token_id, processor.video_token_id]))
    wanted |= pads
    wanted[:-1] |= pads[1:]  # a start token before each, an end token after
    wanted[1:] |= pads[:-1]
    assert torch.equal(is_control, wanted)
    assert not (is_control[:-1] & is_target[:-1]).any()
    grids = [grid for grid in (sample.image_grid_thw, sample.video_grid_thw) if grid is not None]
    assert int(pads.sum()) == sum(int(grid.prod(dim=1).sum()) // 4 for grid in grids)


@settings(shared, max_examples=150)
@given(drawn)
def test_targets_are_the_spans_text_with_the_tiny_vocabulary(tiny_processor, found):
    check_targets(Document((Text("A."), *found)), tiny_processor)


@settings(shared, max_examples=150)
@given(drawn)
def test_targets_are_the_spans_text_with_the_real_vocabulary(real_processor, found):
    check_targets(Document((Text("A."), *found)), real_processor)


@settings(shared, max_examples=100)
@given(drawn)
def test_markup_and_segments_give_the_same_sample(tiny_processor, found):
    document = Document(tuple(found))
    parsed = parse_markup(document.to_markup(), document.images, document.videos)
    one, two = encode_document(document, tiny_processor), encode_document(parsed, tiny_processor)
    assert torch.equal(one.input_ids, two.input_ids)
    assert torch.equal(one.labels, two.labels)
    assert torch.equal(one.loss_weights, two.loss_weights)
    assert torch.equal(one.position_ids, two.position_ids)


# ---- the first token


@settings(shared, max_examples=60)
@given(drawn, st.sampled_from(["auto", "always", "never"]))
def test_the_first_label_is_never_a_target_and_its_loss_is_counted(tiny_processor, found, train_eos):
    document = Document(tuple(found))
    stream = DocumentEncoder(tiny_processor, EncodingOptions(train_eos=train_eos)).tokens(document)
    assert stream.labels[0] == -100
    assert stream.loss_weights[0] == 0
    first = document.segments[0] if document.segments else None
    if isinstance(first, Text) and first.trainable:
        assert stream.without_context == 1
    elif first is not None and not isinstance(first, Text):
        assert stream.without_context == 0


def test_a_span_at_the_start_loses_one_token(tiny_processor):
    sample = encode_document(parse_markup("<trainable_text>hello</trainable_text>"), tiny_processor)
    tokens = tiny_processor.tokenizer.convert_ids_to_tokens(sample.input_ids)
    assert tokens == ["he", "ll", "o", EOS]
    assert sample.labels.tolist() == [-100, *sample.input_ids[1:].tolist()]


def test_a_span_after_an_image_is_trained_from_its_first_token(tiny_processor):
    document = parse_markup("<image><trainable_text>hello</trainable_text>", [{"bytes": png(0, 28, 28)}])
    sample = encode_document(document, tiny_processor)
    tokens = tiny_processor.tokenizer.convert_ids_to_tokens(sample.input_ids)
    assert tokens == ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "he", "ll", "o", EOS]
    assert (sample.labels != -100).tolist() == [False] * 3 + [True] * 4


def test_pixels_inside_a_span_are_context(tiny_processor):
    markup = '<trainable_text weight="0.5">a<image>b<video>c</trainable_text>'
    document = parse_markup(markup, [{"bytes": png(0)}], [{"bytes": AVI}])
    sample = encode_document(document, tiny_processor)
    tokens = tiny_processor.tokenizer.convert_ids_to_tokens(sample.input_ids)
    trained = [token for token, label in zip(tokens, sample.labels, strict=True) if label != -100]
    assert trained == ["b", "c", EOS]
    assert tokens.count("<|image_pad|>") == 4
    assert tokens.count("<|video_pad|>") == 8
    assert set(sample.loss_weights.tolist()) == {0.0, 0.5}


# ---- end-of-text


@pytest.mark.parametrize(
    ("markup", "auto", "always"),
    [
        ("a<trainable_text>b</trainable_text>", 1.0, 1.0),
        ('a<trainable_text weight="0.5">b</trainable_text>', 0.5, 0.5),
        ("<trainable_text>b</trainable_text>a", 0.0, 1.0),
        # The last text that is not white space decides.
        ('<trainable_text weight="0.25">b</trainable_text> \n', 0.25, 0.25),
        ("a<trainable_text> \n</trainable_text>", 0.0, 1.0),
        ('<trainable_text weight="2">b</trainable_text><image>', 2.0, 2.0),
        ('<trainable_text weight="2">b</trainable_text><image> ', 2.0, 2.0),
        ("<image>", 0.0, 1.0),
        ("<trainable_text>  </trainable_text><image>", 0.0, 1.0),
        ('<trainable_text weight="3">a</trainable_text><trainable_text>b</trainable_text>\u3000', 1.0, 1.0),
    ],
)
def test_end_of_text_is_trained_as_the_last_text_is(tiny_processor, markup, auto, always):
    images = [{"bytes": png(0, 28, 28)}] * markup.count("<image>")
    document = parse_markup(markup, images)
    for train_eos, weight in (("auto", auto), ("always", always), ("never", 0.0)):
        sample = encode_document(document, tiny_processor, train_eos=train_eos)
        assert sample.input_ids[-1] == tiny_processor.tokenizer.convert_tokens_to_ids(EOS)
        assert sample.loss_weights[-1] == weight
        assert (sample.labels[-1] != -100) == (weight > 0)


def test_the_end_token_is_not_the_tokenizers_eos_token(real_processor):
    assert real_processor.tokenizer.eos_token == "<|im_end|>"  # or the next line proves nothing
    assert encode_document(parse_markup("a"), real_processor).input_ids[-1] == 151_643


def test_an_empty_document_is_end_of_text_alone(tiny_processor):
    for train_eos, lost in (("auto", 0), ("always", 1), ("never", 0)):
        stream = DocumentEncoder(tiny_processor, EncodingOptions(train_eos=train_eos)).tokens(Document(()))
        assert len(stream) == 1
        assert stream.labels.tolist() == [-100]
        assert stream.without_context == lost


# ---- shapes, weights, options


def test_a_sample_has_the_shapes_it_promises(tiny_processor):
    document = parse_markup("a<image>b<video>c", [{"bytes": png(0)}], [{"bytes": AVI}])
    sample = encode_document(document, tiny_processor)
    length = len(sample)
    assert length == 1 + 6 + 1 + 10 + 1 + 1
    assert sample.input_ids.shape == sample.labels.shape == sample.loss_weights.shape == (length,)
    assert sample.position_ids.shape == (3, length)
    assert sample.input_ids.dtype == sample.labels.dtype == sample.position_ids.dtype == torch.int64
    assert sample.loss_weights.dtype == torch.float32
    assert sample.pixel_values.shape == (16, 1176)
    assert sample.image_grid_thw.tolist() == [[1, 4, 4]]
    assert sample.pixel_values_videos.shape == (32, 1176)
    assert sample.video_grid_thw.tolist() == [[2, 4, 4]]


def test_text_alone_has_no_pixels(tiny_processor):
    sample = encode_document(parse_markup("a"), tiny_processor)
    assert sample.pixel_values is sample.image_grid_thw is None
    assert sample.pixel_values_videos is sample.video_grid_thw is None


@pytest.mark.parametrize("weight", ["100", "1e-7", "1e-44", "1e-300"])
def test_every_weight_is_a_target_in_float32(tiny_processor, weight):
    document = parse_markup(f'a<trainable_text weight="{weight}">b</trainable_text>')
    sample = encode_document(document, tiny_processor)
    assert (sample.labels != -100).tolist() == [False, True, True]
    assert (sample.loss_weights[1:] > 0).all()
    assert sample.loss_weights[1] == pytest.approx(float(weight), abs=1.2e-38)


def test_options_of_one_call_do_not_leak_into_the_next(tiny_processor):
    document = Document((Image(data=png(0, 200, 200)), Text("a", trainable=True)))
    small = encode_document(document, tiny_processor, max_pixels=784, train_eos="never")
    large = encode_document(document, tiny_processor)
    again = encode_document(document, tiny_processor, max_pixels=784, train_eos="never")
    assert int(small.image_grid_thw.prod()) == 4 < int(large.image_grid_thw.prod())
    assert torch.equal(small.input_ids, again.input_ids)
    assert small.labels[-1] == -100 != large.labels[-1]


def test_sampling_options_reach_the_video(tiny_processor):
    document = Document((Video(data=AVI),))
    assert encode_document(document, tiny_processor).video_grid_thw.tolist() == [[2, 4, 4]]
    assert encode_document(document, tiny_processor, fps=8.0).video_grid_thw.tolist() == [[8, 4, 4]]
    found = encode_document(document, tiny_processor, fps=8.0, max_frames=6)
    assert found.video_grid_thw.tolist() == [[3, 4, 4]]


def test_cut_edges_are_counted_over_the_document(tiny_processor):
    marked = "hel<trainable_text>lo</trainable_text> <trainable_text>wo</trainable_text>rld"
    stream = DocumentEncoder(tiny_processor).tokens(parse_markup(marked))
    tokens = tiny_processor.tokenizer.convert_ids_to_tokens(stream.input_ids)
    # he|ll|o is cut in ll; " wo" stays whole and its word goes on with other tokens.
    assert tokens == ["he", "l", "l", "o", "Ġwo", "r", "ld", EOS]
    assert (stream.labels >= 0).tolist() == [False, False, True, True, True, False, False, False]
    assert stream.cut_edges == 1


# ---- where media lie


def test_an_image_outside_the_media_root_is_refused(tiny_processor, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.png").write_bytes(png(0))
    (tmp_path / "in" / "a.png").write_bytes(png(1))
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "secret.png")
    root = str(tmp_path / "in")
    assert encode_document(Document((Image("a.png"),)), tiny_processor, media_root=root).pixel_values.any()
    for path in ("../secret.png", str(tmp_path / "secret.png"), "link.png"):
        document = Document((Image(path),), source=Source("a.jsonl", 1), media_root=root)
        with pytest.raises(
            DocumentError, match=f"a.jsonl:1: images: {re.escape(repr(path))} lies outside the"
        ):
            encode_document(document, tiny_processor)


def test_without_a_media_root_the_caller_is_trusted(tiny_processor, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(0))
    assert encode_document(Document((Image(str(path)),)), tiny_processor).image_grid_thw.tolist() == [
        [1, 4, 4]
    ]


def test_a_url_is_never_fetched(tiny_processor):
    with pytest.raises(
        DocumentError, match=r"'https://example\.org/a\.png' is a URL, and nothing is fetched"
    ):
        encode_document(Document((Image("https://example.org/a.png"),)), tiny_processor)


def test_a_processor_without_the_models_tokens_is_refused(tiny_processor):
    class Other:
        tokenizer = type(tiny_processor.tokenizer)(
            tokenizer_object=tiny_processor.tokenizer._tokenizer.__class__.from_str(
                tiny_processor.tokenizer.backend_tokenizer.to_str().replace(
                    "<|vision_start|>", "<|view_start|>"
                )
            )
        )
        image_processor = tiny_processor.image_processor
        video_processor = tiny_processor.video_processor

    with pytest.raises(
        ValueError, match=r"the tokenizer has no <\|vision_start\|>. vlcpt needs a Qwen2.5-VL"
    ):
        DocumentEncoder(Other())


# ---- parts


def test_a_part_has_its_own_tokens_pixels_and_positions(tiny_processor):
    document = parse_markup("ab<image>c<image>d", [{"bytes": png(n, 28, 28)} for n in (1, 2)])
    encoder = DocumentEncoder(tiny_processor)
    stream = encoder.tokens(document)
    whole = encoder.sample(document, stream)
    start = stream.media[1].start - 1
    part = encoder.sample(document, stream, start, len(stream) - 1, repeated=True)

    assert torch.equal(part.input_ids, whole.input_ids[start:-1])
    assert whole.labels[start] != -100  # "c", trained in the part before
    assert part.labels[0] == -100
    assert part.loss_weights[0] == 0
    assert torch.equal(part.labels[1:], whole.labels[start + 1 : -1])
    assert torch.equal(part.pixel_values, whole.pixel_values[4:])
    assert part.image_grid_thw.tolist() == [[1, 2, 2]]
    assert part.position_ids[0].tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(whole.input_ids.numpy(), stream.input_ids)  # the stream is not written to


def test_a_long_document_of_two_thousand_spans_encodes_in_seconds(real_processor):
    """200 KB whose edges cut words."""
    markup = "".join(
        f"The quick brown fox {n} jum<trainable_text>ps over the la</trainable_text>zy dog, and says hello. "
        for n in range(2_000)
    )
    document = parse_markup(markup)
    before = time.process_time()
    stream = DocumentEncoder(real_processor).tokens(document)
    assert time.process_time() - before < 8  # 3 of these to load the vocabulary
    assert stream.cut_edges >= 2_000
    decoded = real_processor.tokenizer.decode(stream.input_ids[stream.labels >= 0])
    assert solid(decoded) == "psoverthela" * 2_000


def test_an_error_about_a_document_without_a_source_names_its_id(tiny_processor):
    document = Document((Image("none.png"), Text("a", trainable=True)), id="pump-7")
    with pytest.raises(DocumentError, match=r"^id pump-7: images: 'none\.png' does not exist in ") as caught:
        encode_document(document, tiny_processor)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
