import itertools
import re
import time
from pathlib import Path

import numpy as np
import pytest
from markupsafe import Markup

from tests.browser import hostile_texts, page_lines
from tests.support import avi, digits, png
from vlcpt import Document, DocumentError, Image, Source, Text, Video, parse_markup
from vlcpt.data.encode.encoder import DocumentEncoder
from vlcpt.data.encode.pieces import token_texts
from vlcpt.data.encode.vision import EncodingOptions
from vlcpt.data.media.open import MediaLimits
from vlcpt.data.plan.split import split_stream
from vlcpt.data.planned_items import PlannedSample
from vlcpt.report.pages.inspect import BLOCK_SIZE, MOST_TOKENS, InspectPage


class Pages:
    """Makes pages of documents, by the demo's processor."""

    def __init__(self, processor):
        self.encoder = DocumentEncoder(processor, EncodingOptions())
        self.texts = token_texts(processor.tokenizer)

    def page(self, documents=(), *, max_length=512, nats=None, sources=("new",), **limits):
        page = InspectPage([(name, "train_data") for name in sources], self.texts, MediaLimits(), **limits)
        for row, document in enumerate(documents):
            stream = self.encoder.tokens(document)
            parts = split_stream(stream, max_length)
            page.add(0, row, document, stream, parts, nats=nats(stream) if nats else None)
        return page


@pytest.fixture(scope="module")
def pages(tiny_processor):
    return Pages(tiny_processor)


def write(path: Path, page: InspectPage, title="Which tokens train", lead="all") -> Path:
    file = path / "page.html"
    file.write_text(page.render(title, lead, {"torch": "2"}), encoding="utf-8")
    return file


def lines_of(page: InspectPage):
    return page_lines(page.render("", "", {}), "documents")


SHOW_ALL = """
for (let at = 0; at < document.querySelectorAll('.doc').length; at++) {
  location.hash = `d${at}`;
  await new Promise(done => setTimeout(done, 30));
}
document.getElementById('tab-packs').click();
await new Promise(done => setTimeout(done, 300));
"""
# Goes to a document, and waits until its picture is there.
GO = """
location.hash = given[0];
const until = performance.now() + 5000;
while (!document.querySelector(`${given[0]} .medium img`)?.naturalWidth && performance.now() < until)
  await new Promise(done => setTimeout(done, 20));
"""
SEARCH = """
const search = document.getElementById('search');
const found = document.getElementById('found'), before = found.textContent;
search.value = given[0];
search.dispatchEvent(new Event('input'));
const until = performance.now() + 20000;
while (found.textContent === before && performance.now() < until)
  await new Promise(done => setTimeout(done, 20));
for (const _ of [1, 2, 3]) await new Promise(done => requestAnimationFrame(done));
search.blur();
"""
OVERFLOW = "return document.documentElement.scrollWidth - innerWidth"


def test_hostile_rows_run_nothing_and_load_nothing(tmp_path, browser, listener, pages):
    texts = hostile_texts(listener.port)
    documents = [
        Document((Text(f"{text} "), Text(text, trainable=True)), id=text, source=Source(text, 1, text))
        for text in texts
    ]
    seen = Document((Image(texts[0], data=png(1)), Text("a", trainable=True)))
    page = pages.page([*documents, seen], sources=texts)
    page.add_failure(0, 99, texts[0], DocumentError(" ".join(texts)), stops=True)
    page.add_pack([PlannedSample(0, 50, text, 0, 5, 3, 0) for text in texts], 512)
    page.note_packs(said=" ".join(texts))
    page.notes += texts
    file = write(tmp_path, page, title=texts[0], lead=" ".join(texts))

    browser.messages()
    browser.open(file)
    browser.run(SHOW_ALL)

    assert browser.run("return window.hacked === undefined")
    assert len(browser.each(".doc .text", "1")) == len(texts) + 1
    assert browser.each("#documents h3", "one.lastChild.data")[:3] == texts[:3]
    assert len(browser.each("#packs li", "1")) == len(texts)
    assert set(browser.each("img", "one.src.split(';')[0]")) == {"data:image/png"}
    assert browser.run(
        "return performance.getEntriesByType('resource').map(one => one.name.slice(0, 5))"
    ) in (
        [],
        ["data:"],
        ["data:"] * 2,
    )
    assert listener.heard == []
    assert browser.messages() == []


def test_the_policy_stops_a_script_that_came_in_all_the_same(tmp_path, browser, listener, pages):
    """Were a text ever not escaped: neither a script, nor a handler, nor a picture of another place."""
    file = write(tmp_path, pages.page([parse_markup("one")]))
    there = f"http://127.0.0.1:{listener.port}/"
    added = (
        f"<script>window.hacked = 1</script><script src={there}a.js></script><img src={there}a.png>"
        f"<img src=x onerror='window.hacked = 2'><style>body {{ background: url({there}b.png) }}</style>"
        f"<iframe src={there}c></iframe><link rel=stylesheet href={there}d.css>"
    )
    file.write_text(file.read_text().replace("<main", f"{added}<main"))

    browser.open(file)
    time.sleep(0.3)

    assert browser.run("return window.hacked === undefined")
    assert browser.run("return document.documentElement.dataset.ready") == "true"
    assert listener.heard == []
    assert any("Content Security Policy" in one for one in browser.messages())


def test_characters_that_turn_the_direction_of_reading_are_shown_by_number_and_copied(
    tmp_path, browser, pages
):
    document = parse_markup("a\u202eb <trainable_text>c\nd 阀</trainable_text> end")
    browser.open(write(tmp_path, pages.page([document])))

    assert browser.each(".text", "one.textContent")[0].startswith("aU+202Eb")
    copied = browser.run(
        "getSelection().selectAllChildren(document.querySelector('.text'));"
        "const values = { clipboardData: new DataTransfer(), bubbles: true, cancelable: true };"
        "const event = new ClipboardEvent('copy', values);"
        "document.dispatchEvent(event); return event.clipboardData.getData('text/plain');"
    )
    assert copied == "a\u202eb c\nd 阀 end<|endoftext|>"


def test_targets_are_marked_by_weight_with_and_without_colour(tmp_path, browser, pages):
    text = (
        'no <trainable_text weight="0.5">half</trainable_text> and <trainable_text>one</trainable_text> left'
    )
    stream = pages.encoder.tokens(parse_markup(text))
    trimmed = len(stream) - split_stream(stream, 64)[-1].stop
    browser.open(write(tmp_path, pages.page([parse_markup(text)])))

    assert trimmed > 1
    assert browser.each(".text > .t", "[one.className, one.textContent]") == [
        ["t low", " half"],
        ["t one", " one"],
    ]
    assert browser.each(".text > .t", "getComputedStyle(one).textDecorationStyle") == ["dotted", "solid"]
    assert browser.each(".text .d", "one.textContent")[0] == " left"
    assert browser.each(".text .trim", "one.textContent") == [f"┊ {trimmed} tokens trimmed"]


def test_parts_and_edges_inside_a_token_are_marked(pages):
    document = parse_markup(f"<trainable_text>{digits(90)}</trainable_text>")
    (split,) = lines_of(pages.page([document], max_length=64))
    (cut,) = lines_of(pages.page([parse_markup("Open t<trainable_text>he pump</trainable_text>.")]))

    assert split["parts"] == 2
    assert [piece[1] for piece in split["pieces"] if piece[0] == "p"] == [1, 2]
    assert [piece[0] for piece in cut["pieces"]][:3] == ["x", "e", "t"]
    assert cut["pieces"][0][1].endswith(" t") and cut["pieces"][2][1] == "he pump"


def test_media_have_small_pictures_and_their_cost(tmp_path, browser, pages):
    clip = avi(1, width=112, height=84)
    media = (Image("a.png", data=png(3, 600, 400)), Video("b.avi", data=clip))
    document = Document((*media, Text("seen", trainable=True)))
    page = pages.page([document], max_length=2048)
    (line,) = lines_of(page)
    browser.open(write(tmp_path, page))

    image, video = line["media"]
    assert image["tokens"] == pages.encoder.tokens(document).media[0].tokens
    assert image["size"] == "600×400" and len(image["pictures"]) == 1
    assert video["frames"] == "4 of 16 frames" and len(video["pictures"]) == 4
    captions = browser.each(".medium figcaption b", "one.textContent")
    assert captions[:2] == ["image 1", f"{image['tokens']} tokens"]
    assert browser.each(".medium img", "one.naturalWidth") == [224, 112, 112, 112, 112]


def test_nats_of_targets_colour_them_until_they_are_switched_off(tmp_path, browser, pages):
    document = parse_markup("a <trainable_text>red</trainable_text>")
    page = pages.page(
        [document], nats=lambda stream: np.where(stream.labels >= 0, np.arange(len(stream)), np.nan)
    )
    (line,) = lines_of(page)
    assert sum(line["nats"]) == np.flatnonzero(pages.encoder.tokens(document).labels >= 0).sum()

    browser.open(write(tmp_path, page))
    assert "w n3" in browser.each(".text .t .w", "one.className")
    assert "nats from its image" in browser.each(".text .t .w", "one.title")[0]
    assert browser.each("body", "one.className") == ["by-nats"]
    browser.press("r")
    assert browser.each("body", "one.className") == [""]


def test_search_finds_over_token_edges_and_keys_move(tmp_path, browser, pages):
    documents = [Document((Text(f"word{n} and 阀门{n}", trainable=True),), id=f"row {n}") for n in range(30)]
    browser.open(write(tmp_path, pages.page(documents)))

    browser.press("j", "j", "n", "k")
    assert browser.run("return document.activeElement.id") == "d1"
    browser.press("/")
    assert browser.run("return document.activeElement.id") == "search"
    browser.run(SEARCH, "阀门17")
    assert browser.each(".doc", "one.id") == ["d17"]
    assert browser.each("#found", "one.textContent") == ["1 of 30 documents"]
    assert browser.run("return CSS.highlights.get('found').size") == 1
    browser.press("?")
    assert browser.each("#help", "one.open") == [True]


MANY = 2 * BLOCK_SIZE + 20


@pytest.fixture(scope="module")
def many(pages):
    """A page of three blocks, with pictures of different widths, and none in each third document."""

    def media(number):
        return () if number % 3 == 2 else (Image(data=png(number, 28 + number, 28)),)

    return pages.page(
        [
            Document((*media(number), Text(f"word{number} ", trainable=True)), id=f"row {number}")
            for number in range(MANY)
        ]
    )


def pixels(number):
    """As wide as the picture of this document is on the page."""
    return min(28 + number, 224)


def test_each_document_has_its_own_picture_whichever_way_it_is_reached(tmp_path, browser, many):
    file = write(tmp_path, many)
    browser.open(file)
    assert len(browser.each(".doc", "1")) == MANY
    assert browser.each("#d0 .medium img, #d1 .medium img", "one.naturalWidth") == [pixels(0), pixels(1)]
    assert len(browser.each(".doc img", "1")) < 40

    last = MANY - 1  # the first and the last of each block
    for number in (last, BLOCK_SIZE, BLOCK_SIZE - 1, 2 * BLOCK_SIZE - 2, 2 * BLOCK_SIZE + 1):
        browser.run(GO, f"#d{number}")
        assert browser.each(f"#d{number} img", "one.naturalWidth") == [pixels(number)] * 2
        assert browser.run("return document.activeElement.id") == f"d{number}"
        assert browser.each(f"#d{number}", "0 <= one.getBoundingClientRect().top") == [True]
        assert browser.each(f"#d{number}", "one.getBoundingClientRect().top < innerHeight") == [True]

    browser.driver.get("about:blank")
    browser.driver.get(f"{file.resolve().as_uri()}#d{last}")
    browser.run(GO, f"#d{last}")
    assert browser.run("return document.activeElement.id") == f"d{last}"

    browser.open(file)
    browser.run("scrollTo(0, document.documentElement.scrollHeight)")
    browser.run(GO.replace("location.hash = given[0];", ""), f"#d{last}")
    assert browser.each(f"#d{last} img", "one.naturalWidth") == [pixels(last)] * 2


def test_search_filters_and_keys_go_over_documents_that_nobody_has_come_near(tmp_path, browser, many):
    browser.open(write(tmp_path, many))
    last = MANY - 1
    browser.run(SEARCH, f"word{last}")
    assert browser.each(".doc", "one.id") == [f"d{last}"]
    assert browser.each(f"#d{last} .medium img", "one.naturalWidth") == [pixels(last)]
    browser.run(SEARCH, "")
    assert browser.each(".doc", "one.id") == [f"d{number}" for number in range(MANY)]

    browser.run(
        "const filter = document.getElementById('filter'); filter.value = '2';"
        "filter.dispatchEvent(new Event('change'));"
    )
    seen = [number for number in range(MANY) if number % 3 != 2]
    assert browser.each(".doc", "one.id") == [f"d{number}" for number in seen]
    assert browser.each("#found", "one.textContent") == [f"{len(seen)} of {MANY} documents"]

    # A link to one that is left out shows all again.
    browser.run(
        "location.hash = given[0]; await new Promise(done => setTimeout(done, 200))", f"#d{BLOCK_SIZE + 1}"
    )
    assert (BLOCK_SIZE + 1) % 3 == 2
    assert len(browser.each(".doc", "1")) == MANY
    browser.press("k", "k")
    assert browser.run("return document.activeElement.id") == f"d{BLOCK_SIZE - 1}"
    browser.run(
        "document.getElementById(given[0]).scrollIntoView(); dispatchEvent(new WheelEvent('wheel'));"
        "await new Promise(done => setTimeout(done, 100))",
        f"d{2 * BLOCK_SIZE - 1}",
    )
    for at in (2 * BLOCK_SIZE - 1, 2 * BLOCK_SIZE):  # the first one below the bar, and the next
        browser.press("j")
        assert browser.run("return document.activeElement.id") == f"d{at}"


def test_where_a_block_ends_nothing_is_seen(tmp_path, browser, many):
    browser.open(write(tmp_path, many))
    browser.run(GO, f"#d{BLOCK_SIZE}")
    places = browser.each(
        ".doc", "[one.id, one.getBoundingClientRect().top, one.getBoundingClientRect().bottom]"
    )
    here = [place for place in places if BLOCK_SIZE - 3 <= int(place[0][1:]) <= BLOCK_SIZE + 2]
    gaps = [round(after[1] - before[2], 2) for before, after in itertools.pairwise(here)]
    assert gaps == [16] * 5


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_window(tmp_path, browser, pages, width, dark):
    text = Text("液压" * 90 + "x" * 300, trainable=True)
    page = pages.page([Document((Image("a" * 200 + ".png", data=png(1)), text), id="n" * 200)])
    page.add_pack(
        [PlannedSample(0, 0, "a.jsonl:1", 0, 50, 40, 4), PlannedSample(0, 1, "b" * 99, 0, 5, 4, 0)], 64
    )
    page.note_packs(said="one pack")
    browser.open(write(tmp_path, page), width=width, dark=dark)

    assert browser.run(OVERFLOW) <= 0
    assert browser.run(f"document.getElementById('tab-packs').click(); {OVERFLOW}") <= 0


def test_what_a_page_has_no_room_for_is_said(pages):
    documents = [Document((Image("a.png", data=png(seed)), Text("one", trainable=True))) for seed in (1, 2)]
    page = pages.page([*documents, parse_markup("last")], picture_bytes=10, text_bytes=300)
    first, second, third = lines_of(page)
    text = page.render("", "", {})

    assert "pictures" in first["media"][0] and "pictures" not in second["media"][0]
    assert first["pieces"] and third["left_out"] and not third["pieces"]
    assert "1 images and videos are shown without a picture" in text
    assert "documents are listed without their text" in text


def test_sums_by_source_are_of_documents_without_their_text_too(pages):
    def nats(stream):
        return np.where(stream.labels >= 0, 0.5, np.nan)

    documents = [parse_markup(text) for text in ("one", "two", "three")]
    shown, cut = (pages.page(documents, nats=nats, **limits) for limits in ({}, {"text_bytes": 1}))

    assert [("nats" in line) for line in lines_of(cut)] == [True, False, False]
    texts = [page.render("", "", {}) for page in (shown, cut)]
    sums = [
        re.search(r"Which targets need their image</summary>.*?</details>", text, re.S)[0] for text in texts
    ]
    assert sums[0] == sums[1]
    assert "nats from images" in sums[0]


def test_a_very_long_document_is_shown_in_part(pages):
    (line,) = lines_of(pages.page([parse_markup(digits(MOST_TOKENS + 100))], max_length=10**6))

    assert line["more"] == 101  # with the end of text
    assert len(line["pieces"][-1][1]) <= MOST_TOKENS


def test_equal_pictures_are_in_the_page_once(pages):
    page = pages.page([Document((Image(data=png(1)), Text("a", trainable=True))) for _ in range(3)])

    assert [line["media"][0]["pictures"] for line in lines_of(page)] == [[0]] * 3
    (picture,) = page_lines(page.render("", "", {}), "pictures")
    assert picture.startswith("data:image/png;base64")


@pytest.mark.slow
@pytest.mark.alone
def test_ten_thousand_documents_each_with_a_picture_open_in_three_seconds(tmp_path, browser, pages):
    """20 documents as often as that: to encode so many is another matter. Each has its picture to itself."""
    words = "the pump opens and closes 液压 阀门 " * 20
    page = pages.page(
        [
            Document((Image(data=png(seed, 20, 20)), Text(f"{words} {seed} "), Text(words, trainable=True)))
            for seed in range(20)
        ],
        max_length=2048,
    )
    assert len(page._pictures) == 20
    page._pictures *= 500
    page._lines = [
        Markup(re.sub(r'"pictures":\s*\[\d+\]', f'"pictures":[{number}]', str(page._lines[number % 20])))
        for number in range(10_000)
    ]
    page._index = [[f"doc-{number}", *page._index[0][1:]] for number in range(10_000)]
    file = write(tmp_path, page)
    assert file.stat().st_size > 35_000_000
    assert f'"pictures":[{9_999}]' in page._lines[-1]

    def seconds():
        used, start = browser.processor_seconds, time.monotonic()
        browser.open(file)
        browser.run("for (const _ of [1, 2]) await new Promise(done => requestAnimationFrame(done))")
        # Where others hold the cores, what its own processes took of them, side by side, is as much at least.
        return min(time.monotonic() - start, browser.processor_seconds - used)

    assert min(seconds() for _ in range(3)) < 3
    assert len(browser.each(".doc", "1")) == 10_000
    assert browser.run("return document.querySelector('.doc .text').textContent.length") > 500
    browser.run(GO, "#d9999")
    assert browser.each("#d9999 .medium img", "one.naturalWidth") == [20]
    # Those that nobody has come near are not there yet.
    assert 1 <= len(browser.each(".doc img", "1")) < 100
    browser.run(SEARCH, " 17 ")
    assert browser.each(".doc", "one.id") == [f"d{number}" for number in range(17, 10_000, 20)]
