"""Tests of vlcpt/folder_locks.py: who writes into a folder, and until when."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.processes import holding
from vlcpt import folder_locks
from vlcpt.errors import ConfigError
from vlcpt.folder_locks import LOCK, hold, holder, is_abandoned, require_free


def test_a_second_process_is_refused_and_the_first_named(tmp_path):
    with holding(tmp_path) as (first, _):
        name = f"process {first.pid} on host {socket.gethostname()}"
        assert holder(tmp_path) == name
        with pytest.raises(ConfigError, match=re.escape(f"output_dir {tmp_path} is in use by {name}")):
            hold(tmp_path).__enter__()
        with pytest.raises(ConfigError, match="is in use by"):
            require_free(tmp_path)
        assert holder(tmp_path) == name  # it was not disturbed
    assert first.returncode == 0
    assert not (tmp_path / LOCK).exists()


def test_a_process_that_is_killed_holds_nothing_even_if_its_workers_live_on(tmp_path):
    with holding(tmp_path, "fork") as (first, child):
        try:
            first.send_signal(signal.SIGKILL)
            first.wait()
            os.kill(child, 0)  # or it would be no test
            assert (tmp_path / LOCK).is_file()

            assert holder(tmp_path) is None
            with hold(tmp_path):
                pid = (tmp_path / LOCK).read_text().split()[0]
            assert pid == str(os.getpid())
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_folder_is_abandoned_only_after_its_process_was_killed(tmp_path):
    with holding(tmp_path) as (first, _):
        found = [is_abandoned(tmp_path)]
        first.kill()
        first.wait()
    (tmp_path / LOCK).chmod(0o444)  # as another user's
    found.append(is_abandoned(tmp_path))
    with holding(tmp_path):
        found.append(is_abandoned(tmp_path))
    found.append(is_abandoned(tmp_path))  # it has ended
    with hold(tmp_path):
        found.append(is_abandoned(tmp_path))  # by this process

    assert found == [False, True, False, False, False]


def test_without_locks_nobody_knows_whether_a_folder_is_abandoned(tmp_path, monkeypatch):
    def no_locks(descriptor, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / LOCK).write_text("7 there")
    found = is_abandoned(tmp_path)
    monkeypatch.setattr(fcntl, "lockf", no_locks)

    assert (found, is_abandoned(tmp_path)) == (True, False)


def test_the_same_process_may_take_it_again_and_holds_it_to_the_end_of_the_first(tmp_path):
    probe = [
        sys.executable,
        "-c",
        "import sys; from pathlib import Path; from vlcpt.folder_locks import holder\n"
        "print(holder(Path(sys.argv[1])))",
        str(tmp_path),
    ]
    with hold(tmp_path):
        with hold(tmp_path / "." / ""):
            assert holder(tmp_path) is None
        seen = subprocess.run(probe, capture_output=True, text=True, check=True).stdout
    assert seen.startswith(f"process {os.getpid()} on host")


def test_a_forked_process_does_not_hold_what_its_parent_does(tmp_path):
    with hold(tmp_path):
        child = os.fork()
        if child == 0:
            os._exit(0 if holder(tmp_path) else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert not (tmp_path / LOCK).exists()


def test_a_folder_made_for_the_lock_alone_goes_again(tmp_path):
    with hold(tmp_path / "out"):
        assert (tmp_path / "out").is_dir()
    assert not (tmp_path / "out").exists()
    with hold(tmp_path / "out"):
        (tmp_path / "out" / "result").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["result"]


def test_many_that_start_at_once_hold_it_one_after_the_other(tmp_path):
    log = tmp_path / "log"
    code = f"""
import os, sys, time
from pathlib import Path
from vlcpt.errors import ConfigError
from vlcpt.folder_locks import hold
for _ in range(25):
    try:
        with hold(Path({str(tmp_path / "out")!r})):
            with open({str(log)!r}, "a") as file:
                file.write(f"in {{os.getpid()}}\\n")
                file.flush()
                time.sleep(0.002)
                file.write(f"out {{os.getpid()}}\\n")
    except ConfigError:
        pass
"""
    started = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [process.wait(60) for process in started] == [0, 0, 0, 0]
    lines = [line.split() for line in log.read_text().splitlines()]
    assert len({process for _, process in lines}) > 1
    for (first, process), (second, same) in zip(lines[::2], lines[1::2], strict=True):
        assert (first, second, process) == ("in", "out", same)


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch, caplog):
    def no_locks(descriptor):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder_locks, "_lock", no_locks)
    with hold(tmp_path):
        assert holder(tmp_path) is None
    assert "has no locks (No locks available), so a second run in it would not be noticed" in caplog.text


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(
        ConfigError,
        match=r"output_dir .*out cannot be written: File exists \(in the place of its folder\)\. Give",
    ):
        hold(tmp_path / "out").__enter__()


def test_a_refusal_takes_less_than_two_seconds(tmp_path):
    with holding(tmp_path):
        started = time.monotonic()
        with pytest.raises(ConfigError):
            hold(tmp_path).__enter__()
        assert time.monotonic() - started < 2


def test_who_waits_has_the_folder_when_its_holder_is_killed(tmp_path):
    with holding(tmp_path) as (process, _):
        threading.Timer(0.8, process.kill).start()  # longer than a refusal takes
        started = time.monotonic()
        with hold(tmp_path, waits=True):
            assert holder(tmp_path) is None
        assert time.monotonic() - started > 0.7
