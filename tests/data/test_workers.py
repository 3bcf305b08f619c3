"""Tests of vlcpt/data/workers.py: workers that die, stop or do not answer, by real processes and signals."""

import faulthandler
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vlcpt.data.workers import LoadingError, WorkerBoard, Workers, end_persistent_workers

ROOT = Path(__file__).parents[2]


def row_names(item):
    return [f"rows:{item}"]


class Items(Dataset):
    """Tensors, each read by a worker that may then do something else."""

    def __init__(self, act=lambda item: None, count=12):
        self.act, self.count, self.board = act, count, WorkerBoard(row_names)

    def __len__(self):
        return self.count

    def __getitem__(self, item):
        with self.board.working_on(item):
            self.act(item)
            return torch.full((1000,), item)


def workers(items, timeout=30.0, **options):
    return Workers(timeout, lambda: [items.board], **options)


def at_3(act):
    """Do something where item 3 is read."""
    return lambda item: act() if item == 3 else None


def signalled(number):
    def act():
        faulthandler.disable()  # pytest's would print its trace among the results
        os.kill(os.getpid(), number)

    return at_3(act)


@pytest.fixture(autouse=True)
def all_end():
    """No process is left that a test has started."""
    before = multiprocessing.active_children()
    yield
    assert [child for child in multiprocessing.active_children() if child not in before] == []


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            signalled(signal.SIGKILL),
            r"was killed \(SIGKILL\), most likely .* memory: .*--dataloader_num_workers 1",
        ),
        (signalled(signal.SIGSEGV), r"crashed \(SIGSEGV\): .* vlcpt check --decode"),
        (signalled(signal.SIGABRT), r"crashed \(SIGABRT\): .* vlcpt check --decode"),
        (
            signalled(signal.SIGBUS),
            r"crashed \(SIGBUS\), most likely because shared memory is full: .*/dev/shm",
        ),
        (signalled(signal.SIGTERM), r"was ended \(SIGTERM\) from outside: "),
        (at_3(lambda: os._exit(3)), r"ended with exit code 3: .* stands above"),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_each_way_to_die_is_told_with_the_document(act, message, count):
    items = Items(act)
    with pytest.raises(LoadingError, match=message) as raised, workers(items) as waits:
        list(waits.batches(DataLoader(items, batch_size=None, num_workers=count)))

    worker = 3 % count
    assert re.search(
        rf"worker {worker} \(pid \d+\); .*worker {worker} was reading rows:3\b", str(raised.value)
    )


def test_an_end_without_a_reason_is_seen_without_the_timeout():
    """Exit code 0 is none for torch's handler of SIGCHLD, but the item never comes."""
    items = Items(at_3(lambda: os._exit(0)))
    start = time.monotonic()

    with pytest.raises(LoadingError, match=r"ended unexpectedly: worker 0"), workers(items, 300) as waits:
        list(waits.batches(DataLoader(items, batch_size=None, num_workers=1)))
    assert time.monotonic() - start < 60


def test_too_little_memory_in_a_worker_is_one_message():
    def take():
        # A little more than it has: what tells of it takes some, too.
        most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (1 << 28)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        bytearray(1 << 40)

    items = Items(at_3(take))
    with (
        pytest.raises(LoadingError, match=r"^no memory was left .*--dataloader_num_workers 1"),
        workers(items) as waits,
    ):
        list(waits.batches(DataLoader(items, batch_size=None, num_workers=1)))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("persistent", [True, False])
def test_one_that_ends_or_stops_while_nothing_is_waited_for_is_told_at_the_next_wait(number, persistent):
    """What the process does between two batches goes on to its end."""
    items, done = Items(), []
    loader = DataLoader(items, batch_size=None, num_workers=2, persistent_workers=persistent)
    start = time.monotonic()
    before = multiprocessing.active_children()

    def work(batch):
        if not done:
            time.sleep(0.5)  # each worker has read ahead, and would hand it over
            for child in [one for one in multiprocessing.active_children() if one not in before]:
                os.kill(child.pid, number)
            deadline = time.monotonic() + 0.5
            while time.monotonic() < deadline:  # where an exception out of a handler would come
                pass
        done.append(int(batch[0]))

    with pytest.raises(LoadingError) as raised, workers(items, timeout=2) as waits:
        list(map(work, waits.batches(loader)))
    assert time.monotonic() - start < 15

    assert done in ([0], [0, 1])  # the second, of the other worker, may have come before the first
    what = (
        "timed out after 2 seconds .*: stopped, as by kill -STOP"
        if number == signal.SIGSTOP
        else r"was killed \(SIGKILL\)"
    )
    assert re.search(what, str(raised.value))
    assert re.search(r"worker [01] (was reading|had read, last,) rows:\d", str(raised.value))


def test_slow_items_are_waited_for_as_long_as_others_come(tmp_path):
    """As in planning, where one piece takes long and its rows do not."""
    items = Items(lambda item: None, count=1)

    def read(self, item):
        for row in range(8):
            self.board.at(row)
            time.sleep(0.4)
        self.board.at(None)
        return torch.tensor(item)

    class Slow(Items):
        __getitem__ = read

    slow = Slow(count=2)
    with workers(slow, timeout=2, while_still=True) as waits:
        assert len(list(waits.batches(DataLoader(slow, batch_size=None, num_workers=1)))) == 2

    items = Items(lambda item: time.sleep(60 if item == 1 else 0), count=2)
    with (
        pytest.raises(LoadingError, match=r"timed out after 2 seconds .*worker 1 was reading rows:1"),
        workers(items, timeout=2, while_still=True) as waits,
    ):
        list(waits.batches(DataLoader(items, batch_size=None, num_workers=2, in_order=False)))


# In a process of its own: torch's handler may raise anywhere, also after the loader is done with. The worker
# dies before it hands anything over: with a batch on its way, torch may tell of a broken connection.
OTHERS = """
import os, signal
from torch.utils.data import DataLoader
from tests.data.test_workers import Items, workers
with workers(Items()) as waits:
    list(waits.batches(DataLoader(Items(), batch_size=None, num_workers=1)))
assert signal.getsignal(signal.SIGCHLD).__module__ == "torch.utils.data._utils.signal_handling"
dies = Items(lambda item: os.kill(os.getpid(), signal.SIGKILL))
list(DataLoader(dies, batch_size=None, num_workers=1))
"""


def test_loaders_of_others_are_told_by_torch_as_ever():
    done = subprocess.run(
        [sys.executable, "-c", OTHERS], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )

    assert done.returncode == 1
    assert re.search(r"RuntimeError: DataLoader worker \(pid.* (killed|exited)", done.stderr), done.stderr


def test_an_error_of_the_items_stays_what_it_is():
    items = Items(at_3(lambda: 1 / 0))
    with pytest.raises(ZeroDivisionError), workers(items) as waits:
        list(waits.batches(DataLoader(items, batch_size=None, num_workers=1)))


def test_few_names_stand_for_many():
    board = WorkerBoard(lambda _: [f"rows:{row}" for row in range(500)])
    board.at(0)
    with (
        pytest.raises(LoadingError) as raised,
        Workers(0, lambda: [board]) as waits,
    ):
        list(waits.batches(raising(MemoryError())))
    assert "rows:9 and 490 more" in str(raised.value)
    assert "rows:10," not in str(raised.value)


def raising(error):
    raise error
    yield


def test_a_worker_s_place_shows_in_the_process_that_waits():
    class Who(Items):
        def __getitem__(self, item):
            with self.board.working_on(item):
                return torch.tensor([get_worker_info().id, os.getpid()])

    items = Who(count=4)
    with workers(items) as waits:
        seen = {
            tuple(one.tolist()) for one in waits.batches(DataLoader(items, batch_size=None, num_workers=2))
        }
    assert {(note.worker, note.process) for note in items.board.notes()} == seen
    assert Path("/proc").exists() and len(seen) == 2


def test_persistent_workers_end_at_once_when_they_are_let_go():
    loader = DataLoader(Items(), batch_size=None, num_workers=2, persistent_workers=True)
    assert len(list(loader)) == 12
    assert len(multiprocessing.active_children()) == 2
    since = time.monotonic()

    end_persistent_workers(loader)

    assert multiprocessing.active_children() == []
    assert time.monotonic() - since < 4  # torch waits 5 seconds for one that it could not tell
    assert len(list(loader)) == 12
    end_persistent_workers(loader)
