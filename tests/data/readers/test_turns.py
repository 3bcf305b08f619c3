"""Whatever a conversation holds: nothing is lost, and order stays."""

from hypothesis import given
from hypothesis import strategies as st

from tests.data.strategies import texts
from vlcpt import Text
from vlcpt.data.readers.messages import read_row as read_messages
from vlcpt.data.readers.sharegpt import read_row as read_sharegpt
from vlcpt.data.readers.turns import ROLES, TARGETS

turns = st.lists(st.tuples(st.sampled_from(list(ROLES)), texts | st.just("")), min_size=1, max_size=6)


@given(turns, st.sampled_from(TARGETS))
def test_the_text_of_all_turns_appears_in_order_and_their_media_too(turns, targets):
    images = [f"{n}.png" for n in range(sum(text.count("<image>") for _, text in turns))]
    videos = [f"{n}.mp4" for n in range(sum(text.count("<video>") for _, text in turns))]
    media = {"images": images, "videos": videos}
    spoken = "\n".join(text for _, text in turns if text)
    plain = spoken.replace("<image>", "\0").replace("<video>", "\1")

    for row, read in (
        ({"conversations": [{"from": role, "value": text} for role, text in turns]}, read_sharegpt),
        ({"messages": [{"role": role, "content": text} for role, text in turns]}, read_messages),
    ):
        document = read(row | media, targets=targets)
        signs = {"Image": "\0", "Video": "\1"}
        found = [p.text if isinstance(p, Text) else signs[type(p).__name__] for p in document.segments]
        assert "".join(found) == plain
        assert [image.path for image in document.images] == images
        assert [video.path for video in document.videos] == videos


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
