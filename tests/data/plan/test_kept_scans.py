"""One plan, whoever makes it: alone, several at once, after a kill, or from what was read before."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import datasets
import pytest

from tests.support import digits, png, wait_for
from vlcpt import CPTDataset, DocumentError
from vlcpt.data.plan import scan
from vlcpt.data.plan.kept_scans import LONG_AGO, remove_plans
from vlcpt.data.plan.ledger import BadDataError
from vlcpt.data.sources import DocumentSource
from vlcpt.file_writes import WriteError

ROWS = 90
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(scan, "PIECE_ROWS", 4)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Documents of many lengths, some split, untagged, without a target, bad, or with a broken image."""
    (tmp_path / "a.png").write_bytes(png(0, 56, 84))
    (tmp_path / "b.png").write_bytes(b"no image")
    rows: list[dict[str, object]] = []
    for number in range(ROWS):
        text = f"say <trainable_text>{digits(number, number)}</trainable_text> a"
        rows.append({"text": text, "id": f"row {number}"})
    rows[7] = {"text": "<image><trainable_text>one</trainable_text>", "images": ["a.png"]}
    rows[11] = {"text": "<image><trainable_text>two</trainable_text>", "images": ["b.png"]}
    rows[12] = {"text": "</trainable_text>"}
    rows[40] = {"text": "<trainable_text></trainable_text>b"}
    rows[41] = {"text": "no tag"}
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Reading:
    """How long reading a row takes beyond what it takes."""

    seconds = 0.0


@pytest.fixture
def notes(tmp_path: Path, monkeypatch) -> Path:
    """A file with the line of each row that is read, whatever process reads it."""
    path = tmp_path / "notes"
    path.touch()
    read = DocumentSource.document

    def document(source, number):
        with path.open("a") as file:
            file.write(f"{source.rows.source(number).line}\n")
        time.sleep(Reading.seconds)
        return read(source, number)

    monkeypatch.setattr(DocumentSource, "document", document)
    return path


def lines_read(notes: Path) -> list[int]:
    """The lines that were read since the last look."""
    found = sorted(int(line) for line in notes.read_text().split())
    notes.write_text("")
    return found


ALL = list(range(1, ROWS + 1))


def make(data, processor, cache_dir=None, **options):
    options = {"max_length": 64, "on_bad_data": "skip", "max_bad_fraction": 0.1} | options
    return CPTDataset(data, processor, cache_dir=cache_dir, **options)


def plan_of(dataset: CPTDataset) -> dict[str, object]:
    """All that a plan says."""
    dropped = [vars(one) for one in dataset.ledger.dropped]
    return {"digest": dataset.digest, "ledger": dataset.ledger.as_json(), "dropped": dropped}


def start(data, processor, cache_dir, result: Path, **options):
    """A process that plans and writes what came of it."""

    def work() -> None:
        try:
            found = plan_of(make(data, processor, cache_dir, **options))
        except (DocumentError, BadDataError) as error:
            found = {"error": str(error)}
        result.write_text(json.dumps(found))

    process = FORK.Process(target=work)
    process.start()
    return process


def together(count, data, processor, cache_dir, folder, **options):
    """What each of several processes found that planned at the same time."""
    results = [folder / f"result {number}" for number in range(count)]
    processes = [start(data, processor, cache_dir, result, **options) for result in results]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [json.loads(result.read_text()) for result in results]


def test_the_plan_is_not_trivial(data, tiny_processor, notes):
    total = make(data, tiny_processor).ledger.total
    assert total.dropped_documents == {"medium": 1, "markup": 1, "without_targets": 2}
    assert total.documents["split"] > 10
    assert lines_read(notes) == ALL


def test_a_plan_with_a_folder_is_the_plan_without(data, tiny_processor, tmp_path, notes):
    alone = plan_of(make(data, tiny_processor))
    assert plan_of(make(data, tiny_processor, tmp_path / "plan")) == alone


def test_a_second_start_reads_no_row(data, tiny_processor, tmp_path, notes):
    first = plan_of(make(data, tiny_processor, tmp_path / "plan"))
    assert lines_read(notes) == ALL
    again = make(data, tiny_processor, tmp_path / "plan")
    assert lines_read(notes) == []
    assert plan_of(again) == first
    assert [len(sample) for sample in again[0]]  # its items are read as ever


def test_one_of_several_processes_reads_and_all_have_one_plan(
    data, tiny_processor, tmp_path, notes, monkeypatch
):
    alone = plan_of(make(data, tiny_processor))
    lines_read(notes)
    monkeypatch.setattr(Reading, "seconds", 0.005)
    found = together(3, data, tiny_processor, tmp_path / "plan", tmp_path)
    assert [one["digest"] for one in found] == [alone["digest"]] * 3
    assert found == [json.loads(json.dumps(alone))] * 3
    assert lines_read(notes) == ALL


def test_workers_change_nothing(data, tiny_processor, tmp_path, notes, monkeypatch):
    monkeypatch.setattr(scan, "WORTH_WORKERS", 0.0)
    alone = plan_of(make(data, tiny_processor))
    for number, cache_dir in enumerate((None, tmp_path / "plan", tmp_path / "plan")):
        lines_read(notes)
        assert plan_of(make(data, tiny_processor, cache_dir, num_proc=2)) == alone
        assert lines_read(notes) == (ALL if number < 2 else [])


def test_a_killed_planning_leaves_nothing_that_is_taken_for_a_plan(
    data, tiny_processor, tmp_path, notes, monkeypatch
):
    alone = plan_of(make(data, tiny_processor))
    monkeypatch.setattr(Reading, "seconds", 0.01)
    process = start(data, tiny_processor, tmp_path / "plan", tmp_path / "result")
    wait_for(lambda: len(notes.read_text().split()) > ROWS + 10)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not list(tmp_path.glob("plan/*.scan"))
    lines_read(notes)
    assert plan_of(make(data, tiny_processor, tmp_path / "plan")) == alone
    assert lines_read(notes) == ALL
    assert [path.suffix for path in (tmp_path / "plan").iterdir()] == [".scan"]


def test_another_process_reads_when_the_one_that_reads_is_killed(
    data, tiny_processor, tmp_path, notes, monkeypatch
):
    alone = json.loads(json.dumps(plan_of(make(data, tiny_processor))))
    lines_read(notes)
    monkeypatch.setattr(Reading, "seconds", 0.01)
    results = [tmp_path / f"result {number}" for number in range(3)]
    first = start(data, tiny_processor, tmp_path / "plan", results[0])
    wait_for(lambda: len(notes.read_text().split()) > 10)
    others = [start(data, tiny_processor, tmp_path / "plan", result) for result in results[1:]]
    time.sleep(0.3)
    os.kill(first.pid, signal.SIGKILL)
    for process in [first, *others]:
        process.join(60)
    assert [json.loads(result.read_text()) for result in results[1:]] == [alone] * 2
    assert len(lines_read(notes)) < 2 * ROWS  # only one of them read all


def test_a_folder_that_cannot_be_written_costs_only_the_sharing(data, tiny_processor, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    found = plan_of(make(data, tiny_processor, tmp_path / "file" / "plan"))
    assert found == plan_of(make(data, tiny_processor))
    assert caplog.text.count("each process and each start reads the data itself") == 1


@pytest.mark.parametrize("place", [0, 2000, -100, -20, -1])
@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "all gone"])
def test_what_is_damaged_or_deleted_is_read_again(data, tiny_processor, tmp_path, notes, damage, place):
    first = plan_of(make(data, tiny_processor, tmp_path / "plan"))
    lines_read(notes)
    (file,) = tmp_path.glob("plan/*.scan")
    content = bytearray(file.read_bytes())
    content[place] ^= 255
    if damage == "all gone":
        shutil.rmtree(tmp_path / "plan")
    else:
        file.write_bytes({"cut": content[:place], "empty": b"", "flipped": bytes(content)}[damage])
    assert plan_of(make(data, tiny_processor, tmp_path / "plan")) == first
    assert lines_read(notes) == ALL
    make(data, tiny_processor, tmp_path / "plan")
    assert lines_read(notes) == []


def test_a_changed_file_is_read_again_and_what_was_read_before_is_deleted(
    data, tiny_processor, tmp_path, notes
):
    make(data, tiny_processor, tmp_path / "plan")
    (old,) = (tmp_path / "plan").iterdir()
    lines_read(notes)
    data.write_text(data.read_text().replace("say", "tell", 1))
    make(data, tiny_processor, tmp_path / "plan")
    assert lines_read(notes) == ALL
    assert old.exists()  # so new that another machine, with other times of files, may be at it
    os.utime(old, (time.time() - LONG_AGO - 1,) * 2)
    make(data, tiny_processor, tmp_path / "plan")
    assert lines_read(notes) == []
    assert len(list((tmp_path / "plan").iterdir())) == 1
    assert not old.exists()


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ({}, {"max_length": 65}),
        ({}, {"on_overlong": "drop"}),
        ({}, {"train_eos": "never"}),
        ({}, {"max_pixels": 56 * 28}),
        ({}, {"untagged": "mask"}),
        ({}, {"on_bad_data": "error"}),
        ({}, {"media_check": "container"}),
        ({"format": "caption"}, {"max_bad_fraction": 1.0}),
        ({"media_root": "."}, {}),
    ],
    ids=str,
)
def test_whatever_reading_depends_on_reads_again(data, tiny_processor, tmp_path, notes, source, options):
    make(data, tiny_processor, tmp_path / "plan")
    (first,) = (tmp_path / "plan").iterdir()
    before = first.stat().st_mtime_ns

    try:
        make({"path": data, **source}, tiny_processor, tmp_path / "plan", **options)
    except (DocumentError, BadDataError):
        assert options.get("on_bad_data") == "error" or source

    stops = options.get("on_bad_data") == "error"
    assert len(set((tmp_path / "plan").iterdir()) - {first}) == (0 if stops else 1)
    assert first.stat().st_mtime_ns == before


@pytest.mark.parametrize("option", [{"seed": 1}, {"packing": False}, {"max_bad_fraction": 0.5}], ids=str)
def test_what_reading_does_not_depend_on_reads_nothing_again(data, tiny_processor, tmp_path, notes, option):
    make(data, tiny_processor, tmp_path / "plan")
    lines_read(notes)
    assert plan_of(make(data, tiny_processor, tmp_path / "plan", **option)) == plan_of(
        make(data, tiny_processor, **option)
    )
    assert lines_read(notes) == ALL  # of the one without a folder


def test_an_error_stops_each_process_with_the_first_one_in_order(
    data, tiny_processor, tmp_path, notes, monkeypatch
):
    with pytest.raises(DocumentError, match=r"train\.jsonl:12: images: b\.png") as raised:
        make(data, tiny_processor, on_bad_data="error")
    lines_read(notes)
    monkeypatch.setattr(Reading, "seconds", 0.01)
    found = together(3, data, tiny_processor, tmp_path / "plan", tmp_path, on_bad_data="error")
    assert found == [{"error": str(raised.value)}] * 3
    assert max(lines_read(notes)) < ROWS  # the rest was not read


def test_too_many_bad_rows_stop_each_process_with_the_same_message(
    data, tiny_processor, tmp_path, notes, monkeypatch
):
    with pytest.raises(BadDataError) as raised:
        make(data, tiny_processor, max_bad_fraction=0.01)
    found = together(3, data, tiny_processor, tmp_path / "plan", tmp_path, max_bad_fraction=0.01)
    assert found == [{"error": str(raised.value)}] * 3


@pytest.mark.parametrize("on_bad_data", ["error", "skip"])
def test_a_medium_that_was_put_right_is_seen(data, tiny_processor, tmp_path, notes, on_bad_data):
    data.write_text("".join(line for line in data.open() if json.loads(line)["text"] != "</trainable_text>"))
    options = {"on_bad_data": on_bad_data, "max_bad_fraction": 0.0}
    with pytest.raises((DocumentError, BadDataError), match=r"train\.jsonl:12: images: b\.png"):
        make(data, tiny_processor, tmp_path / "plan", **options)
    lines_read(notes)
    (data.parent / "b.png").write_bytes(png(0))
    assert make(data, tiny_processor, tmp_path / "plan", **options).ledger.total.documents["used"] == 87
    assert lines_read(notes) == list(range(1, 90))


def test_what_is_kept_names_no_folder_that_the_user_did_not_write(
    data, tiny_processor, tmp_path, notes, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("rows").mkdir()
    data.rename("rows/train.jsonl")
    make("rows/train.jsonl", tiny_processor, "plan")
    (file,) = Path("plan").iterdir()
    kept = file.read_bytes()
    assert b'"b.png"' in kept  # its state is there, or nothing is shown here
    assert str(tmp_path).encode() not in kept


def test_a_dataset_in_memory_is_known_by_its_fingerprint_and_plain_rows_are_not(
    tiny_processor, tmp_path, notes
):
    rows = [{"text": f"a <trainable_text>{number}</trainable_text>"} for number in range(20)]
    make(datasets.Dataset.from_list(rows), tiny_processor, tmp_path / "plan")
    assert len(lines_read(notes)) == 20
    make(datasets.Dataset.from_list(rows), tiny_processor, tmp_path / "plan")
    assert len(lines_read(notes)) == 0
    make(datasets.Dataset.from_list(rows[1:]), tiny_processor, tmp_path / "plan")
    assert len(lines_read(notes)) == 19
    for _ in range(2):
        make(rows, tiny_processor, tmp_path / "other")
        assert len(lines_read(notes)) == 20
    assert not (tmp_path / "other").exists()


def test_removing_plans_leaves_what_is_not_theirs(data, tiny_processor, tmp_path, notes):
    make(data, tiny_processor, tmp_path / "plan" / "train")
    (tmp_path / "plan" / "notes").mkdir()
    (tmp_path / "plan" / "notes" / "mine.txt").write_text("mine")
    remove_plans(tmp_path / "plan")
    assert [path.name for path in tmp_path.glob("plan/**/*")] == ["notes", "mine.txt"]
    shutil.rmtree(tmp_path / "plan" / "notes")
    make(data, tiny_processor, tmp_path / "plan" / "train")
    remove_plans(tmp_path / "plan")
    assert not (tmp_path / "plan").exists()


def test_what_reading_itself_raises_is_not_taken_for_a_folder_that_cannot_be_written(
    data, tiny_processor, tmp_path, monkeypatch, caplog
):
    """Its pieces would be asked for a second time, when they were read once already."""

    def read(self, *arguments):
        raise WriteError("the cache of an unpacked file is full")

    monkeypatch.setattr(scan.SourceScanner, "__getitem__", read)
    with pytest.raises(WriteError, match="unpacked file is full"):
        make(data, tiny_processor, tmp_path / "plan")
    assert "each process and each start reads the data itself" not in caplog.text
    assert not list(tmp_path.rglob("*.scan"))
