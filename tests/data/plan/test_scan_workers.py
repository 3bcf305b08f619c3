"""Tests of the workers of vlcpt/data/plan/scan.py that end or stop, also those of ``vlcpt prepare``."""

import json
import multiprocessing
import os
import signal
from functools import partial
from pathlib import Path

import pytest
from torch.utils.data import get_worker_info

from tests.support import opened
from vlcpt import CPTDataset
from vlcpt.data.documents import DocumentError
from vlcpt.data.encode.encoder import DocumentEncoder
from vlcpt.data.encode.vision import EncodingOptions
from vlcpt.data.plan import scan
from vlcpt.data.prepared import write
from vlcpt.data.prepared.fingerprint import fingerprint
from vlcpt.data.workers import LoadingError

HOW = [
    (signal.SIGKILL, r"was killed \(SIGKILL\)"),
    (signal.SIGSTOP, r"timed out after 2 seconds .*: stopped"),
]


@pytest.fixture
def rows(tmp_path):
    """A file of 40 rows, which are read in pieces of 4."""
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": f"one {number}"}) + "\n" for number in range(40)))
    return path


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(scan, "PIECE_ROWS", 4)
    monkeypatch.setattr(scan, "WORTH_WORKERS", 0.0)
    monkeypatch.setattr(write, "SHARD_ROWS", (4, 8))


def struck(original, number):
    """What a worker calls: the second one gets a signal there."""

    def call(*args, **kwargs):
        worker = get_worker_info()
        if worker is not None and worker.id == 1:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    return call


@pytest.mark.parametrize(("number", "message"), HOW)
@pytest.mark.parametrize("cached", [True, False])
def test_a_worker_of_planning_that_ends_or_stops_is_named_with_its_row(
    rows, tiny_processor, tmp_path, monkeypatch, number, message, cached
):
    cache = tmp_path / "plan" if cached else None
    options = {"max_length": 64, "num_proc": 2, "timeout": 2, "cache_dir": cache}
    before = multiprocessing.active_children()
    with monkeypatch.context() as patch:
        patch.setattr(scan, "split_stream", struck(scan.split_stream, number))
        with pytest.raises(LoadingError, match=rf"{message}.*worker 1 .*was reading .*train\.jsonl:\d"):
            CPTDataset(rows, tiny_processor, **options)
    assert [one for one in multiprocessing.active_children() if one not in before] == []

    again = CPTDataset(rows, tiny_processor, **options)
    assert again.digest == CPTDataset(rows, tiny_processor, max_length=64).digest


def prepared(rows: Path, folder: Path, processor, num_proc: int = 2) -> None:
    write.prepare_source(
        opened(rows),
        partial(DocumentEncoder, processor),
        folder,
        fingerprint=fingerprint(processor, "train", EncodingOptions()),
        num_proc=num_proc,
        timeout=2,
    )


@pytest.mark.parametrize(("number", "message"), HOW)
def test_a_worker_of_prepare_that_ends_or_stops_leaves_what_the_same_command_goes_on_with(
    rows, tiny_processor, tmp_path, monkeypatch, number, message
):
    prepared(rows, tmp_path / "here", tiny_processor, num_proc=0)  # imports what would take workers seconds
    before = multiprocessing.active_children()
    with monkeypatch.context() as patch:
        patch.setattr(write, "document_row", struck(write.document_row, number))
        with pytest.raises(
            LoadingError, match=rf"{message}.*worker 1 .*reading .*train\.jsonl:\d.* goes on where"
        ):
            prepared(rows, tmp_path / "set", tiny_processor)
    assert [one for one in multiprocessing.active_children() if one not in before] == []
    assert not list((tmp_path / "set").glob(".*.partial"))

    prepared(rows, tmp_path / "set", tiny_processor)
    assert len(CPTDataset(tmp_path / "set", tiny_processor, max_length=64, packing=False)) == 40


def test_a_row_that_cannot_be_used_stops_prepare_with_its_own_message_in_workers_too(
    rows, tiny_processor, tmp_path
):
    with rows.open("a") as file:
        file.write('{"text": 3}\n')
    with pytest.raises(DocumentError, match=r"^.*train\.jsonl:41: text") as raised:
        prepared(rows, tmp_path / "set", tiny_processor)
    assert "Traceback" not in str(raised.value)
    assert "Caught" not in str(raised.value)
