"""A prepared source gives what its rows give: documents, plans, ledgers and pixels, whatever wrote it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.support import avi, digits, opened, png, wait_for
from vlcpt import CPTDataset, DocumentError
from vlcpt.data.encode.encoder import DocumentEncoder
from vlcpt.data.encode.vision import EncodingOptions
from vlcpt.data.plan.ledger import BadDataError
from vlcpt.data.prepared.fingerprint import fingerprint
from vlcpt.data.prepared.read import SCHEMA, PreparedRows
from vlcpt.data.prepared.write import _write_shards, prepare_source

MAX_LENGTH = 60
OPTIONS = {"train_eos": "auto", "min_pixels": None, "max_pixels": 56 * 56, "fps": 2.0, "max_frames": 8}
PLANNED = {**OPTIONS, "max_length": MAX_LENGTH, "on_bad_data": "skip", "max_bad_fraction": 1.0}
GOOD = [
    {"text": f"one <trainable_text>{digits(9, 1)}</trainable_text>", "id": "first"},
    {"text": "<image>a <trainable_text>red</trainable_text> valve", "images": ["a.png"]},
    {
        "text": f"{digits(30, 2)}<trainable_text>{digits(90, 3)}</trainable_text>x <image>",
        "images": ["b.png"],
    },
    {"text": f'<video><trainable_text weight="0.3">{digits(5)}</trainable_text>', "videos": ["c.avi"]},
    {
        "text": '<trainable_text weight="2.5">w</trainable_text><image>x<trainable_text>z</trainable_text>'
        "<video>",
        "images": [{"path": "a.png", "max_pixels": 28 * 28}],
        "videos": [{"path": "c.avi", "fps": 1.0, "max_frames": 4}],
    },
    {"text": "no tag at all"},
    {"text": "an empty <trainable_text></trainable_text>span"},
    {"text": "va<trainable_text>lve</trainable_text>s"},
]
BAD = [
    {"text": "<trainable_text>never closed", "id": "open"},
    {"text": "<image>gone", "images": ["none.png"]},
    {"text": 7},
    {"text": "<image>broken", "images": ["broken.png"], "id": 12},
    {
        "text": f"<image>{digits(3)}",
        "images": [{"path": "large.png", "max_pixels": 10**30}],
    },  # splits nowhere
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A JSONL file of 34 rows, good and bad, its media beside it."""
    folder = tmp_path_factory.mktemp("rows")
    for name, content in {
        "a.png": png(1), "b.png": png(2, 84, 56), "c.avi": avi(1), "large.png": png(3, 500, 500),
        "broken.png": png(4)[:20],
    }.items():  # fmt: skip
        (folder / name).write_bytes(content)
    lines = [json.dumps(row) for row in [*GOOD, *BAD[:2], *GOOD, *BAD[2:], *GOOD, *GOOD]]
    lines[20:20] = ["", "not json", ""]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Shards of 10 rows in batches of some documents, so that there are several of each."""
    monkeypatch.setattr("vlcpt.data.prepared.write.SHARD_ROWS", (10, 8192))
    monkeypatch.setattr("vlcpt.data.plan.scan.PREPARED_ROWS", 20)
    monkeypatch.setattr("vlcpt.data.prepared.write.GROUP_BYTES", 3000)


def prepared(path, folder, processor, *, untagged="train", options=OPTIONS, **settings):
    """Prepare a source; give its folder."""
    source = opened(path, untagged=untagged) if isinstance(path, Path | list) else path
    prepare_source(
        source,
        partial(DocumentEncoder, processor, EncodingOptions(**options)),
        folder,
        fingerprint=fingerprint(processor, untagged, EncodingOptions(**options)),
        **{"stops": False, **settings},
    )
    return folder


@pytest.fixture(scope="module")
def whole(rows, tiny_processor, tmp_path_factory):
    """The rows, prepared without an interruption."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlcpt.data.prepared.write.SHARD_ROWS", (10, 8192))
        patch.setattr("vlcpt.data.prepared.write.GROUP_BYTES", 3000)
        return prepared(rows, tmp_path_factory.mktemp("whole") / "train", tiny_processor)


def assert_equal_datasets(found, expected):
    """Same plan, same account, same tensors."""
    assert found.digest == expected.digest
    assert found.ledger.as_json() == expected.ledger.as_json()
    assert found.ledger.dropped == expected.ledger.dropped
    for number in range(len(expected)):
        assert found.names(number) == expected.names(number)
        for one, other in zip(found[number], expected[number], strict=True):
            for name, value in vars(other).items():
                mine = getattr(one, name)
                same = torch.equal(mine, value) if isinstance(value, torch.Tensor) else mine == value
                assert same, (number, name)


def shard_tables(folder):
    """Every shard, whole."""
    return [pq.read_table(path) for path in sorted(folder.glob("0*.parquet"))]


@pytest.mark.parametrize("settings", [{}, {"packing": False}, {"on_overlong": "drop"}, {"max_length": 40}])
def test_a_prepared_source_gives_what_its_rows_give(rows, whole, tiny_processor, settings):
    expected = CPTDataset(rows, tiny_processor, **{**PLANNED, **settings})
    found = CPTDataset(whole, tiny_processor, **{**PLANNED, **settings})

    total = expected.ledger.total
    assert len(total.dropped_documents) >= 5  # or equal ledgers would say little
    assert total.documents["split"] or "on_overlong" in settings
    assert total.documents["untagged"] and total.documents["empty_spans"] and total.documents["cut_edges"]
    assert expected.modalities == ("image", "video")
    assert_equal_datasets(found, expected)
    assert found.longest(3) == expected.longest(3)


@pytest.mark.parametrize("medium", [{}, {"images": ["a.png"]}])
def test_what_was_not_read_of_rows_and_files_is_said_as_of_the_rows(tiny_processor, tmp_path, medium):
    rows = [{"text": "one"} | ({"source": "web"} if n % 2 else {}) | {"score": n} for n in range(24)]
    rows[5] = {"text": "<image>" * len(medium) + "two", "url": "http://example.org"} | medium
    rows[6] = {"text": "<trainable_text></trainable_text>", "lost": 1}
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = prepared(tmp_path / "train.jsonl", tmp_path / "set", tiny_processor)
    found = CPTDataset(str(folder), tiny_processor, **PLANNED)
    expected = CPTDataset(str(tmp_path / "train.jsonl"), tiny_processor, **PLANNED)
    assert_equal_datasets(found, expected)
    beside = {} if medium else {"media files beside the rows": 1}
    counted = {"score": 22, "source": 11, "url": 1, "lost": 1}
    assert found.ledger.sources["train"].not_read == counted | beside


def test_documents_without_a_target_say_what_gives_their_format_some(tiny_processor, tmp_path):
    folder = prepared(
        [{"conversations": [{"from": "human", "value": "a"}]}], tmp_path / "set", tiny_processor
    )
    with pytest.raises(BadDataError, match=r"Targets are the assistant's turns: check roles"):
        CPTDataset(str(folder), tiny_processor, **PLANNED)


@pytest.mark.parametrize("count", ["3", None, True, [1]])
def test_counts_that_are_none_are_reported(whole, tmp_path, count):
    shutil.copytree(whole, tmp_path / "set")
    about = json.loads((whole / "prepared.json").read_text()) | {"not_read": {"source": count}}
    (tmp_path / "set/prepared.json").write_text(json.dumps(about))
    with pytest.raises(DocumentError, match=r"prepared\.json is not as .* its value is of another type"):
        PreparedRows(str(tmp_path / "set"))


def test_pixels_of_another_document_are_the_same(rows, whole, tiny_processor):
    expected = CPTDataset(rows, tiny_processor, **PLANNED).with_pixels_of("next_document")
    found = CPTDataset(whole, tiny_processor, **PLANNED).with_pixels_of("next_document")

    assert_equal_datasets(found, expected)


def test_what_check_looks_into_is_the_same(rows, whole, tiny_processor):
    options = PLANNED | {"media_check": "container"}
    expected, found = (CPTDataset(path, tiny_processor, **options) for path in (rows, whole))

    assert found.ledger.as_json() == expected.ledger.as_json()
    assert [(one.line, one.reason) for one in found.ledger.dropped] == [
        (one.line, one.reason) for one in expected.ledger.dropped
    ]


def test_replay_and_shares_are_drawn_the_same(rows, whole, tiny_processor):
    def dataset(one, other):
        return CPTDataset(
            [{"path": str(one), "name": "a", "share": 0.7}, {"path": str(one), "name": "b", "share": 0.3}],
            tiny_processor,
            replay_data=[{"path": str(other), "name": "old"}],
            replay_share=0.2,
            seed=3,
            **PLANNED,
        )

    expected = dataset(rows, rows)

    assert expected.ledger.total.documents["repeats"] and expected.ledger.total.documents["not_drawn"]
    assert_equal_datasets(dataset(whole, whole), expected)
    assert_equal_datasets(dataset(rows, whole), expected)


def test_training_needs_neither_rows_nor_media(rows, tiny_processor, tmp_path):
    folder = tmp_path / "moved"
    for path in rows.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    expected = CPTDataset(tmp_path / "train.jsonl", tiny_processor, **PLANNED)
    items = [expected[number] for number in range(len(expected))]
    prepared(tmp_path / "train.jsonl", folder, tiny_processor)
    for path in rows.parent.iterdir():
        (tmp_path / path.name).unlink()

    found = CPTDataset(folder, tiny_processor, **PLANNED)

    for number, item in enumerate(items):
        for one, other in zip(found[number], item, strict=True):
            assert (one.pixel_values is None) == (other.pixel_values is None)
            if other.pixel_values is not None:
                assert torch.equal(one.pixel_values, other.pixel_values)


def test_a_row_is_named_as_before(whole):
    source = opened(whole)

    with pytest.raises(DocumentError, match=r"train\.jsonl:9: id open: text, character 0: .*not closed"):
        source.document(8)
    assert source.name == "train"
    assert source.document(0).name == "first"
    assert source.document(1).name.endswith("train.jsonl:2")


def test_each_row_of_the_source_is_one_row_of_the_shards(rows, whole):
    tables = shard_tables(whole)

    assert [len(table) for table in tables] == [10, 10, 10, 8]
    about = [json.loads(one) for one in pa.concat_tables(tables).column("about").to_pylist()]
    assert [one["source"]["line"] for one in about] == [
        opened(rows).rows.source(number).line for number in range(38)
    ]


def test_several_processes_write_the_same_shards(rows, whole, tiny_processor, tmp_path):
    found = prepared(rows, tmp_path / "train", tiny_processor, num_proc=2)

    for path in whole.glob("*.parquet"):
        assert (found / path.name).read_bytes() == path.read_bytes()
    assert (found / "prepared.json").read_bytes() == (whole / "prepared.json").read_bytes()


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine, which takes about 20 seconds to start."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.usefixtures("cluster")
def test_ray_writes_the_same_shards(rows, whole, tiny_processor, tmp_path):
    found = prepared(rows, tmp_path / "train", tiny_processor, engine="ray")
    with pytest.raises(DocumentError, match=r"train\.jsonl:9: id open"):
        prepared(rows, tmp_path / "other", tiny_processor, engine="ray", stops=True)

    for path in whole.glob("*.parquet"):
        assert (found / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("engines", [("ray", "ray"), ("local", "ray"), ("ray", "local")], ids=str)
def test_either_engine_goes_on_where_one_was_stopped(
    rows, whole, tiny_processor, tmp_path, monkeypatch, engines
):
    def stopped(write, shards, **how):
        yield from _write_shards(write, shards[1:3], **how)
        raise KeyboardInterrupt

    folder = tmp_path / "train"
    with monkeypatch.context() as patch:
        patch.setattr("vlcpt.data.prepared.write._write_shards", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepared(rows, folder, tiny_processor, engine=engines[0])
    before = {path: path.stat().st_mtime_ns for path in folder.glob("0*.parquet")}
    assert sorted(path.name for path in before) == ["00001.parquet", "00002.parquet"]

    prepared(rows, folder, tiny_processor, engine=engines[1])

    assert {path: path.stat().st_mtime_ns for path in before} == before  # not written again
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())
    for path in whole.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_it_is_read_from_an_address(rows, whole, tiny_processor, scheme, tmp_path):
    address = "memory://bucket/set" if scheme == "memory" else f"file://{tmp_path}/set"
    files, root = fsspec.url_to_fs(address)
    files.put(str(whole), root, recursive=True)

    found = CPTDataset(address, tiny_processor, **PLANNED)

    assert list(found.ledger.sources) == ["train"]
    assert_equal_datasets(found, CPTDataset(rows, tiny_processor, **PLANNED))


def test_a_loader_s_workers_open_it_themselves(whole, tiny_processor):
    dataset = CPTDataset(whole, tiny_processor, **PLANNED)

    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=2, collate_fn=list, multiprocessing_context="fork"
    )

    for number, item in enumerate(loader):
        assert [len(sample) for sample in item] == [len(sample) for sample in dataset[number]]


@pytest.mark.slow
def test_a_killed_prepare_goes_on_without_a_document_twice_or_missing(rows, whole, tiny_processor, tmp_path):
    """About 10 seconds: a process that imports transformers."""
    folder, last = tmp_path / "train", tmp_path / "train" / "00001.parquet"
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "import vlcpt.data.prepared.write as module\n"
        "from tests.data.prepared.test_write import prepared\n"
        "from vlcpt import load_processor\n"
        "module.SHARD_ROWS, module.GROUP_BYTES = (10, 8192), 3000\n"
        "made = module.document_row\n"
        "module.document_row = lambda *parts: (time.sleep(0.1), made(*parts))[1]\n"
        "prepared(Path(sys.argv[1]), Path(sys.argv[2]), load_processor(sys.argv[3]))\n"
    )
    command = [sys.executable, "-c", script, str(rows), str(folder), tiny_processor.tokenizer.name_or_path]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[3])
    wait_for(lambda: last.exists() and any(folder.glob(".*.partial")), 100)  # amid the third shard
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("0*.parquet")}
    assert len(before) in (2, 3)
    with pytest.raises(DocumentError, match=r"not prepared to its end\. Run the same vlcpt prepare again"):
        CPTDataset(folder, tiny_processor, **PLANNED)

    prepared(rows, folder, tiny_processor)

    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before  # not written again
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())
    for path in whole.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("left", [0, 9, 1000], ids=str)
def test_a_shard_that_was_cut_is_written_again_when_preparing_goes_on(
    rows, whole, tiny_processor, tmp_path, left
):
    folder = tmp_path / "train"
    shutil.copytree(whole, folder)
    (folder / "prepared.json").rename(folder / "preparing.json")
    os.truncate(folder / "00001.parquet", left)

    prepared(rows, folder, tiny_processor)

    for path in whole.iterdir():
        if path.suffix == ".parquet":
            assert (folder / path.name).read_bytes() == path.read_bytes()


def test_a_shard_that_was_cut_afterwards_names_the_option_that_mends_it(
    rows, whole, tiny_processor, tmp_path
):
    folder = tmp_path / "train"
    shutil.copytree(whole, folder)
    os.truncate(folder / "00001.parquet", 1000)

    with pytest.raises(DocumentError, match=r"or run vlcpt prepare again with --overwrite\."):
        CPTDataset(folder, tiny_processor, **PLANNED)


def test_what_is_whole_is_left_alone(rows, whole, tiny_processor):
    before = (whole / "prepared.json").stat().st_mtime_ns

    prepared(rows, whole, tiny_processor)

    assert (whole / "prepared.json").stat().st_mtime_ns == before


def test_other_options_cannot_go_on(rows, whole, tiny_processor):
    told = r"begun from other data or options \(max_pixels: 3136 then, 784 now\). Give another folder"
    with pytest.raises(DocumentError, match=told):
        prepared(rows, whole, tiny_processor, options={**OPTIONS, "max_pixels": 784})


def test_changed_rows_cannot_go_on(rows, whole, tiny_processor, tmp_path):
    with pytest.raises(DocumentError, match=r"rows: 38 then, 1 now; the rows or their files were changed"):
        prepared([{"text": "a"}], whole, tiny_processor)


def test_a_folder_of_something_else_is_refused(rows, tiny_processor, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(DocumentError, match=r"not empty, and holds nothing that was prepared\. Give another"):
        prepared(rows, tmp_path, tiny_processor)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"max_pixels": 784}, "max_pixels: 3136 then, 784 now"),
        ({"untagged": "mask"}, 'untagged: "train" then, "mask" now'),
        ({"train_eos": "never"}, 'train_eos: "auto" then, "never" now'),
        ({"fps": 1.0, "max_frames": 4}, "fps: 2.0 then, 1.0 now; max_frames: 8 then, 4 now"),
    ],
    ids=["max_pixels", "untagged", "train_eos", "two"],
)
def test_a_run_with_other_options_names_them(whole, tiny_processor, setting, told):
    with pytest.raises(DocumentError) as error:
        CPTDataset(whole, tiny_processor, **{**PLANNED, **setting})

    assert told in str(error.value)
    assert "Set the configuration as it was, or run vlcpt prepare again" in str(error.value)


def test_another_tokenizer_is_named(whole, real_processor):
    with pytest.raises(DocumentError, match=r"\(the tokenizer is another one\)"):
        CPTDataset(whole, real_processor, **PLANNED)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"format": "messages"}, "format 'messages' does not apply: it was prepared with format 'vlcpt'"),
        ({"targets": "all"}, "targets 'all' does not apply: it was prepared with no targets"),
        ({"media_root": "."}, "media_root '.' does not apply"),
        ({"split": "train"}, "split 'train' does not apply"),
    ],
    ids=["format", "targets", "media_root", "split"],
)
def test_what_was_decided_cannot_be_decided_again(whole, options, told):
    with pytest.raises(DocumentError) as error:
        opened(whole, **options)

    assert told in str(error.value)


def test_a_damaged_file_is_reported(whole, tmp_path):
    name = "00001.parquet"
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = bytearray((tmp_path / name).read_bytes())

    (tmp_path / name).write_bytes(content[:-1])
    with pytest.raises(DocumentError, match=f"{name} is not as it was prepared .*Copy it again"):
        opened(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DocumentError, match=rf"{name} is not as it was prepared \(it is missing\)"):
        opened(tmp_path)
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DocumentError, match=rf"{name} is not as it was prepared \(row group \d .*CRC"):
        [opened(tmp_path).rows.row(number) for number in range(10, 18)]


def test_no_changed_byte_gives_another_document_or_a_crash(whole, tiny_processor, tmp_path):
    """Each time two bytes of a shard are changed: of its pages, of what lies between them, or of its end."""
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content, rng = (whole / "00000.parquet").read_bytes(), np.random.default_rng(0)
    encoder = DocumentEncoder(tiny_processor, EncodingOptions(**OPTIONS))
    expected = [stream_or_error(encoder, PreparedRows(str(whole)), number) for number in range(10)]
    reported = 0
    for _ in range(200):
        forged = bytearray(content)
        for place in rng.integers(0, len(content), 2):
            forged[place] ^= rng.integers(1, 256)
        (tmp_path / "00000.parquet").write_bytes(forged)
        for number in range(10):
            found = stream_or_error(encoder, PreparedRows(str(tmp_path)), number)
            if isinstance(found, str) and found != expected[number]:
                assert "is not as " in found  # it was prepared, or vlcpt prepares it
                reported += 1
            else:
                assert found == expected[number]

    assert reported > 200


def stream_or_error(encoder, rows, number):
    try:
        stream = encoder.tokens(rows.row(number))
    except DocumentError as error:
        return str(error)
    return stream.checksum, [placed.medium.data for placed in stream.media]


def test_a_bad_row_stops_it_by_its_name(rows, tiny_processor, tmp_path):
    with pytest.raises(DocumentError, match=r"train\.jsonl:9: id open: text"):
        prepared(rows, tmp_path / "train", tiny_processor, stops=True)

    assert not (tmp_path / "train" / "prepared.json").exists()


def test_a_hundred_bad_rows_on_end_stop_it(tiny_processor, tmp_path, monkeypatch):
    monkeypatch.setattr("vlcpt.data.prepared.write.SHARD_ROWS", (512, 8192))
    with pytest.raises(BadDataError, match="100 unusable rows in a row, the last: rows:101"):
        prepared([{"text": "a"}] + [{"text": 1}] * 300, tmp_path / "train", tiny_processor)


def test_a_run_that_takes_no_bad_row_stops_at_the_same(rows, whole, tiny_processor):
    errors = []
    for path in (rows, whole):
        with pytest.raises(DocumentError) as error:
            CPTDataset(path, tiny_processor, **{**PLANNED, "on_bad_data": "error"})
        errors.append(str(error.value))

    assert errors[0] == errors[1]


def test_progress_counts_the_shards(rows, tiny_processor, tmp_path):
    seen = []

    def track(sequence, description):
        for one in sequence:
            seen.append((description, len(sequence), one))
            yield one

    prepared(rows, tmp_path / "train", tiny_processor, track=track)

    assert seen == [("encoding train", 4, number) for number in range(4)]


def test_nothing_in_it_is_a_pickle(whole):
    for path in whole.iterdir():
        content = path.read_bytes()
        assert content.startswith(b"PAR1") if path.suffix == ".parquet" else json.loads(content)
    assert pq.read_schema(whole / "00000.parquet") == SCHEMA


def test_its_rows_go_to_another_process_as_a_path(whole):
    rows = PreparedRows(str(whole))

    assert rows.__reduce__() == (PreparedRows, (str(whole),))
    assert rows.index(range(4)).shape == rows.index(range(9)).shape == (38,)
    assert rows.index(range(1, 2)).shape == (10,)


def test_a_plan_is_made_again_when_files_were_written_over(tiny_processor, tmp_path):
    sets = {}
    for name, text in {"old": "three times red", "new": "nine times blue and green"}.items():
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": f"{text} {number}"}) + "\n" for number in range(12)))
        sets[name] = prepared(source, tmp_path / name, tiny_processor)
    expected = CPTDataset(sets["new"], tiny_processor, **PLANNED)
    CPTDataset(sets["old"], tiny_processor, **PLANNED, cache_dir=tmp_path / "plan")
    changed = sets["old"].stat().st_mtime_ns
    for path in sets["new"].iterdir():  # as cp does
        (sets["old"] / path.name).write_bytes(path.read_bytes())
    assert sets["old"].stat().st_mtime_ns == changed  # or the folder would say it

    found = CPTDataset(sets["old"], tiny_processor, **PLANNED, cache_dir=tmp_path / "plan")
    assert found.digest == expected.digest


def test_a_plan_of_an_address_is_made_again(tiny_processor, tmp_path):
    memory, digests = fsspec.filesystem("memory"), []
    for text in ("three times red", "nine times blue and green"):
        source = tmp_path / "rows.jsonl"
        source.write_text(json.dumps({"text": text}) + "\n")
        folder = prepared(source, tmp_path / text, tiny_processor)
        memory.put(f"{folder}/", "/again/", recursive=True)
        plans = tmp_path / "plan"
        digests.append(CPTDataset("memory://again", tiny_processor, **PLANNED, cache_dir=plans).digest)
        assert digests[-1] == CPTDataset(folder, tiny_processor, **PLANNED).digest


def test_a_damaged_shard_of_an_interrupted_preparation_is_named(rows, whole, tiny_processor, tmp_path):
    folder = tmp_path / "train"
    shutil.copytree(whole, folder)
    (folder / "prepared.json").rename(folder / "preparing.json")
    shard = folder / "00001.parquet"
    group = pq.read_metadata(shard).row_group(0)
    (column,) = (
        found
        for number in range(group.num_columns)
        if (found := group.column(number)).path_in_schema == "numbers"
    )
    content = bytearray(shard.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 1] ^= 1  # a count is another
    shard.write_bytes(content)

    with pytest.raises(DocumentError, match=r"00001\.parquet is damaged .*Delete this file\. Then start it"):
        prepared(rows, folder, tiny_processor)
    shard.unlink()
    assert_equal_datasets(
        CPTDataset(prepared(rows, folder, tiny_processor), tiny_processor, **PLANNED),
        CPTDataset(whole, tiny_processor, **PLANNED),
    )
