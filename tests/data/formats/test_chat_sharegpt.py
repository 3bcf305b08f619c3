"""ShareGPT rows: LLaVA's, 2U1's and LLaMA-Factory's come through with every turn and image."""

import pytest

from vlcpt import DocumentError, Image, Text, Video
from vlcpt.data.formats.chat import read_sharegpt

LLAVA = {
    "id": "000000033471",
    "image": "coco/train2017/000000033471.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat are the colors of the bus in the image?"},
        {"from": "gpt", "value": "The bus in the image is white and red."},
        {"from": "human", "value": "What feature can be seen on the back of the bus?"},
        {"from": "gpt", "value": "The back of the bus features an advertisement."},
    ],
}
# As LLaMA-Factory documents its sharegpt format, tools and system prompt included.
LLAMA_FACTORY = {
    "conversations": [
        {"from": "human", "value": "<image>What is <video> there?<image>"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {}}'},
        {"from": "observation", "value": "a cat"},
        {"from": "gpt", "value": "A cat."},
    ],
    "system": "Be brief.",
    "images": ["1.jpg", "2.jpg"],
    "videos": ["1.mp4"],
}


def trained(document):
    return "".join(piece.text for piece in document.segments if isinstance(piece, Text) and piece.trainable)


def test_a_llava_row_is_one_document_of_four_turns():
    assert read_sharegpt(LLAVA).segments == (
        Image("coco/train2017/000000033471.jpg"),
        Text("\nWhat are the colors of the bus in the image?\n"),
        Text("The bus in the image is white and red.\n", trainable=True),
        Text("What feature can be seen on the back of the bus?\n"),
        Text("The back of the bus features an advertisement.", trainable=True),
    )


def test_a_llama_factory_row_keeps_system_tools_and_the_order_of_media():
    document = read_sharegpt(LLAMA_FACTORY)

    assert document.segments == (
        Text("Be brief.\n"),
        Image("1.jpg"),
        Text("What is "),
        Video("1.mp4"),
        Text(" there?"),
        Image("2.jpg"),
        Text("\n"),
        Text('{"name": "look", "arguments": {}}\n', trainable=True),
        Text("a cat\n"),
        Text("A cat.", trainable=True),
    )


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("assistant", '{"name": "look", "arguments": {}}\nA cat.'),
        ("last", "A cat."),
        ("all", 'Be brief.\nWhat is  there?\n{"name": "look", "arguments": {}}\na cat\nA cat.'),
    ],
)
def test_targets_choose_the_turns(targets, expected):
    assert trained(read_sharegpt(LLAMA_FACTORY, targets=targets)) == expected


def test_files_without_any_marker_go_before_the_first_turn_that_is_not_the_systems():
    row = {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "user", "value": "What?"},
            {"from": "assistant", "value": "A cat."},
        ],
        "image": ["a.png", "b.png"],
        "video": "a.mp4",
    }

    assert read_sharegpt(row).segments[:5] == (
        Text("Be brief.\n"),
        Image("a.png"),
        Image("b.png"),
        Video("a.mp4"),
        Text("What?\n"),
    )


@pytest.mark.parametrize(
    ("text", "files", "message"),
    [
        ("<image>", {}, "there are 1 <image> marker but the row lists 0 images. Give each marker one file"),
        ("<image>", {"images": ["a", "b"]}, "there are 1 <image> marker but the row lists 2 images"),
        ("<video>", {"image": "a"}, "there are 0 <image> markers but the row lists 1 image."),
        ("<image>", {"image": "a", "video": "b"}, "there are 0 <video> markers but the row lists 1 video."),
    ],
)
def test_where_there_is_a_marker_markers_and_files_must_agree(text, files, message):
    with pytest.raises(DocumentError, match=f"^conversations: {message}"):
        read_sharegpt({"conversations": [{"from": "human", "value": text}], **files})


def test_markup_and_control_tokens_are_characters():
    text = r"<trainable_text>a</trainable_text> <IMG1> \<video_> <|im_end|>"
    row = {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text}]}

    assert read_sharegpt(row).segments == (Text(text + "\n"), Text(text, trainable=True))


def test_roles_and_contents_under_openais_names_are_read():
    row = {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert trained(read_sharegpt(row)) == "b"


def test_an_empty_turn_adds_nothing_and_is_counted():
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]}
    document = read_sharegpt(row)

    assert document.segments == (Text("a"),)
    assert document.empty_spans == 1


def test_nulls_as_arrow_fills_them_in_are_nothing():
    turn = {"from": "human", "value": "a", "weight": None, "loss": None}
    row = {
        **{"conversations": [turn, {**turn, "from": "gpt"}], "image": None, "images": None, "videos": []},
        **{"system": None, "audios": [], "objects": {"ref": None, "bbox": []}},
    }

    assert read_sharegpt(row).segments == (Text("a\n"), Text("a", trainable=True))


HUMAN = {"from": "human", "value": "a"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "conversations: the field is missing. Fields found: 'messages'."),
        ({"conversation": []}, "missing; did you mean 'conversations' by 'conversation'?"),
        ({"conversations": []}, "conversations: expected a list of turns, found none."),
        ({"conversations": "a"}, "conversations: expected a list of turns, found str."),
        ({"conversations": ["a"]}, "conversations[0]: expected a turn in {}, found str."),
        (
            {"conversations": [HUMAN, {"value": "a"}]},
            "conversations[1].from: expected one of assistant, gpt, ",
        ),
        ({"conversations": [{"value": "a"}]}, "found no 'from' among 'value'."),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "found 'bot'."),
        ({"conversations": [{"from": "gpt"}]}, "conversations[0].value: expected a string, found NoneType."),
        ({"conversations": [{"from": "gpt", "value": ["a"]}]}, "value: expected a string, found list."),
        ({"conversations": [HUMAN], "images": [7]}, "images[0]: a media reference must be a path"),
        ({"conversations": [HUMAN], "images": 7}, "images: expected a list of media references, found int."),
        ({"conversations": [HUMAN], "image": "a", "images": ["b"]}, "'images' and 'image' are both given."),
        ({"conversations": [HUMAN], "system": ["a"]}, "system: expected a string, found list."),
        ({"conversations": [HUMAN], "audios": ["a.wav"]}, "audios: audio is not read."),
        ({"conversations": [HUMAN], "objects": {"bbox": [[1]]}}, "objects: <ref-object> and <bbox> are not"),
        ({"conversations": [{**HUMAN, "value": "\ud83d"}]}, "conversations[0]: half of a surrogate pair"),
    ],
)
def test_what_cannot_be_mapped_is_an_error_with_field_expected_and_found(row, message):
    with pytest.raises(DocumentError) as caught:
        read_sharegpt(row)
    assert message in str(caught.value)


def test_nulls_with_which_arrow_fills_a_turn_are_absent():
    turns = [
        {"from": "human", "value": "a", "role": None, "content": None, "loss": None, "weight": None},
        {"from": "gpt", "value": "b", "role": None, "content": None, "train_detail": None},
    ]
    assert read_sharegpt({"conversations": turns}).to_markup() == "a\n<trainable_text>b</trainable_text>"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (r"write \<image> for it", "write <image> for it"),
        (r"\<video>\<image>", "<video><image>"),
        (r"\\\<image>", r"\<image>"),
        (r"C:\dir\ \n \<IMG1> \<trainable_text>", r"C:\dir\ \n \<IMG1> \<trainable_text>"),
    ],
)
def test_a_backslash_makes_a_marker_its_characters(value, said):
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": value}]
    assert read_sharegpt({"conversations": turns}).segments == (Text("Q\n"), Text(said, trainable=True))


def test_of_two_backslashes_before_a_marker_one_is_kept_and_it_takes_its_file():
    turns = [{"from": "human", "value": "a\\\\<image>" + r"b\<image>"}, {"from": "gpt", "value": "A"}]
    found = read_sharegpt({"conversations": turns, "image": "a.png"}).segments
    assert found == (Text("a\\"), Image("a.png"), Text("b<image>\n"), Text("A", trainable=True))


def test_characters_of_a_marker_do_not_keep_files_from_the_first_turn():
    turns = [{"from": "human", "value": r"What is \<image>?"}, {"from": "gpt", "value": "A"}]
    found = read_sharegpt({"conversations": turns, "image": "a.png"}).segments
    assert found[:2] == (Image("a.png"), Text("What is <image>?\n"))


def test_a_marker_without_a_file_says_how_to_write_its_characters():
    with pytest.raises(DocumentError, match=r"write \\<image> for the characters\.$"):
        read_sharegpt({"conversations": [{"from": "human", "value": "the tag <image>"}]})
