"""Tests of vlcpt/interrupts.py: what answers a signal, and when, in processes of their own."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.processes import Started
from tests.support import wait_for
from vlcpt.demo import base_path

ROOT = Path(__file__).parents[1]
# One call that holds the main thread for long, and leaves the others alone, as those of torch do.
CALL = "hashlib.pbkdf2_hmac('sha256', b'', b'', 30_000_000)"
HEAD = "import hashlib, os, sys\nfrom vlcpt.interrupts import answered, finished_first, interrupt\n"


@pytest.fixture
def start(tmp_path):
    """A function that starts a script, waits until it says that it is ready, and gives it and its stderr."""
    started = []

    def begin(script, **environment):
        errors = tmp_path / f"stderr-{len(started)}"
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", HEAD + script],
            stdout=subprocess.PIPE,
            stderr=errors.open("wb"),
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment},
        )
        started.append(process)
        assert process.stdout and process.stdout.readline() == "ready\n", errors.read_text()
        time.sleep(0.5)  # until it is in the call that follows
        return process, errors

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_amid_a_long_call_the_first_is_answered_at_once_and_the_second_ends(start, number, code):
    process, errors = start(f"with answered('ending', interrupt):\n  print('ready')\n  {CALL}\n")

    sent = time.monotonic()
    process.send_signal(number)
    wait_for(lambda: "ending" in errors.read_text(), 5)
    assert time.monotonic() - sent < 1  # 0.1 on a machine that has nothing else to do
    assert process.poll() is None
    time.sleep(0.3)
    process.send_signal(number)

    assert process.wait(5) == code
    assert errors.read_text().count("vlcpt: ") == 1
    assert f"{signal.Signals(number).name}: ending; " in errors.read_text()


def test_one_press_that_a_launcher_repeats_is_one(start):
    process, errors = start(
        f"with answered('ending', interrupt):\n  print('ready')\n  {CALL}\n", LOCAL_RANK="0"
    )

    process.send_signal(signal.SIGINT)
    wait_for(lambda: "ending" in errors.read_text(), 5)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 143


def test_only_the_first_rank_answers(start):
    process, errors = start(
        "with answered('ending', interrupt):\n  print('ready')\n  import time; time.sleep(30)\n", RANK="1"
    )
    process.send_signal(signal.SIGINT)

    assert process.wait(5) != 0
    assert "vlcpt: " not in errors.read_text()


def test_a_save_is_finished_before_the_signal_acts(start):
    script = "with finished_first('the model'):\n  print('ready')\n  CALL\n  print('saved')\nprint('more')\n"
    process, errors = start(script.replace("CALL", CALL.replace("30_000_000", "3_000_000")))
    process.send_signal(signal.SIGTERM)

    assert process.stdout.read() == "saved\n"
    assert process.wait(5) == 143
    assert "SIGTERM: saving the model, then ending; send it again to end at once" in errors.read_text()


def test_signals_to_a_forked_process_are_not_its_parents(start):
    """A terminal sends Ctrl-C to loader workers too."""
    script = (
        "import time\n"
        "with answered('ending', print):\n"
        "  child = os.fork()\n"
        "  if not child:\n"
        "    while True: time.sleep(0.1)\n"
        "  print('ready')\n"
        "  print(child)\n"
        "  print(os.waitpid(child, 0)[1])\n"
    )
    process, errors = start(script)
    child = int(process.stdout.readline())
    time.sleep(0.3)
    os.kill(child, signal.SIGINT)
    time.sleep(0.5)
    os.kill(child, signal.SIGTERM)

    assert process.stdout.readline() == f"{int(signal.SIGTERM)}\n"  # and SIGINT did not end it
    assert errors.read_text() == ""


@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGHUP])
def test_a_job_in_the_background_or_under_nohup_stays_deaf_to_the_terminal(start, ignored):
    script = (
        f"import signal\nsignal.signal({ignored:d}, signal.SIG_IGN)\n"
        "with answered('ending', interrupt):\n  print('ready')\n  import time; time.sleep(30)\n"
    )
    process, errors = start(script)
    process.send_signal(ignored)
    time.sleep(0.3)

    assert process.poll() is None
    assert errors.read_text() == ""


def take_terminal():
    """In a new process: its terminal is that of its input. Under nohup it would ignore that it closes."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_terminal_that_closes_ends_a_save_first_and_what_is_printed_after_is_no_error(tmp_path):
    """The shell that the terminal ran sends SIGHUP once more, which is no second request."""
    script = (
        "import signal, time\n"
        "done = []\n"
        "with answered('ending', done.append):\n"
        "  print('ready')\n"
        "  while not done: time.sleep(0.05)\n"
        "  time.sleep(0.5)\n"
        "  os.kill(os.getpid(), signal.SIGHUP)\n"
        "  time.sleep(0.5)\n"
        "  print('saving', flush=True)\n"
        "  open(sys.argv[1], 'w').write(done[0].name)\n"
        "interrupt(done[0])\n"
    )
    terminal, side = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", HEAD + script, str(tmp_path / "saved")],
        stdin=side,
        stdout=side,
        stderr=side,
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(side)
    try:
        assert b"ready" in os.read(terminal, 100)
        os.close(terminal)

        assert process.wait(20) == 143
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "saved").read_text() == "SIGHUP"


COMMANDS = {
    "check": [],
    "inspect": ["--rows", "0:300000"],
    "prepare": ["--output", "{folder}/set"],
    "train": [],
}


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory):
    """A file that no command reads to its end in the time of a test."""
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    path.write_text((json.dumps({"text": "one two three " * 20}) + "\n") * 300_000)
    return path


def reads(session: int) -> int:
    """How often the processes of a session have read from a file: at each row once, for one."""
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) == session:
                found += int(dict(map(str.split, (process / "io").read_text().splitlines()))["syscr:"])
        except OSError:  # it has just ended
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_ends_at_once_while_it_reads(tmp_path, many_rows, command, number, code):
    (tmp_path / "train.jsonl").symlink_to(many_rows)
    (tmp_path / "my.yaml").write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: train.jsonl\noutput_dir: out\nmax_length: 512\n"
        "use_cpu: true\ndataloader_num_workers: 2\nreport_to: none\n"
    )
    more = [one.format(folder=tmp_path) for one in COMMANDS[command]]
    log = tmp_path / "log.txt"
    run = Started(["vlcpt", command, str(tmp_path / "my.yaml"), *more], log)
    try:
        # What is imported and the base take 400, and there are 300,000 rows.
        wait_for(lambda: reads(run.pid) > 1000 or run.poll() is not None, 120)
        assert run.poll() is None, log.read_text()[-2000:]
        sent = time.monotonic()
        os.killpg(run.pid, number)  # workers too, as a terminal does
        assert run.wait(60) == code, log.read_text()[-3000:]
        assert time.monotonic() - sent < 20
    finally:
        run.kill()
    said = log.read_text()
    assert f"vlcpt: {signal.Signals(number).name}: ending; " in said
    assert "vlcpt: interrupted" in said
    assert "Traceback" not in said
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)  # nobody of the group is left
    assert not list(tmp_path.rglob("*.partial"))


def test_work_ends_though_a_process_that_was_forked_in_it_lives_on(start):
    """As loader workers do, which end after the work that started them."""
    process, errors = start(
        "import time\n"
        "with answered('ending', interrupt):\n"
        "  child = os.fork()\n"
        "  if not child: time.sleep(60)\n"
        "  print('ready')\n"
        "os.kill(child, 9)\n"
    )

    assert process.wait(10) == 0, errors.read_text()


def test_the_line_is_that_of_the_work_that_a_signal_ends(start):
    """The thread that says it may come when the work has ended already."""
    process, errors = start(
        "sys.setswitchinterval(5)\n"
        "with answered('ending', interrupt), answered('ending without a report', interrupt):\n"
        "  print('ready')\n  while True: pass\n"
    )

    process.send_signal(signal.SIGTERM)

    assert process.wait(20) == 143
    assert "SIGTERM: ending without a report; " in errors.read_text()
