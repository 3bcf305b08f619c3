"""docs/troubleshooting.md: the messages of the code, and what to do about each."""

import re
import runpy
from pathlib import Path

import pytest

from vlcpt import DocumentError, parse_markup
from vlcpt.config.schema import DataConfig
from vlcpt.errors import ConfigError

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "docs/make_troubleshooting.py"))
PAGE = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
CHINESE = (ROOT / "docs/troubleshooting.zh.md").read_text("utf-8")


@pytest.fixture(scope="module")
def messages():
    return SCRIPT["messages"]()


def test_the_page_is_what_its_script_writes():
    assert SCRIPT["page"]() == PAGE, "run: python docs/make_troubleshooting.py"


def test_a_message_stands_there_as_a_person_would_search_for_it(messages):
    """Words of messages that were really raised, without their numbers and names."""
    texts = [message.text for message in messages]
    with pytest.raises(DocumentError) as markup:
        parse_markup("</trainable_text>")
    with pytest.raises(ConfigError) as config:
        DataConfig("a.jsonl", replay_share=0.2)

    for raised in (str(markup.value).partition("character 0: ")[2], str(config.value)):
        assert [text for text in texts if re.fullmatch(re.escape(text).replace("…", ".*"), raised)], raised


def test_a_message_is_parted_into_what_it_says_and_what_to_do(messages):
    found = dict(message.parts() for message in messages)

    assert found["report_to: … is not installed."] == "Run pip install …, or remove it from report_to."
    assert found["</trainable_text> closes nothing."].startswith("Put <trainable_text> before it")


def test_every_section_says_what_to_do_where_a_message_does_not():
    sections = re.findall(r"^## (.*?)\n\n(.*?)\n\n\| message", PAGE, re.M | re.S)

    assert len(sections) >= 14
    assert all(len(about.split()) > 6 for _, about in sections)


def test_no_row_is_empty():
    """Each has words to search for, and something to do."""
    rows = re.findall(r"^\| (.*?) +\| (.*?) *\|$", PAGE[PAGE.index("\n## ") :], re.M)

    assert len(rows) > 200
    assert [
        row for row in rows if any(len(re.findall("[A-Za-z]", one)) < 3 for one in row) and "---" not in row
    ] == []
    assert [one for one in re.findall(r"^- (.*)$", PAGE, re.M) if len(re.findall("[A-Za-z]", one)) < 3] == []


def test_the_chinese_page_quotes_messages_that_there_are(messages):
    texts = [message.text for message in messages]
    quoted = re.findall(r"^\| `([^`]+)` \|", CHINESE[CHINESE.index("\n## ") :], re.M)

    assert len(quoted) > 20
    assert [one for one in quoted if not any(one in text for text in texts)] == []
