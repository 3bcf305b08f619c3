"""mkdocs.yml: docs/ as a site, in English and Chinese, that asks no other machine for anything."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ENGLISH = {"api", "comparison", "configuration", "design"}  # reference, and what a script writes


def names(nav: object) -> list[str]:
    """The pages of a navigation, in its order."""
    if isinstance(nav, str):
        return [nav]
    return [name for one in (nav.values() if isinstance(nav, dict) else nav) for name in names(one)]


def titles(nav: object) -> set[str]:
    """Its titles."""
    if isinstance(nav, dict):
        return set(nav) | {title for inner in nav.values() for title in titles(inner)}
    return {title for one in nav for title in titles(one)} if isinstance(nav, list) else set()


class Loader(yaml.SafeLoader):
    """Takes the call of a Python function in mkdocs.yml for a mapping."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, tag, node: tag)
SETTINGS = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader)


def test_every_page_is_in_the_navigation_once_and_has_a_chinese_title():
    plugins = {
        name: one
        for plugin in SETTINGS["plugins"]
        if isinstance(plugin, dict)
        for name, one in plugin.items()
    }
    (chinese,) = (one for one in plugins["i18n"]["languages"] if one["locale"] == "zh")

    assert sorted(names(SETTINGS["nav"])) == sorted(
        path.name for path in DOCS.glob("*.md") if not path.name.endswith(".zh.md")
    )
    assert titles(SETTINGS["nav"]) == set(chinese["nav_translations"])


def test_every_page_is_there_in_chinese_but_those_of_reference():
    pages = {path.name.removesuffix(".md") for path in DOCS.glob("*.md")}

    assert {page for page in pages if not page.endswith(".zh") and f"{page}.zh" not in pages} == ENGLISH


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as .ci/run builds it: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))

    assert len(pages) > 40
    for page in pages:
        text = page.read_text("utf-8")
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]*\ssrc="([^"]+)"', text)
        loaded += re.findall(
            r'<link[^>]*rel="(?:stylesheet|preconnect|icon|preload)"[^>]*href="([^"]+)"', text
        )
        loaded += re.findall(
            r'<link[^>]*href="([^"]+)"[^>]*rel="(?:stylesheet|preconnect|icon|preload)"', text
        )
        assert [one for one in loaded if re.match(r"(https?:)?//", one)] == [], page


@pytest.mark.slow
def test_the_site_has_the_api_from_docstrings_with_its_examples_as_code(site):
    text = re.sub(r"<[^>]+>", "", (site / "api.html").read_text("utf-8"))

    for name in ("CPTTrainer", "CPTDataset", "parse_markup", "merge_adapter", "lora_r", "max_length"):
        assert name in text
    assert "&gt;&gt;&gt; document = parse_markup(" in text or ">>> document = parse_markup(" in text


@pytest.mark.slow
def test_a_chinese_visitor_gets_chinese_pages_and_english_ones_where_there_are_none(site):
    assert "快速上手" in (site / "zh/quickstart.html").read_text("utf-8")
    assert "Rank of the adapters." in (site / "zh/configuration.html").read_text("utf-8")
    assert "首页" in (site / "zh/configuration.html").read_text("utf-8")
