"""Processes that begin with the imports done.

To import torch, transformers and peft takes ten seconds of a core, more than most of these processes then do.
So a server imports them once, and forks what is asked for: Python's own ``forkserver``. A process runs a
module as ``python -m`` does, with a folder, an environment, a session and output of its own. Only what is
read at import is the server's, ``HF_HOME`` for one: tests of that, and of launchers, start Python itself.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
_CONTEXT = multiprocessing.get_context("forkserver")
# The last one takes what the others made out of garbage collections: each would copy its pages.
_PRELOADED = ["vlcpt.cli", "vlcpt.runs.train", "vlcpt.training.trainer", "tests.frozen_imports"]
_CONTEXT.set_forkserver_preload(_PRELOADED)
# Of workers that get what they work on as bytes, as spawned ones do, but not the ten seconds of imports.
UNFORKED = "forkserver"


_HOLDS = """
import os, sys, time
from pathlib import Path
from vlcpt.folder_locks import hold
with hold(Path(sys.argv[1])):
    child = os.fork() if "fork" in sys.argv else 0
    if not child and "fork" in sys.argv:
        time.sleep(60)
    print(child, flush=True)
    sys.stdin.read()
"""


@contextmanager
def holding(folder: Path, *options: str) -> Iterator["tuple[subprocess.Popen[str], int]"]:
    """A process that holds a folder, as a run does, and the one that it forked if that is asked for."""
    command = [sys.executable, "-c", _HOLDS, str(folder), *options]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdin and process.stdout
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.stdin.close()


class Started:
    """A module that runs in a process and session of its own.

    Args:
        command: The module, and its arguments.
        output: The file that stdout is written to.
        errors: The same of stderr; None: the same file.
    """

    def __init__(
        self,
        command: Sequence[str],
        output: Path,
        errors: Path | None = None,
        *,
        cwd: Path = ROOT,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        files = (str(output), str(errors or output))
        output.touch()
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        self._process = _CONTEXT.Process(target=_run, args=(list(command), files, str(cwd), variables))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, minus a signal's number; None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float) -> int:
        """The exit code, once it has ended."""
        self._process.join(seconds)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(str(self.pid), seconds)
        return code

    def kill(self) -> None:
        """End it, and all that it started, at once."""
        if self.poll() is None:
            try:
                os.killpg(self.pid, 9)
            except ProcessLookupError:  # it has not come to its session yet
                self._process.kill()
            self._process.join()


def run_module(
    *command: str, cwd: Path = ROOT, timeout: float = 300, environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """``python -m COMMAND`` to its end, its output kept."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "stdout"), Path(folder, "stderr")
        started = Started(command, output, errors, cwd=cwd, environment=environment)
        try:
            code = started.wait(timeout)
        finally:
            started.kill()
        return subprocess.CompletedProcess(list(command), code, output.read_text(), errors.read_text())


def start_ranks(
    command: Sequence[str], output: Path, ranks: int = 2, **environment: str
) -> tuple[list[Started], object]:
    """A module on several ranks, with what torchrun would tell them; and the store where they meet."""
    from torch.distributed import TCPStore

    # As torchrun does: a port that is looked for first and used later may be somebody else's by then.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(ranks)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_WORLD_SIZE": str(ranks)}
    shared |= {"DS_ACCELERATOR": "cpu", **environment}
    started = [
        Started(command, output, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]
    return started, store


def run_on_ranks(
    module: str, *arguments: str, processes: int = 2, timeout: float = 400, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """A module on several ranks to its end: the first that fails ends all, as with torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        output, end = Path(folder, "output"), time.monotonic() + timeout
        ranks, store = start_ranks([module, *arguments], output, processes, **environment)
        try:
            while (codes := [rank.poll() for rank in ranks]).count(None) and not any(codes):
                assert time.monotonic() < end, output.read_text()
                time.sleep(0.05)
        finally:
            for rank in ranks:
                rank.kill()
            del store
        code = next(filter(None, codes), 0)
        return subprocess.CompletedProcess([module, *arguments], code, output.read_text(), "")


def _run(command: list[str], files: tuple[str, str], cwd: str, environment: dict[str, str]) -> None:
    """In the new process."""
    import torch

    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    multiprocessing.set_start_method("fork", force=True)  # of its workers: it would be that of this process
    for stream, number, file in zip((sys.stdout, sys.stderr), (1, 2), files, strict=True):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
        stream.reconfigure(line_buffering=True, encoding=environment.get("PYTHONIOENCODING"))
    sys.path[:0] = [cwd, str(ROOT)]
    sys.argv = command
    try:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:  # as Python itself ends
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
