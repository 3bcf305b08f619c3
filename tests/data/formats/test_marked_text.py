"""Plain text: all of it trained, nothing of it markup."""

import pytest

from vlcpt import Text
from vlcpt.data.formats.detect import schema_reader
from vlcpt.data.formats.marked import read_text


@pytest.mark.parametrize("untagged", ["train", "mask", "error"])
def test_all_of_the_text_is_trained_and_no_tag_is_one(untagged):
    literal = "<image></trainable_text>\\<video>\n"
    read = schema_reader("text", untagged=untagged)
    assert read({"text": literal}).segments == (Text(literal, trainable=True),)


def test_an_empty_file_is_an_empty_document():
    assert read_text({"text": ""}).segments == ()
