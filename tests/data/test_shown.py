from tests.browser import hostile_texts
from tests.support import png
from vlcpt import CPTDataset, Document, Image, Text


def dataset(documents, processor, **values):
    return CPTDataset(documents, processor, max_length=64, **values)


def test_an_item_is_shown_with_its_targets_marked(tiny_processor):
    rows = [
        {"id": "a", "text": 'one <trainable_text weight="2">two</trainable_text> three'},
        {"id": "b", "text": "four"},
    ]
    shown = str(dataset(rows, tiny_processor).show(0))

    assert shown.startswith("item 0 of 1: ")
    assert "\none« two»×2" in shown and "three" not in shown  # trimmed
    assert "a  " in shown and "b  " in shown


def test_a_notebook_gets_pictures(tiny_processor):
    document = Document((Image("a.png", data=png(1)), Text("seen", trainable=True)))
    shown = dataset([document], tiny_processor).show(0)

    assert "[image a.png: 4 tokens]«seen" in str(shown)
    assert 'src="data:image/png;base64,' in shown._repr_html_()
    assert "data:image" not in dataset([document], tiny_processor).show(0, pictures=False)._repr_html_()


def test_a_picture_that_cannot_be_decoded_is_said(tiny_processor):
    document = Document((Image("a.png", data=png(1)[:300]), Text("seen", trainable=True)))

    assert "a.png cannot be decoded" in str(dataset([document], tiny_processor).show(0))


def test_a_later_part_is_shown_alone(tiny_processor):
    found = dataset([{"id": "a", "text": "1234567890" * 10}], tiny_processor)
    texts = [str(found.show(number)) for number in range(len(found))]

    assert len(texts) == 2
    assert sum(", a later part" in text for text in texts) == 1
    digits = [sum(one.isdigit() for one in text.split("\n\n")[1].split("\n")[1]) for text in texts]
    assert sum(digits) in (99, 100, 101)  # the first is no target, the one before a part is repeated


def test_hostile_texts_are_escaped_in_a_notebook(tmp_path, tiny_processor, browser, listener):
    texts = hostile_texts(listener.port)
    documents = [Document((Text(text), Text(text, trainable=True)), id=text) for text in texts]
    found = CPTDataset(documents, tiny_processor, max_length=4096)
    (tmp_path / "page.html").write_text(found.show(0)._repr_html_() + found._repr_html_())
    browser.open(tmp_path / "page.html")

    assert browser.run("return window.hacked === undefined")
    assert browser.each("script, img, iframe, svg, link, base, a", "one.outerHTML") == []
    assert listener.heard == []


def test_the_repr_of_a_data_set_and_of_its_ledger_say_what_is_used(tiny_processor):
    found = dataset(
        [{"text": "four"}, {"text": "<trainable_text>"}],
        tiny_processor,
        on_bad_data="skip",
        max_bad_fraction=1,
    )

    assert repr(found.ledger).startswith("<Ledger of rows: 1 of 2 documents used, ")
    assert repr(found).startswith("<CPTDataset: 1 packs of 64 tokens, ")
    assert "<td" in found._repr_html_() and "documents read" in found.ledger._repr_html_()
