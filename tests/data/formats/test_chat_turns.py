"""Whatever a conversation holds: nothing is lost, and order stays."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.data.strategies import texts
from tests.support import opened, png
from vlcpt import DocumentError, Image, Text, Video, encode_document, parse_markup
from vlcpt.data.formats.chat import (
    ROLES,
    TARGETS,
    read_alpaca,
    read_docmatix,
    read_messages,
    read_query,
    read_sharegpt,
    turn_weight,
)
from vlcpt.data.formats.web import read_caption

turns = st.lists(st.tuples(st.sampled_from(list(ROLES)), texts | st.just("")), min_size=1, max_size=6)

SIGNS = {"<image>": "\0", "<video>": "\1"}
MARKER = re.compile(r"(\\*)(<image>|<video>)")


def as_promised(text):
    """What docs/data.md says a turn's text is: a sign for each medium, and the files in their order."""
    files = {"images": [], "videos": []}

    def one(match):
        backslashes, marker = match.groups()
        half, is_text = divmod(len(backslashes), 2)
        if is_text:
            return "\\" * half + marker
        listed = files["images" if marker == "<image>" else "videos"]
        listed.append(f"{len(listed)}.{'png' if marker == '<image>' else 'mp4'}")
        return "\\" * half + SIGNS[marker]

    return MARKER.sub(one, text), files


def as_found(document):
    return "".join(
        piece.text if isinstance(piece, Text) else SIGNS[f"<{type(piece).__name__.lower()}>"]
        for piece in document.segments
    )


@given(turns, st.sampled_from(TARGETS))
@example([("assistant", "\\<image>")], "assistant")
@example([("user", "a\\\\"), ("assistant", "<image>\\\\\\<video>\\")], "all")
def test_the_text_of_all_turns_appears_in_order_and_their_media_too(turns, targets):
    plain, files = as_promised("\n".join(text for _, text in turns if text))

    for row, read in (
        ({"conversations": [{"from": role, "value": text} for role, text in turns]}, read_sharegpt),
        ({"messages": [{"role": role, "content": text} for role, text in turns]}, read_messages),
    ):
        document = read(row | files, targets=targets)
        assert as_found(document) == plain
        assert [image.path for image in document.images] == files["images"]
        assert [video.path for video in document.videos] == files["videos"]


def rows_of_a_text(text):
    """The text in each place where a row of another format has markers, and what stands before and after."""
    turn = {"sharegpt": {"from": "human", "value": text}, "messages": {"role": "user", "content": text}}
    history = [[text, "a"]]
    return {
        "sharegpt": (read_sharegpt, {"conversations": [turn["sharegpt"]]}, "", ""),
        "messages": (read_messages, {"messages": [turn["messages"]]}, "", ""),
        "alpaca, input": (read_alpaca, {"instruction": "i", "input": text, "output": "o"}, "i\n", "\no"),
        "alpaca, instruction": (read_alpaca, {"instruction": text, "output": "o"}, "", "\no"),
        "alpaca, output": (read_alpaca, {"instruction": "i", "output": text}, "i\n", ""),
        "alpaca, history": (
            *(read_alpaca, {"history": history, "instruction": "i", "output": "o"}),
            *("", "\na\ni\no"),
        ),
        "query": (read_query, {"query": text, "response": "o"}, "", "\no"),
        "response": (read_query, {"query": "q", "response": text}, "q\n", ""),
        "docmatix": (read_docmatix, {"texts": [{"user": text, "assistant": "o"}]}, "", "\no"),
        "docmatix, answer": (read_docmatix, {"texts": [{"user": "q", "assistant": text}]}, "q\n", ""),
        "caption": (read_caption, {"caption": text}, "", ""),
    }


@pytest.mark.parametrize("backslashes", range(5))
@pytest.mark.parametrize("marker", SIGNS)
@pytest.mark.parametrize("place", rows_of_a_text("x"))
@pytest.mark.parametrize(("before", "after"), [("", ""), ("a", "b"), ("<image>", "\\"), ("\n", "<video>")])
def test_backslashes_before_a_marker_mean_the_same_in_every_format(place, marker, backslashes, before, after):
    # One marker that is a file's place, so that files of none but characters do not go to the front.
    text = before + "\\" * backslashes + marker + after + " <image><video>"
    said, files = as_promised(text)
    assert {"images", "videos"} == {name for name, listed in files.items() if listed}
    read, row, head, tail = rows_of_a_text(text)[place]

    document = read(row | files)

    assert as_found(document) == head + said + tail
    assert [one.path for one in document.images] == files["images"]
    assert [one.path for one in document.videos] == files["videos"]
    again = parse_markup(document.to_markup(), document.images, document.videos)
    assert again.segments == document.segments


@given(turns)
def test_by_default_the_models_turns_are_trained_to_the_character(turns):
    turns = [(role, text.replace("<image>", " ").replace("<video>", " ")) for role, text in turns]
    filled = [(role, text) for role, text in turns if text]
    wanted = "".join(
        text + "\n" * (number + 1 < len(filled)) for number, (role, text) in enumerate(filled) if ROLES[role]
    )
    document = read_sharegpt({"conversations": [{"from": role, "value": text} for role, text in turns]})

    assert "".join(piece.text for piece in document.segments if piece.trainable) == wanted
    assert document.empty_spans == sum(ROLES[role] and not text for role, text in turns)


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<image>What is 1 + 1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "And <|im_end|>?"},
    {"role": "assistant", "content": ""},
    {"role": "assistant", "content": "A word.", "loss_scale": 0.5},
]


def chat(processor, **options):
    """The sample, and whether each token is a target."""
    row = {"messages": CHAT, "images": [{"bytes": png(1)}]}
    sample = encode_document(read_messages(row, chat_template=True, **options), processor)
    return sample, sample.labels >= 0


def test_a_chats_tokens_are_those_of_the_models_own_template(tiny_processor):
    """But for the name of a control token in a user's text, which is never one."""
    sample, _ = chat(tiny_processor)
    pads = "<|image_pad|>" * int((sample.input_ids == tiny_processor.image_token_id).sum())
    said = [turn for turn in CHAT if turn["content"]]
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in said)
    text = text.replace("<image>", f"<|vision_start|>{pads}<|vision_end|>") + "<|endoftext|>"
    before, after = text.split("And <|im_end|>?")
    encode = tiny_processor.tokenizer.encode
    ids = sample.input_ids.tolist()

    assert pads
    assert ids[: len(encode(before))] == encode(before)
    assert ids[-len(encode(after)) :] == encode(after)
    assert len(ids) > len(encode(before)) + len(encode(after)) + 3


def test_the_markers_are_context_but_for_the_end_of_a_trained_turn(tiny_processor):
    sample, trained = chat(tiny_processor)
    start, end = tiny_processor.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ends = sample.input_ids == end

    assert not trained[sample.input_ids == start].any()
    assert sample.loss_weights[ends].tolist() == [0, 0, 1, 0, 0.5]
    assert tiny_processor.tokenizer.decode(sample.input_ids[trained]) == (
        "It is 2.<|im_end|>A word.<|im_end|><|endoftext|>"
    )
    assert chat(tiny_processor, targets="all")[0].loss_weights[ends].tolist() == [1, 1, 1, 1, 0.5]


def test_what_a_chat_cannot_hold_is_an_error():
    with pytest.raises(DocumentError, match=r"^messages\[0\]: chat_template has no form for the role 'tool'"):
        read_messages({"messages": [{"role": "tool", "content": "a"}]}, chat_template=True)
    with pytest.raises(DocumentError, match=r"edges have no markup\. Read it without chat_template"):
        read_messages({"messages": CHAT[:1]}, chat_template=True).to_markup()


@pytest.mark.parametrize("switch", [{"loss_weight": 0}, {"train": False}, {"loss_weight": 0.0, "train": 0}])
def test_what_other_tools_turn_a_turn_off_with_is_obeyed(switch):
    entry = {"role": "assistant", "content": "Since.", **switch}
    assert turn_weight(entry, "messages[1]") == 0
    assert turn_weight(entry | {"loss_weight": 0.5, "train": True}, "messages[1]") == 0.5


def detail(begin, end, train=True):
    return {"begin_offset": begin, "end_offset": end, "train": train}


HELPED = "I'm doing very well, thank you!"


@pytest.mark.parametrize(
    ("details", "marked"),
    [
        (
            [detail(0, 8, False), detail(9, 18), detail(19, 30, False)],
            "I'm doing<trainable_text> very well</trainable_text>, thank you!",
        ),
        ([detail(20, 30)], "I'm doing very well,<trainable_text> thank you!</trainable_text>"),
        ([detail(0, 2), detail(30, 99)], "<trainable_text>I'm</trainable_text>"
         " doing very well, thank you<trainable_text>!</trainable_text>"),
        ([detail(0, 4), detail(2, 8, False)], "<trainable_text>I'm d</trainable_text>"
         "oing very well, thank you!"),
        ([detail(40, 50)], HELPED),
        ([], HELPED),
    ],
)  # fmt: skip
@pytest.mark.parametrize("format", ["sharegpt", "messages"])
def test_of_a_turn_with_train_detail_exactly_those_characters_are_trained(format, details, marked):
    turn = {"train_detail": details, "loss_weight": None}
    if format == "sharegpt":
        row = {
            "conversations": [{"from": "human", "value": "Well?"}, {"from": "gpt", "value": HELPED} | turn]
        }
    else:
        asked = {"role": "user", "content": "Well?"}
        row = {"messages": [asked, {"role": "assistant", "content": HELPED} | turn]}
    read = {"sharegpt": read_sharegpt, "messages": read_messages}[format]
    for targets in ("assistant", "last"):
        document = read(row, targets=targets)
        assert document.to_markup().removeprefix("<trainable_text></trainable_text>") == (f"Well?\n{marked}")


def test_train_detail_keeps_markers_and_weights_and_yields_to_train():
    said = {"role": "assistant", "content": "a<image>b", "loss_weight": 0.5, "train_detail": [detail(8, 8)]}
    row = {"messages": [said, {"role": "user", "content": "c"}], "images": ["a.png"]}
    assert read_messages(row).segments == (
        *(Text("a"), Image("a.png"), Text("b\n", True, 0.5)),
        Text("c"),
    )
    off = {"messages": [said | {"loss_weight": None, "train": False}], "images": ["a.png"]}
    assert not any(one.trainable for one in read_messages(off).segments if isinstance(one, Text))


@pytest.mark.parametrize(
    ("said", "details", "segments"),
    [
        ("a<image>b", [detail(3, 8)], (Text("a"), Image("a.png"), Text("b", True))),
        ("a\\\\<image>b", [detail(0, 1)], (Text("a\\", True), Image("a.png"), Text("b"))),
        ("\\<image>b<image>", [detail(0, 0)], (Text("<image>b"), Image("a.png"))),
        ("\\<image>b<image>", [detail(1, 7)], (Text("<image>", True), Text("b"), Image("a.png"))),
        ("\\<image>b<image>", [detail(5, 8)], (Text("<ima"), Text("ge>b", True), Image("a.png"))),
    ],
)
def test_where_training_starts_or_ends_does_not_change_what_a_marker_is(said, details, segments):
    turn = {"from": "gpt", "value": said, "train_detail": details}
    assert read_sharegpt({"conversations": [turn], "images": ["a.png"]}).segments == segments


@pytest.mark.parametrize(
    "wrong", [detail(-1, 3), detail(3, 2), detail(0, 3, None), detail("0", 3), {"begin_offset": 0}, "0-3"]
)
def test_a_train_detail_that_is_no_span_is_an_error(wrong):
    turn = {"from": "gpt", "value": "Since.", "train_detail": [detail(0, 1), wrong]}
    with pytest.raises(DocumentError, match=r"^conversations\[0\]\.train_detail\[1\]: expected \{"):
        read_sharegpt({"conversations": [turn]})


def test_train_detail_of_parts_and_pairs_is_an_error():
    part = {"role": "assistant", "content": [{"type": "text", "text": "a"}], "train_detail": [detail(0, 0)]}
    with pytest.raises(DocumentError, match=r"^messages\[0\]\.train_detail: it counts the characters"):
        read_messages({"messages": [part]})
    pair = {"user": "a", "assistant": "b", "train_detail": [detail(0, 0)]}
    with pytest.raises(DocumentError, match=r"^texts\[0\]\.train_detail: spans of characters"):
        read_docmatix({"texts": [pair]})


# Settings of a row

SETTINGS = {"min_pixels": 784, "max_pixels": 50176, "fps": 2, "enable_thinking": False, "max_frames": None}
SAID = "<image>a<image><video>"
MEDIA = {"images": ["a.png", {"path": "b.png", "max_pixels": 3136}], "videos": ["c.mp4"]}
ROWS = {
    "sharegpt": (read_sharegpt, {"conversations": [{"from": "human", "value": SAID}]}),
    "messages": (read_messages, {"messages": [{"role": "user", "content": SAID}]}),
    "alpaca": (read_alpaca, {"instruction": SAID, "output": "b"}),
    "query": (read_query, {"query": SAID, "response": "b"}),
    "docmatix": (read_docmatix, {"texts": [{"user": SAID, "assistant": "b"}]}),
}


@pytest.mark.parametrize("format", ROWS)
def test_chat_template_kwargs_size_the_media_that_say_nothing_themselves(format):
    _, row = ROWS[format]

    document = opened([row | MEDIA | {"chat_template_kwargs": SETTINGS}], format=format).document(0)

    assert document.images == (
        Image("a.png", min_pixels=784, max_pixels=50176),
        Image("b.png", min_pixels=784, max_pixels=3136),
    )
    assert document.videos == (Video("c.mp4", min_pixels=784, max_pixels=50176),)
    assert document.not_read == ("chat_template_kwargs.fps", "chat_template_kwargs.enable_thinking")


def test_media_of_content_parts_are_sized_as_well():
    part = {"type": "image", "image": "a.png"}
    row = {"messages": [{"role": "user", "content": [part]}], "chat_template_kwargs": {"max_pixels": 50176}}
    assert read_messages(row).images == (Image("a.png", max_pixels=50176),)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("x", "expected a {}, found str"),
        ({"max_pixels": "many"}, "'max_pixels' of a media reference must be a number above 0; found 'many'"),
        ({"min_pixels": 9999}, "'min_pixels' 9999 of a media reference is above its 'max_pixels' 3136"),
    ],
)
def test_settings_that_mean_nothing_are_an_error(settings, message):
    read, row = ROWS["query"]
    with pytest.raises(DocumentError) as caught:
        read(row | MEDIA | {"chat_template_kwargs": settings})
    assert caught.value.field == "chat_template_kwargs"
    assert message in caught.value.reason


@pytest.mark.parametrize("format", ROWS)
def test_nulls_with_which_arrow_fills_a_row_are_absent(format):
    read, row = ROWS[format]
    filled = (
        row
        | MEDIA
        | dict.fromkeys(("system", "history", "objects", "audios", "chat_template_kwargs", "label"))
    )
    assert read(filled) == read(row | MEDIA)
