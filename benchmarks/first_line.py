"""What a person waits for: the first line of each command, a refusal, and what comes before the work.

    python benchmarks/first_line.py                    # five repetitions, some minutes
    python benchmarks/first_line.py --repeats 2 --output x.json

The run is one short document on the demo's model. Each row is a fresh process:

- `first line`: CPU seconds of the process and its children, and wall seconds, until the first line is there
  on its stdout or stderr; then it is stopped;
- `refused`: until the process has ended, for a path that is not there and an output_dir that is not empty;
- `before the work`: CPU seconds until `inspect` or `check` opens the file with the rows, as an audit hook
  sees it, and those of the whole command.

Where others use the machine, read CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import about

# Runs a command; says at its end how much CPU time it had used when it first opened the rows.
WATCHED = """
import atexit, sys, time
seen = []
def hook(event, given):
    if event == "open" and not seen and str(given[0]).endswith("rows.jsonl"):
        seen.append(time.process_time())
sys.addaudithook(hook)
atexit.register(lambda: print("CPU", *seen, time.process_time(), file=sys.__stderr__, flush=True))
from vlcpt.__main__ import main
main()
"""


def write_run(folder: Path) -> None:
    """Configurations: of one document, of a path that is not there, with a folder that is not empty."""
    from vlcpt.demo import base_path

    text = "A short document <trainable_text>with a target</trainable_text>."
    (folder / "rows.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (folder / "full").mkdir()
    (folder / "full/notes.txt").write_text("not of vlcpt\n")
    common = f"model_name_or_path: {base_path()}\nuse_cpu: true\nmax_length: 512\nmax_steps: 1\n"
    for name, rows, output in (
        ("run", "rows.jsonl", "out"),
        ("lost", "missing.jsonl", "lost-out"),
        ("full", "rows.jsonl", "full"),
    ):
        (folder / f"{name}.yaml").write_text(f"{common}train_data: {rows}\noutput_dir: {output}\n")


def commands() -> dict[str, list[str]]:
    """What is run until its first line: the help of every command, and each with arguments."""
    names = [
        "train",
        "check",
        "inspect",
        "prepare",
        "eval",
        "merge",
        "push",
        "doctor",
        "report",
        "env",
        "demo",
    ]
    return {
        "--help": ["--help"],
        **{f"{name} --help": [name, "--help"] for name in names},
        "train": ["train", "run.yaml"],
        "check": ["check", "run.yaml"],
        "inspect": ["inspect", "run.yaml"],
        "prepare": ["prepare", "run.yaml", "--output", "prepared"],
        "eval": ["eval", "run.yaml", "--checkpoint", "full"],
        "merge": ["merge", "full", "merged"],
        "push": ["push", "full", "someone/something", "--dry-run"],
        "doctor": ["doctor", "run.yaml", "--quick"],
        "env": ["env"],
        "demo": ["demo", "--output_dir", "demo"],
    }


def cpu(pid: int) -> float:
    """CPU seconds of a process, with those of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def first_line(arguments: list[str], folder: Path) -> dict[str, float | str]:
    """CPU and wall seconds until a command has written its first line."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "vlcpt", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=folder, **pipes) as process:
        assert process.stdout is not None
        select.select([process.stdout], [], [])
        used, wall = cpu(process.pid), time.perf_counter() - start
        line = process.stdout.readline().decode().strip()
        process.kill()
    return {"cpu": used, "wall": wall, "line": line}


def refused(arguments: list[str], folder: Path) -> dict[str, float | str]:
    """CPU and wall seconds of a command that ends with exit code 2."""
    start = time.perf_counter()
    before = os.times()
    command = [sys.executable, "-m", "vlcpt", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    after = os.times()
    if done.returncode != 2:
        sys.exit(f"{' '.join(arguments)} ended with {done.returncode}, not 2:\n{done.stderr}")
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return {"cpu": used, "wall": time.perf_counter() - start, "line": done.stderr.splitlines()[0]}


def before_work(arguments: list[str], folder: Path) -> dict[str, float | str]:
    """CPU seconds until a command opens the rows, and of the whole command."""
    command = [sys.executable, "-c", WATCHED, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    last = next((line for line in done.stderr.splitlines() if line.startswith("CPU ")), "")
    if done.returncode or len(last.split()) != 3:
        sys.exit(f"{' '.join(arguments)} did not read the rows:\n{done.stderr}")
    begun, ended = map(float, last.split()[1:])
    return {"cpu": begun, "whole": ended, "line": ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON with every time.")
    given = parser.parse_args()
    rows: dict[str, list[dict[str, float | str]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_run(folder)
        for _ in range(given.repeats):
            for what, arguments in commands().items():
                rows.setdefault(f"first line: {what}", []).append(first_line(arguments, folder))
            for what, config in (("a path that is not there", "lost"), ("a full output_dir", "full")):
                found = refused(["train", f"{config}.yaml"], folder)
                rows.setdefault(f"refused: {what}", []).append(found)
            for what in ("inspect", "check"):
                found = before_work([what, "run.yaml"], folder)
                rows.setdefault(f"before the work: {what}", []).append(found)
            if given.output:
                given.output.write_text(json.dumps({**about(), "rows": rows}, indent=1) + "\n")
    print("| | CPU | wall | whole command, CPU | first line |\n|---|---:|---:|---:|---|")
    for what, found in rows.items():
        medians = [
            f"{statistics.median(float(one[key]) for one in found):.2f} s" if key in found[0] else ""
            for key in ("cpu", "wall", "whole")
        ]
        print(f"| {what} | {' | '.join(medians)} | {str(found[0]['line'])[:60]} |")


if __name__ == "__main__":
    main()
