import json

import pytest

from vlcpt.report.run_record import DROPPED, read_record
from vlcpt.run_files import RECORD


def test_a_folder_without_any_file_of_a_run_says_what_is_missing(tmp_path):
    run = read_record(tmp_path)

    assert [text.split()[0] for text in run.missing] == [
        "train_log.jsonl",
        "ledger.json",
        "config.yaml",
        "run.json",
    ]
    assert (run.steps, run.sets, run.retention, run.results) == (0, [], (), {})


@pytest.mark.parametrize("name", RECORD)
@pytest.mark.parametrize("content", [b"", b'{"a', b"[1, 2]", b"null", b"\xff\x00\xfe", b"- a\n- b\n"])
def test_a_file_that_is_cut_or_holds_something_else_is_no_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)

    assert read_record(tmp_path).name == tmp_path.name


def test_a_log_without_its_last_line_break_is_cut(tmp_path):
    (tmp_path / "train_log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')

    run = read_record(tmp_path)

    assert run.curve("loss") == [(1.0, 2.0)]
    assert "train_log.jsonl is cut: its last line is left out." in run.missing


def test_sets_are_those_with_a_loss_by_their_own_images(tmp_path):
    line = {"step": 0, "eval_a_loss": 1.0, "eval_a_blank_images_loss": 2.0, "eval_a_b_loss": 3.0, "loss": 1}
    (tmp_path / "train_log.jsonl").write_text(json.dumps(line) + "\n")

    assert read_record(tmp_path).sets == ["a", "a_b"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("retention_data: [{path: x/old.jsonl}, {path: b.jsonl, name: chat}]", ("old", "chat")),
        ("retention_data: x/old.jsonl", ("old",)),
        ("retention_data: kept.jsonl.gz", ("kept",)),
        ("retention_data: [org/docs-v1.5, 'shards/*.tar']", ("docs-v1.5", "shards")),
        ("tuning: lora", ()),
    ],
)
def test_retention_sets_are_those_of_the_configuration(tmp_path, text, names):
    (tmp_path / "config.yaml").write_text(text)

    assert read_record(tmp_path).retention == names


def test_of_many_dropped_documents_the_first_are_read(tmp_path):
    (tmp_path / "dropped.jsonl").write_text('{"id": "a"}\n' * 1000)

    assert len(read_record(tmp_path).dropped) == DROPPED
