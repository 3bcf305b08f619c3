"""The data set: the same items in any order and process, each sample once, from any kind of source."""

import json
import pickle
import random
import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from tests.support import TEN, avi, digits, opened, png, row
from vlcpt import CPTDataset, Document, DocumentError, Image, Text, encode_document
from vlcpt.config.schema import DataConfig
from vlcpt.data.dataset import _LongDocuments
from vlcpt.data.encode.encoder import DocumentEncoder, Sample, closed_stream
from vlcpt.data.plan.balance import PackCost
from vlcpt.data.plan.failures import FailedSample

COST = PackCost(token=100, pair=1, target=10, media=200, frame_pair=5)


def equal(one: Sample, two: Sample) -> bool:
    """Whether every tensor of two samples is."""
    for name, value in vars(one).items():
        other = getattr(two, name)
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        if not same:
            return False
    return vars(one).keys() == vars(two).keys()


def equal_items(one: list[Sample], two: list[Sample]) -> bool:
    return len(one) == len(two) and all(map(equal, one, two))


@pytest.fixture(scope="module")
def rows():
    """Ten documents with media and forty of text, one of them in parts."""
    text = [row(f"{n} <trainable_text>{digits(5 + n, n)}</trainable_text>") for n in range(40)]
    return [*TEN, *text, row(f"long <trainable_text>{digits(200)}</trainable_text>")]


@pytest.fixture(scope="module")
def dataset(rows, tiny_processor):
    return CPTDataset(rows, tiny_processor, max_length=72)


def test_items_are_the_same_in_any_order_of_access(dataset, rows, tiny_processor):
    forwards = [dataset[number] for number in range(len(dataset))]
    other = CPTDataset(rows, tiny_processor, max_length=72)
    order = list(range(len(other)))
    random.Random(1).shuffle(order)
    assert len(forwards) > 10
    assert all(equal_items(other[number], forwards[number]) for number in order)


def test_a_pickled_copy_has_the_same_items(dataset):
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(copy) == len(dataset)
    assert all(equal_items(copy[number], dataset[number]) for number in range(len(dataset)))
    assert copy.ledger.as_json() == dataset.ledger.as_json()


def test_two_loader_workers_give_the_same_items(dataset):
    loader = DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=list)
    found = [item for batch in loader for item in batch]
    assert len(found) == len(dataset)
    assert all(equal_items(item, dataset[number]) for number, item in enumerate(found))


def test_packs_hold_each_sample_once_and_fit(dataset, rows):
    names = [name for number in range(len(dataset)) for name in dataset.names(number)]
    long = f"rows:{len(rows)}"
    assert sorted(name for name in names if name != long) == sorted(f"rows:{n}" for n in range(1, len(rows)))
    assert names.count(long) == 3
    for number in range(len(dataset)):
        item = dataset[number]
        assert [sample.name for sample in item] == dataset.names(number)
        assert sum(map(len, item)) <= 72
        assert dataset.pack_sizes()[number, 1] == sum(int((sample.labels != -100).sum()) for sample in item)
    assert dataset.ledger.fill > 0.8


def test_without_packing_an_item_is_one_sample(rows, tiny_processor, dataset):
    unpacked = CPTDataset(rows, tiny_processor, max_length=72, packing=False)
    assert len(unpacked) == dataset.ledger.samples == unpacked.ledger.samples
    assert {len(unpacked[number]) for number in range(len(unpacked))} == {1}
    assert unpacked.ledger.fill is None


def test_the_seed_decides_what_is_packed_together(rows, tiny_processor, dataset):
    def plan(seed):
        one = CPTDataset(rows, tiny_processor, max_length=72, seed=seed)
        return [one.names(number) for number in range(len(one))]

    assert plan(0) == [dataset.names(number) for number in range(len(dataset))]
    assert plan(0) != plan(1)


def test_an_index_outside_is_an_index_error(dataset):
    assert equal_items(dataset[-1], dataset[len(dataset) - 1])
    for index in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError, match=f"item {index} of {len(dataset)}"):
            dataset[index]
    assert len(list(dataset)) == len(dataset)  # iteration ends


# ---- other pixels


def test_pixels_can_be_those_of_the_next_document_or_none(tiny_processor):
    rows = [row(f"<image>{n}<trainable_text>{n}</trainable_text>", images=[png(n)]) for n in range(3)]
    dataset = CPTDataset(rows, tiny_processor, max_length=64, packing=False)
    order = [int(dataset.names(number)[0].split(":")[1]) - 1 for number in range(3)]
    own = {document: dataset[number][0] for number, document in enumerate(order)}
    swapped = {document: dataset.with_pixels_of("next_document")[n][0] for n, document in enumerate(order)}
    blank = {document: dataset.with_pixels_of("blank")[n][0] for n, document in enumerate(order)}
    for document in range(3):
        assert torch.equal(swapped[document].pixel_values, own[(document + 1) % 3].pixel_values)
        assert not blank[document].pixel_values.any()
        for other in (swapped[document], blank[document]):
            assert torch.equal(other.input_ids, own[document].input_ids)
            assert torch.equal(other.labels, own[document].labels)
    assert torch.equal(dataset[0][0].pixel_values, own[order[0]].pixel_values)  # it is not changed itself


@pytest.mark.parametrize(
    ("rows", "has_media", "can_shuffle"),
    [
        ([row("a b")], False, False),
        ([row("a <image>b", images=[png(1)])], True, False),
        ([row("a <image>b", images=[png(n)]) for n in range(2)], True, True),
    ],
)
def test_whether_there_is_another_image_to_swap_with(tiny_processor, rows, has_media, can_shuffle):
    dataset = CPTDataset(rows, tiny_processor, max_length=64)
    assert (dataset.has_media, dataset.can_shuffle) == (has_media, can_shuffle)


# ---- sources


def names_of(dataset):
    return sorted(name for number in range(len(dataset)) for name in dataset.names(number))


def test_sources_may_be_a_path_a_mapping_a_list_of_these_rows_or_documents(tiny_processor, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a b", "id": "' + name + '"}\n')
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"

    def names(sources):
        return names_of(CPTDataset(sources, tiny_processor, max_length=16))

    assert names(str(one)) == names(one) == names({"path": one}) == names([one]) == ["one"]
    assert names([str(one), {"path": str(two)}]) == ["one", "two"]
    assert names([{"text": "a b", "id": "x"}]) == ["x"]
    assert names([Document((Text("a b", True),), id="y")]) == ["y"]
    assert names([{"text": "a b", "path": "ignored", "id": "z"}]) == ["z"]
    assert names({"path": [{"text": "a b"}], "name": "mine"}) == ["mine:1"]
    table = datasets.Dataset.from_dict({"text": ["a b", "c d"]})
    assert names(table) == names([table]) == ["rows:1", "rows:2"]
    assert sorted(names([table, table])) == ["rows-2:1", "rows-2:2", "rows:1", "rows:2"]
    config = DataConfig([str(one), {"path": str(two), "name": "mine"}])
    assert names(config.train_data) == ["one", "two"]
    assert names(config.train_data[0]) == ["one"]


def test_two_sources_of_one_name_are_refused(tiny_processor, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").write_text('{"text": "a b"}\n')
    paths = [tmp_path / "a" / "train.jsonl", tmp_path / "b" / "train.jsonl"]
    with pytest.raises(DocumentError, match=r"two sources are called 'train'\. Give each its own 'name'\."):
        CPTDataset(paths, tiny_processor, max_length=16)
    named = [{"path": path, "name": path.parent.name} for path in paths]
    assert list(CPTDataset(named, tiny_processor, max_length=16).ledger.sources) == ["a", "b"]


def test_a_key_that_a_file_cannot_have_is_refused(tiny_processor, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a b"}\n')
    with pytest.raises(DocumentError, match="split 'train' does not apply to a file"):
        CPTDataset({"path": path, "split": "train"}, tiny_processor, max_length=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replay_share": 1.0}, "replay_share must be at least 0 and below 1; found 1.0"),
        ({"replay_share": -0.1}, "replay_share must be at least 0"),
        ({"max_length": 1}, "max_length must be at least 2, a target and its context; found 1"),
    ],
)
def test_options_out_of_range_are_refused(tiny_processor, options, message):
    with pytest.raises(ValueError, match=message):
        CPTDataset([row("a b")], tiny_processor, **({"max_length": 16} | options))


def test_the_shortest_max_length_trains_every_target(tiny_processor):
    dataset = CPTDataset([row(digits(9))], tiny_processor, max_length=2)
    trained = [int(sample.labels[1]) for number in range(len(dataset)) for sample in dataset[number]]
    assert len(trained) == 9  # 9 digits without the first, and end-of-text
    assert all(len(item) == 1 and len(item[0]) == 2 for item in dataset)


# ---- where media lie


def test_media_must_lie_in_the_folder_of_the_data_file(tiny_processor, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "in.png").write_bytes(png(0))
    (tmp_path / "out.png").write_bytes(png(1))
    path = tmp_path / "data" / "train.jsonl"

    path.write_text(json.dumps({"text": "a <image>b", "images": ["in.png"]}))
    assert CPTDataset(path, tiny_processor, max_length=32)[0][0].image_grid_thw.tolist() == [[1, 4, 4]]

    path.write_text("\n" + json.dumps({"text": "a <image>b", "images": ["../out.png"]}))
    with pytest.raises(DocumentError) as caught:
        CPTDataset(path, tiny_processor, max_length=32)
    assert str(caught.value).startswith(f"{path}:2: images: '../out.png' lies outside the media_root")
    wider = {"path": path, "media_root": tmp_path / "data" / ".."}
    with pytest.raises(DocumentError, match="lies outside"):  # paths are relative to the media_root
        CPTDataset(wider, tiny_processor, max_length=32)
    path.write_text(json.dumps({"text": "a <image>b", "images": ["out.png"]}))
    assert len(CPTDataset(wider, tiny_processor, max_length=32)) == 1


def test_documents_in_memory_keep_to_the_media_root_of_their_source(tiny_processor, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png(0))
    (tmp_path / "out.png").write_bytes(png(1))
    inside = Document((Image("a.png"), Text("a b", True)))
    outside = Document((Image(str(tmp_path / "out.png")), Text("a b", True)))

    def make(document):
        return CPTDataset(
            {"path": [document], "media_root": tmp_path / "in", "name": "mine"}, tiny_processor, max_length=32
        )

    assert len(make(inside)) == 1
    with pytest.raises(DocumentError, match=r"mine:1: images: .* lies outside the media_root"):
        make(outside)
    assert len(CPTDataset([outside], tiny_processor, max_length=32)) == 1  # without one, as trusted


def test_the_digest_tells_texts_of_equally_many_tokens_apart(tiny_processor):
    texts = ["a <trainable_text>1 2 3</trainable_text>", "a <trainable_text>1 2 4</trainable_text>"]
    weighted = texts[0].replace("_text>1", '_text weight="0.5">1')
    found = [CPTDataset([row(text)], tiny_processor, max_length=50) for text in (*texts, weighted)]
    assert len({str(one.ledger.as_json()) for one in found}) == 1
    assert len({one.digest for one in found}) == 3


def test_a_plan_holds_what_the_items_hold(rows, tiny_processor):
    """Documents in parts, some of them not drawn and some read again."""
    replay = [row(f"old {n} <trainable_text>{digits(9 + 20 * n, n)}</trainable_text>") for n in range(9)]
    sources = [{"path": rows, "name": "a", "share": 0.3}, {"path": rows[20:], "name": "b", "share": 0.7}]
    old = {"path": replay, "name": "old"}

    found = CPTDataset(
        sources, tiny_processor, max_length=72, packing=False, replay_data=old, replay_share=0.1
    )
    documents = found.ledger.total.documents
    assert min(documents[kind] for kind in ("split", "repeats", "not_drawn")) > 0

    assert len(found) == found.ledger.samples
    samples = [found[number][0] for number in range(len(found))]
    assert all(isinstance(sample, Sample) for sample in samples)  # none failed
    names = [found.names(number) for number in range(len(found))]
    assert names == [[sample.name] for sample in samples]
    targets = [int((sample.labels >= 0).sum()) for sample in samples]
    assert found.pack_sizes()[:, :2].tolist() == [
        [len(sample), count] for sample, count in zip(samples, targets, strict=True)
    ]


def test_the_longest_documents_are_those_with_the_last_targets(rows, tiny_processor):
    """One of them is in parts."""
    rows = [*rows, rows[-1] | {"id": "twin"}, row(f"all <trainable_text>{digits(90)}</trainable_text>")]
    dataset = CPTDataset(rows, tiny_processor, max_length=72)
    expected = []
    source = opened(rows)
    for document in map(source.document, range(len(rows))):
        labels = encode_document(document, tiny_processor).labels
        expected.append((int((labels >= 0).nonzero()[-1]) + 1, document.name))

    assert dataset.ledger.total.documents["split"] == 3
    expected.sort(key=lambda one: -one[0])  # equal ones in the order of the rows
    for count in (1, 4, 10):
        assert dataset.longest(count) == [(name, length) for length, name in expected[:count]]


def changed(dataset: CPTDataset) -> str:
    """The one sample that could not be read: what stops the run."""
    failed = [one for item in dataset for one in item if isinstance(one, FailedSample)]
    assert failed
    assert all(one.stops and one.dropped.reason == "changed" for one in failed)
    return failed[-1].message


@pytest.mark.parametrize("on_bad_data", ["error", "skip"])
@pytest.mark.parametrize(
    ("now", "what"),
    [
        (
            "a <trainable_text>1 2 4</trainable_text>",
            "its tokens and targets are not those that were planned",
        ),
        ("a 1 <trainable_text>2 3</trainable_text>", "its tokens and targets are not"),  # other targets
        ("", "its file was changed since the run was planned, and now gives: not JSON"),
    ],
    ids=["another token", "other targets", "cut"],
)
def test_a_row_that_is_rewritten_after_planning_stops_as_changed(
    tiny_processor, tmp_path, on_bad_data, now, what
):
    path = tmp_path / "train.jsonl"
    kept, then = '{"text": "one two"}\n', "a <trainable_text>1 2 3</trainable_text>"
    path.write_text(kept + json.dumps({"text": then}) + "\n")
    dataset = CPTDataset(path, tiny_processor, max_length=50, packing=False, on_bad_data=on_bad_data)
    if now:
        line = json.dumps({"text": now})
        assert len(line) == len(json.dumps({"text": then}))
        path.write_text(kept + line + "\n")
    else:
        path.write_text(kept)

    assert re.match(rf".*train\.jsonl:2: {what}", changed(dataset))


@pytest.mark.parametrize("rows", [["a 1 2 3", "a 1 2 4"], ["a 1 2 3"]], ids=["another token", "a row less"])
def test_a_parquet_file_that_is_rewritten_after_planning_stops_as_changed(tiny_processor, tmp_path, rows):
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": ["a 1 2 3", "a 1 2 3"]}), path)
    dataset = pickle.loads(  # as in a worker, which opens it itself
        pickle.dumps(CPTDataset(path, tiny_processor, max_length=50, packing=False, on_bad_data="skip"))
    )
    pq.write_table(pa.table({"text": rows}), tmp_path / "new")
    (tmp_path / "new").replace(path)

    assert re.search(r"train\.parquet:2: its .*changed\s+since", changed(dataset))


def test_an_image_that_takes_as_many_tokens_on_another_grid_stops_as_changed(tiny_processor, tmp_path):
    """One of the same grid is trained: pixels are not in the plan."""
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"text": "<image>a b", "images": ["a.png"]}))
    image = tmp_path / "a.png"
    image.write_bytes(png(0, 56, 112))
    dataset = CPTDataset(path, tiny_processor, max_length=50, on_bad_data="skip")
    image.write_bytes(png(1, 56, 112))
    assert isinstance(dataset[0][0], Sample)
    image.write_bytes(png(0, 112, 56))

    assert "the row or a medium was changed since" in changed(dataset)


def test_a_document_that_is_split_is_tokenised_once_for_all_of_its_parts(tiny_processor, monkeypatch):
    dataset = CPTDataset([{"text": digits(500)}, {"text": "one"}], tiny_processor, max_length=64)
    called = []
    tokens = DocumentEncoder.tokens

    def counted(encoder, document):
        called.append(document.name)
        return tokens(encoder, document)

    monkeypatch.setattr(DocumentEncoder, "tokens", counted)
    items = [dataset[number] for number in range(len(dataset))]

    assert len(items) > 7
    assert sorted(called) == sorted(set(called))
    assert len(called) == 2
    # The parts are those of a data set that keeps none.
    monkeypatch.setattr(dataset, "_long", _LongDocuments(0))
    for number in reversed(range(len(dataset))):
        again = dataset[number]
        assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(again, items[number], strict=True))


def test_of_long_documents_those_used_last_are_kept():
    stream = closed_stream([np.arange(3, 6)], [np.ones(3)], 2, 0.0)  # 4 tokens
    kept = _LongDocuments(most=2 * 20 * 4 + 10)
    for number in (0, 1):
        kept.keep(0, number, Document(()), stream)
    kept.get(0, 0)
    kept.keep(0, 2, Document(()), stream)

    assert [kept.get(0, number) is not None for number in (0, 1, 2)] == [True, False, True]

    kept.keep(0, 3, Document((Image(data=b"0" * 200),)), stream)  # as large as all others
    assert [kept.get(0, number) is not None for number in range(4)] == [False, False, False, True]


def test_balanced_packs_have_the_same_samples_and_the_same_account(dataset):
    def documents(one):
        return sorted(
            tuple(sample.input_ids.tolist()) for number in range(len(one)) for sample in one[number]
        )

    before = dataset.ledger.as_json()

    balanced = dataset.balanced(COST)

    assert documents(balanced) == documents(dataset)
    assert len(balanced) == len(dataset)
    assert balanced.pack_sizes()[:, 0].max() <= 72
    assert balanced.pack_sizes().tolist() != dataset.pack_sizes().tolist()
    assert (balanced.digest, balanced.ledger.as_json()) == (dataset.digest, before)
    assert balanced.pack_costs(COST, 4)[0].std() < dataset.pack_costs(COST, 4)[0].std()


def test_packs_are_balanced_from_those_that_were_planned(dataset):
    """So a second run in the process reads what the first one read."""
    once = dataset.balanced(COST)

    assert once.balanced(COST).pack_sizes().tolist() == once.pack_sizes().tolist()
    assert once.balanced(None).pack_sizes().tolist() == dataset.pack_sizes().tolist()
    assert dataset.balanced(None) is dataset


def test_samples_that_are_not_packed_stay_alone(rows, tiny_processor):
    dataset = CPTDataset(rows, tiny_processor, max_length=72, packing=False)

    assert dataset.balanced(COST).pack_sizes().tolist() == dataset.pack_sizes().tolist()


def test_the_cost_of_a_pack_knows_each_image_and_frame(tiny_processor):
    """Two images have fewer pairs of tokens than one of their tokens together, and so have frames."""
    pairs = PackCost(token=0, pair=0, target=0, media=0, frame_pair=1)
    large = row("<image> a", images=[png(0, 56, 112)])
    small = row("<image> <image> a", images=[png(0, 56, 56), png(1, 56, 56)])
    moving = row("<video> a", videos=[avi(0)])

    costs = [
        CPTDataset([one], tiny_processor, max_length=128).pack_costs(pairs, 1)[0].tolist()
        for one in (large, small, moving)
    ]

    sizes = CPTDataset([moving], tiny_processor, max_length=128).pack_sizes()
    assert costs[:2] == [[8 * 8], [2 * 4 * 4]]
    assert costs[2] == [sizes[0, 2] * 4]  # frames of four tokens


def test_items_have_the_processors_pixels_unless_a_collator_knows_bytes(tiny_processor):
    dataset = CPTDataset(TEN[:3], tiny_processor, max_length=128)
    plain = {sample.name: sample for number in range(len(dataset)) for sample in dataset[number]}
    dataset.keeps_bytes = True
    lean = {sample.name: sample for number in range(len(dataset)) for sample in dataset[number]}

    pixels = [one for one in plain.values() if one.pixel_values is not None]
    assert pixels
    assert all(one.pixel_values.dtype == torch.float32 for one in pixels)
    assert all(lean[one.name].pixel_values.dtype == torch.uint8 for one in pixels)
    videos = [one for one in plain.values() if one.pixel_values_videos is not None]
    assert [one.pixel_values_videos.dtype for one in videos] == [torch.float32]


def test_balanced_packs_are_named_by_their_own_documents(tiny_processor):
    rows = [{"id": f"d{number}", "text": digits(5 + number * 7 % 40, number)} for number in range(200)]
    dataset = CPTDataset(rows, tiny_processor, max_length=128)
    balanced = dataset.balanced(PackCost(token=1, pair=5, target=3, media=0, frame_pair=0))

    names = [[sample.name for sample in balanced[number]] for number in range(len(balanced))]
    assert names != [[sample.name for sample in dataset[number]] for number in range(len(dataset))]
    assert [balanced.names(number) for number in range(len(balanced))] == names
    with balanced.board.working_on(3):
        assert any(names[3][0] in one for one in balanced.board.in_flight())
