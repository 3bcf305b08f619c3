"""Pieces of work in a folder: each is one process's, and none is lost when a process or the folder is."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import wait_for
from vlcpt.data.plan import pieces
from vlcpt.data.plan.pieces import LONG_AGO, SharedWork, remove_work, unused_for


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "work"


@pytest.fixture
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(pieces, "RENEWED", 0.05)
    monkeypatch.setattr(pieces, "ABANDONED", 1.0)


def claimed_by(folder: Path, owner: str, number: int = 0) -> Path:
    folder.mkdir()
    path = folder / f"{number:05d}.claim"
    path.write_text(owner)
    return path


def test_a_piece_is_claimed_once(folder):
    with SharedWork(folder) as one, SharedWork(folder) as other:
        assert [one.claim(0), other.claim(0), other.claim(1), one.claim(1)] == [True, False, True, False]


def test_a_released_piece_is_free(folder):
    with SharedWork(folder) as one, SharedWork(folder) as other:
        one.claim(0)
        one.release(0)
        assert other.claim(0)


def test_leaving_frees_what_was_claimed(folder):
    with SharedWork(folder) as one:
        one.claim(0)
    with SharedWork(folder) as other:
        assert other.claim(0)


def test_a_stored_result_is_there_for_all_and_its_piece_is_released(folder):
    with SharedWork(folder) as one, SharedWork(folder) as other:
        one.claim(7)
        assert other.get(7) is None
        one.put(7, b"result")
        assert other.get(7) == b"result"
        assert [path.name for path in folder.iterdir()] == ["00007.scan"]


@pytest.mark.parametrize("place", [0, 20, -1])
def test_a_damaged_result_is_none(folder, place):
    with SharedWork(folder) as work:
        work.put(0, b"result" * 10)
        stored = bytearray((folder / "00000.scan").read_bytes())
        stored[place] ^= 1
        (folder / "00000.scan").write_bytes(stored)
        assert work.get(0) is None
        (folder / "00000.scan").write_bytes(stored[:9])
        assert work.get(0) is None
        work.put(0, b"again")
        assert work.get(0) == b"again"


def test_a_dead_process_s_piece_is_free_at_once(folder):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    claimed_by(folder, f"{socket.gethostname()} {dead.pid}")
    with SharedWork(folder) as work:
        assert work.claim(0)


def test_a_silent_piece_of_another_machine_is_free_after_a_while(folder, impatient):
    claimed_by(folder, "elsewhere 1")
    with SharedWork(folder) as work:
        assert not work.claim(0)
        wait_for(lambda: work.claim(0))


def test_a_piece_that_another_process_is_at_stays_its_own(folder, impatient, monkeypatch):
    with SharedWork(folder) as one:
        one.claim(0)
        monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
        with SharedWork(folder) as other:
            end = time.monotonic() + 2.0  # twice what a silent one has
            while time.monotonic() < end:
                assert not other.claim(0)
                time.sleep(0.05)


def test_a_claim_of_long_ago_is_free_at_once(folder):
    path = claimed_by(folder, "elsewhere 1")
    os.utime(path, (time.time() - LONG_AGO - 1,) * 2)
    with SharedWork(folder) as work:
        assert work.claim(0)


def test_a_folder_that_cannot_be_made_only_costs_the_sharing(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    with SharedWork(tmp_path / "file" / "work") as one, SharedWork(tmp_path / "file" / "work") as other:
        assert one.claim(0)
        assert other.claim(0)
        one.put(0, b"result")
        assert one.get(0) is None
    assert caplog.text.count("00000.claim (what reading the data gave, for other processes") == 2  # once each
    assert caplog.text.count("could not be written: Not a directory") == 2


def test_a_folder_that_is_deleted_meanwhile_is_made_again(folder):
    with SharedWork(folder) as work:
        work.claim(0)
        remove_work(folder)
        assert not folder.exists()
        work.put(0, b"result")
        assert work.get(0) == b"result"


def test_the_first_piece_that_stops_is_the_last_wanted(folder):
    with SharedWork(folder) as one, SharedWork(folder) as other:
        assert one.last_wanted() is None
        one.claim(5)
        one.stop_after(5)
        other.stop_after(9)
        assert other.last_wanted() == 5
        assert other.claim(5)
        other.stop_after(3)
        assert one.last_wanted() == 3
        one.go_on()
        assert other.last_wanted() is None


def test_removing_leaves_what_is_not_its_own(folder):
    with SharedWork(folder) as work:
        work.put(0, b"result")
        work.stop_after(1)
        (folder / ".1-ab.partial").write_bytes(b"cut")
        (folder / "notes.txt").write_text("mine")
        remove_work(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert unused_for(folder) < 60
