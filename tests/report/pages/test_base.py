import json

import pytest

from tests.browser import hostile_texts
from vlcpt.report.pages.base import _environment, render_page, script_data
from vlcpt.report.screen import Sheet

PAGE = """{% extends "base.html.j2" %}{% import "parts.html.j2" as parts %}{% block content %}
{{ parts.table(sheet) }}{{ parts.cards(facts) }}{{ parts.bar(counts, title) }}{% endblock %}"""


def test_data_for_a_script_is_the_same_when_it_is_read():
    texts = hostile_texts(1)

    data = script_data(texts)

    assert "<" not in data and "\u2028" not in data
    assert json.loads(data) == texts


def test_every_hostile_text_loads_and_runs_nothing_as_a_title_or_a_cell(tmp_path, browser, listener):
    texts = hostile_texts(listener.port)
    sheet = Sheet(" ".join(texts), texts, [(text, texts) for text in texts], " ".join(texts))
    page = _environment().from_string(PAGE)
    facts = [(text, text, text) for text in texts]
    values = {"title": texts[5], "lead": " ".join(texts), "versions": {texts[0]: texts[1]}, "version": "1"}
    page = page.render(**values, sheet=sheet, facts=facts, counts=dict.fromkeys(texts, 1))
    (tmp_path / "page.html").write_text(page)

    browser.open(tmp_path / "page.html")

    assert browser.run("return [window.hacked, document.scripts.length, document.links.length]") == [
        None,
        0,
        1,
    ]
    assert browser.run("return document.title") == texts[5]
    assert listener.heard == []


@pytest.mark.parametrize("dark", [False, True])
def test_the_policy_lets_the_pages_own_style_sheet_in(tmp_path, browser, dark):
    (tmp_path / "page.html").write_text(
        render_page("base.html.j2", title="a", lead="b", versions={"torch": "2"})
    )

    browser.open(tmp_path / "page.html", dark=dark)

    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(18, 22, 27)" if dark else "rgb(251, 251, 249)")
    assert browser.messages() == []
