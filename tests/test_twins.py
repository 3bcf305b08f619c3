"""A Chinese page says all that its English twin says: what of this can be counted is counted.

Headings, code, tables, numbers, names in code, and where links lead. Only words differ.
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```$", re.M | re.S)
NUMBER = re.compile(r"(\d{1,3}(?:,\d{3})+(?!\d)|\d+(?:\.\d+)?)\s*(million|billion|万|亿)?")
UNITS = {"": 1, "million": 10**6, "billion": 10**9, "万": 10**4, "亿": 10**8}
# Messages are English, so the Chinese page has the most frequent ones only, and says so;
# tests/test_troubleshooting.py holds it.
ABRIDGED = {"docs/troubleshooting.md"}


@dataclass(frozen=True)
class Page:
    """A page, taken apart."""

    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text("utf-8")

    @cached_property
    def prose(self) -> str:
        """Without blocks of code."""
        return FENCE.sub("", self.text)

    @property
    def headings(self) -> list[tuple[int, set[str]]]:
        """The level of each, and the anchors that lead to it: its words, and what <a id> before it says."""
        found = []
        for given, level, words in re.findall(
            r'(?:^<a id="([\w-]+)"></a>\n\n)?^(#+) (.*)$', self.prose, re.M
        ):
            slug = re.sub(r"[^\w -]", "", words).lower().replace(" ", "-")
            found.append((len(level), {slug, given} - {""}))
        return found

    @property
    def code(self) -> list[tuple[str, object]]:
        """What each block does: without comments, and without the words of rows."""
        return [(language, meaning(language, body)) for _, language, body in FENCE.findall(self.text)]

    @property
    def tables(self) -> list[list[int]]:
        """The cells of each row."""
        tables: list[list[int]] = [[]]
        for line in self.prose.splitlines():
            if line.lstrip().startswith("|"):
                tables[-1].append(len(re.sub(r"`[^`]*`|\\\|", "", line).strip().strip("|").split("|")))
            elif tables[-1]:
                tables.append([])
        return [table for table in tables if table]

    @property
    def numbers(self) -> Counter[float]:
        """As figures, whatever the unit: 25 million is 2500 万."""
        words = re.sub(r"\]\([^)]*\)|<a id=[^>]*>", "", self.prose)
        return Counter(
            round(float(figure.replace(",", "")) * UNITS[unit], 6) for figure, unit in NUMBER.findall(words)
        )

    @property
    def names(self) -> set[str]:
        return set(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", self.prose))

    @property
    def links(self) -> list[str]:
        return re.findall(r"\]\(([^)\s]+)\)", self.prose)

    def places(self) -> Iterator[tuple[str, int]]:
        """Where its links lead: a page, in whatever language, and the number of its heading."""
        for link in self.links:
            name, _, anchor = link.partition("#")
            if ":" in link:
                yield link, 0
                continue
            target = (self.path.parent / name).resolve() if name else self.path
            name = english_of(target.name)
            yield name, heading_of(Page(target), anchor) if anchor and target.suffix == ".md" else 0


def meaning(language: str, body: str) -> object:
    if language == "yaml":
        return yaml.safe_load(body)
    if language == "json":
        return [shape(json.loads(line)) for line in body.splitlines()]
    if language == "python":
        return ast.dump(ast.parse(body))
    if language == "text":
        return body
    return [re.split(r"\s+# |^# ", line)[0].split() for line in body.splitlines()]


def shape(value: object) -> object:
    """A row without its words, which may be Chinese."""
    if isinstance(value, dict):
        return {key: shape(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shape(one) for one in value]
    if isinstance(value, str):
        return re.findall(r"<[^<>]*>|\w+\.(?:png|jpg|mp4)", value)
    return value


def heading_of(page: Page, anchor: str) -> int:
    """The number of the heading to which an anchor leads; it fails if there is none."""
    (number,) = (number for number, (_, anchors) in enumerate(page.headings) if anchor in anchors)
    return number


def english_of(name: str) -> str:
    return name.replace(".zh.md", ".md").replace("README_zh.md", "README.md")


CHINESE = [ROOT / "README_zh.md", *sorted((ROOT / "docs").glob("*.zh.md"))]
TWINS = {
    str(path.relative_to(ROOT)): (Page(path.with_name(english_of(path.name))), Page(path)) for path in CHINESE
}
WHOLE = [pair for pair in TWINS.items() if english_of(pair[0]) not in ABRIDGED]
whole = pytest.mark.parametrize(
    ("english", "chinese"), [pair for _, pair in WHOLE], ids=[n for n, _ in WHOLE]
)


def test_what_is_compared_is_found_in_a_page(tmp_path):
    """Or all that follows would hold of anything."""
    path = tmp_path / "page.zh.md"
    path.write_text(
        '# 页\n\n<a id="part"></a>\n\n## 段\n\n`name` 有 2500 万行，1,024 列，[见](#part)。\n\n'
        "| a | `b|c` |\n|---|---|\n| d | e |\n\n"
        "```yaml\n# 注释\nkey: 7  # 注释\n```\n\n"
        '```json\n{"text": "<image>阀门", "images": ["a.png"]}\n```\n\n'
        "```bash\nvlcpt check a.yaml   # 注释\n```\n",
        encoding="utf-8",
    )
    page = Page(path)

    assert page.headings == [(1, {"页"}), (2, {"段", "part"})]
    assert [meant for _, meant in page.code] == [
        {"key": 7},
        [{"text": ["<image>"], "images": [["a.png"]]}],
        [["vlcpt", "check", "a.yaml"]],
    ]
    assert page.tables == [[2, 2, 2]]
    assert page.numbers == Counter({25_000_000.0: 1, 1024.0: 1})
    assert page.names == {"name", "b|c"}
    assert list(page.places()) == [("page.md", 1)]


@whole
def test_twins_have_the_same_headings(english, chinese):
    assert [level for level, _ in chinese.headings] == [level for level, _ in english.headings] != []


@whole
def test_twins_have_the_same_code(english, chinese):
    assert chinese.code == english.code


@whole
def test_twins_have_tables_of_the_same_rows_and_columns(english, chinese):
    assert chinese.tables == english.tables


@whole
def test_each_number_of_an_english_page_is_in_the_chinese_one(english, chinese):
    assert english.numbers - chinese.numbers == Counter()


@whole
def test_twins_have_the_same_names_in_code(english, chinese):
    assert chinese.names == english.names


@whole
def test_the_links_of_an_english_page_lead_to_the_same_places_from_the_chinese_one(english, chinese):
    assert Counter(chinese.places()) == Counter(english.places())


@pytest.mark.parametrize(("english", "chinese"), TWINS.values(), ids=TWINS)
def test_a_chinese_page_links_to_chinese_pages_where_there_are_some(english, chinese):
    there = {english_of(name) for name in TWINS}

    names = (link.partition("#")[0] for link in chinese.links if ":" not in link)
    others = [name for name in names if name != english.path.name]
    assert [name for name in others if name in there or f"docs/{name}" in there] == []


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_a_link_into_an_english_page_leads_into_its_twin_too(path):
    """On the Chinese site a page without a twin is the English one, and its links lead to Chinese pages."""
    twins = {english.path.name: chinese for english, chinese in TWINS.values()}
    for link in Page(path).links:
        name, _, anchor = link.partition("#")
        if anchor and name in twins:
            heading_of(twins[name], anchor)


@pytest.mark.parametrize("page", [page for _, page in TWINS.values()], ids=TWINS)
def test_a_line_of_chinese_is_broken_only_where_a_space_may_stand(page):
    """A browser shows the end of a line as a space."""
    wide = "\u2014\u2018-\u201d\u2026\u3000-\u303f\u4e00-\u9fff\uff00-\uffef"

    assert re.findall(rf"^(?![|#]).*[{wide}]\n *[{wide}].*", page.prose, re.M) == []
