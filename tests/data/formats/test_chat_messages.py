"""Messages rows: OpenAI's, ms-swift's, LLaMA-Factory's and TRL's come through with every turn and image."""

import pytest

from tests.support import opened
from vlcpt import DocumentError, Image, Text, Video
from vlcpt.data.formats.chat import read_messages

# The shape of LLaMA-Factory's data/mllm_demo.json.
MLLM_DEMO = {
    "messages": [
        {"content": "<image>Who are they?", "role": "user"},
        {"content": "They're Kane and Gretzka from Bayern Munich.", "role": "assistant"},
        {"content": "What are they doing?<image>", "role": "user"},
        {"content": "They are celebrating on the soccer field.", "role": "assistant"},
    ],
    "images": ["mllm_demo_data/1.jpg", "mllm_demo_data/1.jpg"],
}
SWIFT = {
    "messages": [
        {"role": "system", "content": "You are helpful."},
        {"role": "user", "content": "<image><image>What differs? <video>"},
        {"role": "assistant", "content": "Draft.", "loss": False},
        {"role": "user", "content": "Again."},
        {"role": "assistant", "content": "The first shows a kitten.", "loss_scale": 0.5},
        {"role": "tool_response", "content": "ok"},
        {"role": "assistant", "content": "Done.", "loss": True},
    ],
    "images": [{"bytes": b"x", "path": None}, "/xxx/y.png"],
    "videos": ["/xxx/z.mp4"],
    "channel": "a",
}
OPENAI = {
    "messages": [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What's in <image>?"},
                {
                    "type": "image_url",
                    "image_url": {"url": "data:image/png;base64,iVBORw==", "detail": "low"},
                },
                {"type": "video", "video": "a.mp4", "fps": 1, "max_pixels": 784},
            ],
        },
        {"role": "assistant", "content": "No.", "weight": 0},
        {"role": "assistant", "content": [{"type": "text", "text": "A "}, {"type": "text", "text": "cat."}]},
    ]
}


def user(content):
    return {"messages": [{"role": "user", "content": content}]}


def test_llama_factorys_demo_rows_keep_both_images_and_all_turns():
    assert read_messages(MLLM_DEMO).segments == (
        Image("mllm_demo_data/1.jpg"),
        Text("Who are they?\n"),
        Text("They're Kane and Gretzka from Bayern Munich.\n", trainable=True),
        Text("What are they doing?"),
        Image("mllm_demo_data/1.jpg"),
        Text("\n"),
        Text("They are celebrating on the soccer field.", trainable=True),
    )


def test_ms_swift_rows_train_as_loss_and_loss_scale_say():
    assert read_messages(SWIFT).segments == (
        Text("You are helpful.\n"),
        Image(data=b"x"),
        Image("/xxx/y.png"),
        Text("What differs? "),
        Video("/xxx/z.mp4"),
        Text("\nDraft.\nAgain.\n"),
        Text("The first shows a kitten.\n", trainable=True, weight=0.5),
        Text("ok\n"),
        Text("Done.", trainable=True),
    )


def test_a_turn_that_says_itself_whether_it_trains_wins_over_targets():
    trained = [
        piece.text for piece in read_messages(SWIFT, targets="all").segments if getattr(piece, "trainable", 0)
    ]
    assert "Draft." not in "".join(trained)
    assert "You are helpful.\n" in trained


def test_openais_parts_are_read_in_order_and_their_text_is_plain():
    assert read_messages(OPENAI).segments == (
        Text("Be brief.\nWhat's in <image>?"),
        Image(data=b"\x89PNG"),
        Video("a.mp4", fps=1.0, max_pixels=784),
        Text("\nNo.\n"),
        Text("A cat.", trainable=True),
    )


def test_a_part_without_a_reference_takes_the_rows_next_file_as_trl_writes_it():
    """In the form that Arrow gives it: every part has every key."""
    content = [
        {"type": "image", "text": None, "image": None},
        {"type": "text", "text": "What?", "image": None},
        {"type": "image", "text": None, "image": {"bytes": b"y", "path": None}},
        {"type": "image", "text": None, "image": None},
    ]
    row = {**user(content), "images": [{"bytes": b"a", "path": None}, {"bytes": b"b", "path": None}]}

    assert [image.data for image in read_messages(row).images] == [b"a", b"y", b"b"]


@pytest.mark.parametrize("key", ["image", "path", "url"])
def test_a_part_may_name_its_file_under_any_of_the_usual_keys(key):
    assert read_messages(user([{"type": "image", key: "a.png"}])).segments == (Image("a.png"),)


def test_a_url_is_kept_and_refused_when_it_is_opened():
    part = {"type": "image_url", "image_url": "https://example.org/a.png"}
    assert read_messages(user([part])).images[0].path == "https://example.org/a.png"


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ({"role": "user"}, "messages[0].content: expected a string or a list of parts, found NoneType."),
        ({"role": "user", "content": 5}, "found int."),
        ({"role": "narrator", "content": "a"}, "messages[0].role: expected one of assistant, gpt, "),
        ({"role": "user", "content": ["a", 5]}, "messages[0].content[1]: expected a part in {}, found int."),
        (
            {"role": "user", "content": [{"type": "audio"}]},
            "content[0].type: expected one of text, image, image_url, video, video_url; found 'audio'.",
        ),
        (
            {"role": "user", "content": [{"type": "text"}]},
            "content[0].text: expected a string, found NoneType.",
        ),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            "expected a reference under 'image_url', found",
        ),
        (
            {"role": "user", "content": [{"type": "image", "image": "a", "nframe": 4}]},
            "messages[0].content[0].nframe: a part of type 'image' has no such key. Known: bytes",
        ),
        (
            {"role": "user", "content": [{"type": "image", "image": 5, "max_pixels": 784}]},
            "messages[0].content[0].image: a media reference must be a path",
        ),
        ({"role": "user", "content": [{"type": "image"}]}, "there are 1 <image> marker but the row lists 0"),
        ({"role": "user", "content": "<image>"}, "messages: there are 1 <image> marker but the row lists 0"),
        (
            {"role": "assistant", "content": None, "tool_calls": [{}]},
            "messages[0].tool_calls: this part of a",
        ),
        ({"role": "assistant", "content": "a", "loss": "no"}, "loss: expected true or false, found 'no'."),
        (
            {"role": "assistant", "content": "a", "loss_scale": -1},
            "expected a number from 0 to 100, found -1.",
        ),
        (
            {"role": "assistant", "content": "a", "loss_scale": 1e9},
            "messages[0].loss_scale: expected a number",
        ),
        (
            {"role": "assistant", "content": "a", "weight": "1"},
            "messages[0].weight: expected a number from 0",
        ),
        (
            {"role": "assistant", "content": "a", "loss": False, "loss_scale": 1},
            "messages[0]: loss False and loss_scale 1 contradict each other. Keep one.",
        ),
    ],
)
def test_what_cannot_be_mapped_is_an_error_with_field_expected_and_found(message, wanted):
    with pytest.raises(DocumentError) as caught:
        read_messages({"messages": [message]})
    assert wanted in str(caught.value)


def test_images_without_a_marker_are_an_error():
    with pytest.raises(DocumentError, match="there are 0 <image> markers but the row lists 1 image"):
        read_messages({**user("What?"), "images": ["a.png"]})


def parted(*parts, **row):
    text = {"type": "text", "text": "What?", "index": None}
    return {
        "messages": [{"role": "user", "content": [*parts, text]}, {"role": "assistant", "content": "So."}],
        **row,
    }


def test_index_chooses_the_picture_of_a_part():
    row = parted({"type": "image", "index": 1}, {"type": "image", "index": 0}, images=["a.png", "b.png"])
    assert [image.path for image in read_messages(row).images] == ["b.png", "a.png"]
    for wrong in (2, 1, "0", True):
        row["messages"][0]["content"][1]["index"] = wrong
        with pytest.raises(
            DocumentError, match=r"expected the place of an image in 'images', 0 to 1, each once"
        ):
            read_messages(row)


@pytest.mark.parametrize(
    "key",
    ["detail", "cache_control", "nframes", "resized_height", "resized_width", "video_start", "video_end"],
)
def test_keys_of_a_part_that_are_not_used_are_named(key):
    document = opened([parted({"type": "image", "image": "a.png", key: 8}, source="web")]).document(0)
    assert [image.path for image in document.images] == ["a.png"]
    assert document.not_read == (f"messages[].content[].{key}", "source")


def test_a_backslash_makes_a_marker_its_characters():
    """In a string; in a text part nothing is a marker, so a backslash there is one."""
    parts = [{"type": "text", "text": r"\<image>"}]
    messages = [
        {"role": "user", "content": r"Why \<video>?"},
        {"role": "assistant", "content": parts},
    ]
    found = read_messages({"messages": messages}).segments
    assert found == (Text("Why <video>?\n"), Text(r"\<image>", trainable=True))


def test_sizes_of_parts_that_take_a_file_of_the_row_are_used():
    parts = [
        {"type": "text", "text": ""},
        {"type": "image", "index": 1, "max_pixels": 50176},
        {"type": "text", "text": "a"},
        {"type": "image", "index": 0, "min_pixels": 784},
        {"type": "video", "fps": 1, "max_frames": 4},
    ]
    turns = [{"role": "user", "content": parts}, {"role": "user", "content": "<image>"}]
    images = ["a.png", {"path": "b.png", "max_pixels": 3136}, "c.png"]
    document = read_messages({"messages": turns, "images": images, "videos": ["a.mp4"]})
    assert [*document.images, *document.videos] == [
        *(Image("b.png", max_pixels=3136), Image("a.png", min_pixels=784), Image("c.png")),
        Video("a.mp4", fps=1.0, max_frames=4),
    ]
    wrong = [{"role": "user", "content": [{"type": "image", "max_pixels": -1}]}]
    with pytest.raises(DocumentError, match="must be a number above 0") as caught:
        read_messages({"messages": wrong, "images": ["a.png"]})
    assert caught.value.field == "messages[0].content[0]"


@pytest.mark.parametrize("image", [{"type": "image", "image": "a.png"}, {"type": "image"}])
def test_keys_of_videos_in_a_part_that_is_an_image_are_named_as_not_read(image):
    part = image | {"fps": 2, "max_frames": None}
    row = {"messages": [{"role": "user", "content": [part]}], "images": ["a.png"][: "image" not in image]}
    (document,) = (opened([row]).document(0),)
    assert document.images == (Image("a.png"),)
    assert document.not_read == ("messages[].content[].fps",)


def test_the_index_of_a_video_chooses_among_the_videos():
    parts = [{"type": "video", "index": 1}, {"type": "image", "index": 0}, {"type": "video", "index": 0}]
    row = {
        "messages": [{"role": "user", "content": parts}],
        "images": ["a.png"],
        "videos": ["a.mp4", "b.mp4"],
    }
    assert read_messages(row).segments == (Video("b.mp4"), Image("a.png"), Video("a.mp4"))
    with pytest.raises(DocumentError, match=r"place of a video in 'videos', 0 to 0, each once; found 1"):
        read_messages(row | {"videos": ["a.mp4"]})


def test_markers_in_strings_take_the_files_that_no_index_names():
    part = {"type": "image", "index": 0}
    turns = ["<image>a", [part, {"type": "text", "text": "b"}], "<image>c"]
    messages = [{"role": "user", "content": content} for content in turns]
    document = read_messages({"messages": messages, "images": ["a.png", "b.png", "c.png"]})
    assert [image.path for image in document.images] == ["b.png", "a.png", "c.png"]
    with pytest.raises(DocumentError, match="there are 3 <image> markers but the row lists 2 images"):
        read_messages({"messages": messages, "images": ["a.png", "b.png"]})
