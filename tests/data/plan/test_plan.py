"""One planned pass: the ledger balances whatever the rows, and bad rows stop or are counted."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.strategies import texts
from tests.support import digits, png, row
from vlcpt import CPTDataset, Document, DocumentError, Image, Text
from vlcpt.data.plan.ledger import BadDataError

shared = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
KINDS = ("targets", "context", "media", "special", "trimmed", "not_drawn")


def balance(ledger) -> None:
    """The equations of the contract, for each source and in total."""
    found = ledger.as_json()
    for source in (*found["sources"].values(), found["total"]):
        documents, tokens = source["documents"], source["tokens"]
        assert documents["read"] == documents["used"] + documents["not_drawn"] + sum(
            documents["dropped"].values()
        )
        assert tokens["read"] == sum(tokens[kind] for kind in KINDS) + sum(tokens["dropped"].values())
    for part in ("documents", "tokens"):
        for key, value in found["total"][part].items():
            if key != "dropped":
                assert value == sum(source[part][key] for source in found["sources"].values())


def trained(text: str) -> dict[str, object]:
    return {"text": f"<trainable_text>{text}</trainable_text>"}


rows = st.lists(
    st.lists(
        st.builds(Text, texts, st.booleans(), st.sampled_from([1.0, 0.5]))
        | st.sampled_from([Image(data=png(0, 28, 28)), Image(data=png(0, 140, 84)), Image(data=b"broken")]),
        max_size=5,
    ).map(lambda found: Document(tuple(found)))
    | st.sampled_from(
        [
            {"text": "<trainable_text>not closed"},
            {"text": 7},
            {"txt": "no text"},
            {"text": "no tag"},
            {"text": "<trainable_text></trainable_text>empty"},
            {"text": f"<trainable_text>{'long ' * 30}</trainable_text>"},
        ]
    ),
    max_size=8,
)


@settings(shared, max_examples=120)
@given(
    rows,
    rows,
    st.sampled_from([4, 20, 60]),
    st.sampled_from(["split", "drop"]),
    st.sampled_from(["train", "mask"]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([None, 0.5]),
    st.booleans(),
)
def test_the_ledger_balances_and_counts_what_items_hold(
    tiny_processor, first, second, max_length, on_overlong, untagged, replay_share, share, packing
):
    good = trained("one two three four")
    sources = [
        {"path": [good, *first], "name": "first"},
        {"path": [good, *second], "name": "second", "share": share},
    ]
    replay = {"path": [*second, *first, good, good], "name": "replay"}
    try:
        dataset = CPTDataset(
            sources,
            tiny_processor,
            max_length=max_length,
            packing=packing,
            replay_data=replay,
            replay_share=replay_share,
            untagged=untagged,
            on_overlong=on_overlong,
            on_bad_data="skip",
            max_bad_fraction=1.0,
        )
    except (BadDataError, ValueError):
        assert max_length == 4  # nothing short enough is left
        assert on_overlong == "drop"
        return

    balance(dataset.ledger)
    total = dataset.ledger.as_json()["total"]
    samples = [sample for number in range(len(dataset)) for sample in dataset[number]]
    assert dataset.ledger.samples == total["samples"] == len(samples)
    assert dataset.ledger.packs == len(dataset)
    assert len(dataset.ledger.dropped) == sum(total["documents"]["dropped"].values())
    if total["documents"]["repeats"] == 0:  # else, tokens of a document are counted once and read more often
        tokens = total["tokens"]
        assert tokens["targets"] == sum(int((sample.labels != -100).sum()) for sample in samples)
        held = sum(tokens[kind] for kind in ("targets", "context", "media", "special", "repeated"))
        assert held == sum(map(len, samples))
    if packing:
        assert dataset.ledger.fill == pytest.approx(
            sum(map(len, samples)) / (len(dataset) * max_length), abs=1e-6
        )
    else:
        assert dataset.ledger.fill is None


def make(rows, processor, **options):
    return CPTDataset(rows, processor, **({"max_length": 64} | options))


def test_the_first_bad_row_stops_with_its_place(tiny_processor):
    with pytest.raises(DocumentError, match=r"rows:2: text, character 1: <trainable_text> is not closed"):
        make([trained("a b"), {"text": "a<trainable_text>b"}], tiny_processor)


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"text": "<trainable_text>b"}, {}),
        ({"text": "a<image>"}, {}),
        ({"text": "a<image>", "images": [{"bytes": b"x"}]}, {}),
        ({"text": "a<image>b", "images": [{"bytes": png(0, 448, 448)}]}, {}),
        (trained(digits(99)), {"on_overlong": "error"}),
        ({"text": "a"}, {"untagged": "error"}),
    ],
)
def test_every_message_about_a_document_names_its_id(tiny_processor, row, options):
    with pytest.raises(DocumentError, match=r"^rows:2: id pump-1: "):
        make([trained("a b"), {**row, "id": "pump-1"}], tiny_processor, **options)


def test_skipped_rows_are_named_with_their_reason(tiny_processor):
    rows = [
        trained("a b"),
        {"text": "<trainable_text>b", "id": "two"},
        {"text": "a<image>", "images": [{"bytes": b"x"}], "id": "three"},
        {"text": "no target <trainable_text></trainable_text>", "id": "four"},
        {"text": "a", "images": ["a.png"]},
    ]
    ledger = make(rows, tiny_processor, on_bad_data="skip", max_bad_fraction=0.6).ledger
    balance(ledger)
    assert [(one.source, one.line, one.id, one.reason) for one in ledger.dropped] == [
        ("rows", 2, "two", "markup"),
        ("rows", 3, "three", "medium"),
        ("rows", 4, "four", "without_targets"),
        ("rows", 5, None, "markers"),
    ]
    assert ledger.total.documents["without_targets"] == 1
    assert ledger.dropped[0].detail.startswith("text, character 0: <trainable_text> is not closed")
    assert ledger.dropped[1].detail.startswith("images: image given as bytes")


def test_more_bad_rows_than_allowed_stop_with_their_reasons(tiny_processor):
    rows = [trained("a b")] * 8 + [{"text": "</trainable_text>"}, {"no": "text"}]
    make(rows, tiny_processor, on_bad_data="skip", max_bad_fraction=0.2)
    with pytest.raises(BadDataError) as caught:
        make(rows, tiny_processor, on_bad_data="skip", max_bad_fraction=0.19)
    assert "2 of 10 rows of 'rows' cannot be used, more than max_bad_fraction 0.19." in str(caught.value)
    assert "Reasons: 1 markup, 1 row. The first: rows:" in str(caught.value)
    assert " | rows:10: text: the field is missing" in str(caught.value)
    assert "The last" not in str(caught.value)  # both are named already

    rows[:5] = [{"text": "<trainable_text>"}] * 5
    with pytest.raises(
        BadDataError, match=r"Reasons: 6 markup, 1 row\. .* \| The last: rows:10: text: the field"
    ):
        make(rows, tiny_processor, on_bad_data="skip", max_bad_fraction=0.19)


def test_a_document_without_targets_is_not_a_bad_one(tiny_processor):
    rows = [trained("a b")] + [{"text": "<trainable_text></trainable_text>a"}] * 9
    assert (
        make(rows, tiny_processor, on_bad_data="skip", max_bad_fraction=0).ledger.total.documents["used"] == 1
    )


def test_a_hundred_bad_rows_in_a_row_stop_at_once(tiny_processor):
    bad = {"text": "</trainable_text>"}
    rows = [trained("a b")] * 1000 + [bad] * 100 + [trained("a b")]
    with pytest.raises(
        BadDataError, match="100 unusable rows in a row, the last: rows:1100: text, character 0"
    ):
        make(rows, tiny_processor, on_bad_data="skip", max_bad_fraction=0.5)


@pytest.mark.parametrize(
    "between", [trained("a b"), trained(digits(99)), {"text": "<trainable_text></trainable_text>"}]
)
def test_a_readable_row_begins_the_count_of_bad_ones_again(tiny_processor, between):
    bad = {"text": "</trainable_text>"}
    rows = [trained("a b")] + [bad] * 99 + [between] + [bad] * 99
    dataset = make(rows, tiny_processor, on_bad_data="skip", max_bad_fraction=1, on_overlong="drop")
    assert dataset.ledger.total.dropped_documents["markup"] == 198


def test_overlong_documents_are_dropped_or_stop(tiny_processor):
    rows = [trained("a b"), trained(digits(99))]
    ledger = make(rows, tiny_processor, on_overlong="drop", max_bad_fraction=0).ledger
    assert ledger.total.dropped_documents == {"overlong": 1}
    assert ledger.total.dropped_tokens == {"overlong": 100}
    for on_bad_data in ("error", "skip"):
        with pytest.raises(
            DocumentError, match="rows:2: 100 tokens up to the last target, more than max_length 64"
        ):
            make(rows, tiny_processor, on_overlong="error", on_bad_data=on_bad_data)


def test_a_medium_that_fits_no_part_is_a_bad_row(tiny_processor):
    rows = [
        trained("a b"),
        {"text": "<image><trainable_text>a</trainable_text>", "images": [{"bytes": png(0, 448, 448)}]},
    ]
    with pytest.raises(
        DocumentError, match="rows:2: image given as bytes takes 256 tokens, which does not fit"
    ):
        make(rows, tiny_processor)
    ledger = make(rows, tiny_processor, on_bad_data="skip", max_bad_fraction=0.5).ledger
    assert ledger.total.dropped_documents == {"medium_too_large": 1}
    balance(ledger)


@pytest.mark.parametrize("replay_share", [0.0, 0.3])
def test_data_that_trains_nothing_are_an_error(tiny_processor, replay_share):
    rows = [{"text": "<trainable_text></trainable_text>a"}] * 3
    replay = {"path": [trained("a b")], "name": "old"}
    with pytest.raises(BadDataError, match="none of 3 documents can be trained on") as caught:
        make(rows, tiny_processor, replay_data=replay, replay_share=replay_share)
    assert "Reasons: 3 without_targets. Mark targets with <trainable_text>." in str(caught.value)
    balance(caught.value.ledger)


def test_replay_that_trains_nothing_is_an_error(tiny_processor):
    with pytest.raises(BadDataError, match="replay_data has no document that can be trained on"):
        make(
            [trained("a b")],
            tiny_processor,
            replay_data={"path": [{"text": "<trainable_text></trainable_text>a"}], "name": "old"},
            replay_share=0.3,
        )


def test_untagged_split_and_empty_spans_are_counted(tiny_processor):
    rows = [
        {"text": "no tag here"},
        trained(digits(100)),
        {"text": "a<trainable_text></trainable_text><trainable_text>b</trainable_text>"},
    ]
    documents = make(rows, tiny_processor).ledger.total.documents
    assert documents["untagged"] == 1
    assert documents["split"] == 1
    assert documents["empty_spans"] == 1


def test_shares_repeat_documents_and_the_ledger_shows_what_was_realised(tiny_processor):
    few = {"path": [trained(digits(10, n)) for n in range(20)], "name": "few", "share": 0.5}
    many = {"path": [trained(digits(10, n)) for n in range(100)], "name": "many"}
    ledger = make([few, many], tiny_processor).ledger
    balance(ledger)
    found = ledger.as_json()["sources"]
    assert found["few"]["share"] == {"asked": 0.5, "realised": pytest.approx(0.5, abs=0.01)}
    assert found["few"]["documents"]["repeats"] == 80
    assert found["many"]["documents"]["repeats"] == 0
    assert found["few"]["tokens"]["read"] == 20 * 11  # counted once


def test_with_replay_a_share_is_asked_of_what_replay_leaves(tiny_processor):
    sources = [
        {"path": [trained(digits(10, n)) for n in range(60)], "name": name, "share": share}
        for name, share in (("few", 0.4), ("many", 0.6))
    ]
    old = {"path": [trained(digits(10, n)) for n in range(60)], "name": "old"}
    ledger = make(sources, tiny_processor, replay_data=old, replay_share=0.2).ledger
    balance(ledger)
    shares = {name: one["share"] for name, one in ledger.as_json()["sources"].items()}
    assert [one["asked"] for one in shares.values()] == pytest.approx([0.32, 0.48, 0.2])
    assert sum(one["realised"] for one in shares.values()) == pytest.approx(1, abs=1e-5)
    for one in shares.values():
        assert one["realised"] == pytest.approx(one["asked"], abs=0.01)


def test_replay_is_drawn_up_to_its_share_and_the_rest_is_not_drawn(tiny_processor):
    new = {"path": [trained(digits(10 + n % 7, n)) for n in range(150)], "name": "new"}
    old = {"path": [trained(digits(5 + n % 30, n)) for n in range(200)], "name": "old"}
    dataset = make([new], tiny_processor, replay_data=old, replay_share=0.35)
    balance(dataset.ledger)
    found = dataset.ledger.as_json()["sources"]["old"]
    assert found["documents"]["not_drawn"] > 0
    assert found["documents"]["used"] + found["documents"]["not_drawn"] == 200
    assert found["share"] == {"asked": 0.35, "realised": pytest.approx(0.35, abs=0.02 * 0.35)}
    # As the items have it.
    of_old, total = 0, 0
    for number in range(len(dataset)):
        for name, sample in zip(dataset.names(number), dataset[number], strict=True):
            targets = int((sample.labels != -100).sum())
            total += targets
            of_old += targets * name.startswith("old")
    assert of_old / total == pytest.approx(0.35, abs=0.02 * 0.35)


def test_a_source_with_a_share_of_which_nothing_can_be_used_is_named_with_its_reasons(
    tmp_path, tiny_processor
):
    (tmp_path / "good.jsonl").write_text('{"text": "one two"}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "one", "images": ["a.png"]}\n' * 3)
    sources = [
        {"path": str(tmp_path / "good.jsonl"), "share": 0.7},
        {"path": str(tmp_path / "bad.jsonl"), "share": 0.3},
    ]

    with pytest.raises(BadDataError, match=r"none of 3 documents of 'bad', which has share 0\.3,") as raised:
        CPTDataset(sources, tiny_processor, max_length=64, on_bad_data="skip", max_bad_fraction=1.0)

    assert "bad.jsonl:1" in str(raised.value)
    assert raised.value.ledger.sources["bad"].documents["read"] == 3


def test_documents_above_max_documents_are_not_drawn_and_the_ledger_balances(tiny_processor):
    rows = [
        row(f"{number} <trainable_text>{digits(5 + number, number)}</trainable_text>") for number in range(40)
    ]
    rows += [row(f"long <trainable_text>{digits(90)}</trainable_text>")] * 3
    sets = [
        CPTDataset(rows, tiny_processor, max_length=64, max_documents=16, seed=seed) for seed in (1, 1, 2)
    ]

    drawn = [sorted({document.source.line for document in one.documents}) for one in sets]
    assert drawn[0] == drawn[1] != drawn[2]
    for one, lines in zip(sets, drawn, strict=True):
        account = one.ledger.total
        assert len(lines) == account.documents["used"] == 16
        assert account.documents["not_drawn"] == 43 - 16
        assert account.tokens["not_drawn"] > 0
        assert account.imbalance() is None
        read = {number for index in range(len(one)) for number in one.document_numbers(index)}
        assert read == set(range(16))


def test_fewer_documents_than_max_documents_are_all_read(tiny_processor):
    rows = [row(f"{number} <trainable_text>{digits(5, number)}</trainable_text>") for number in range(4)]

    whole, limited = (
        CPTDataset(rows, tiny_processor, max_length=64, max_documents=most) for most in (None, 4)
    )

    assert whole.digest == limited.digest
