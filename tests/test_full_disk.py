"""Whole commands where nothing more can be written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, Started
from vlcpt.demo import base_path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A configuration, and rows for two steps."""
    (tmp_path / "a.jsonl").write_text('{"text": "words for all of us"}\n{"text": "more words for all"}\n')
    (tmp_path / "my.yaml").write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: a.jsonl\noutput_dir: out\nmax_length: 128\n"
        "max_steps: 2\nuse_cpu: true\nreport_to: none\ndataloader_num_workers: 0\n"
    )
    return tmp_path


def limited(project: Path, kilobytes: int, *arguments: str) -> tuple[int, list[str]]:
    """A command that may write no file of more kilobytes: its exit code, and the lines of stderr."""
    errors = project / "errors"  # a file, and so limited as well
    run = Started(["tests.limited", str(kilobytes), *arguments], Path(os.devnull), errors, cwd=project)
    try:
        return run.wait(300), errors.read_text().splitlines()
    finally:
        run.kill()


@pytest.mark.parametrize(
    ("kilobytes", "arguments", "what"),
    [
        (1, ("check", "my.yaml"), "/dev/shm (memory that processes share)"),
        (1, ("prepare", "my.yaml", "--output", "prepared"), "preparing.json (what is being prepared)"),
        (20, ("train", "my.yaml"), "out/checkpoint-2"),
    ],
)
def test_what_is_too_large_to_write_is_one_line_and_nothing_of_it_is_left(
    project, kilobytes, arguments, what
):
    code, errors = limited(project, kilobytes, *arguments)

    assert code == 1, errors
    assert not any("Traceback" in line for line in errors), errors
    # The page of a run is another file that is too large: a warning, with which the run goes on.
    (said,) = (line for line in errors if "could not be written" in line and "report.html" not in line)
    assert what in said
    assert "File too large" in said and " are free there" in said
    assert [path for path in project.rglob("*") if path.name.endswith(".partial")] == []


def test_a_cache_that_cannot_be_written_is_named_with_what_chooses_another(project):
    subprocess.run(["gzip", project / "a.jsonl"], check=True)

    done = subprocess.run(
        [sys.executable, "-m", "vlcpt", "check", "my.yaml", "--train_data", "a.jsonl.gz"],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": "/dev/null/no"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    code, errors = done.returncode, done.stderr.splitlines()

    assert code == 1, errors
    assert errors[-1].startswith("vlcpt: /dev/null/no/vlcpt/")
    assert "could not be written" in errors[-1]
    assert errors[-1].endswith("HF_DATASETS_CACHE names the folder of such copies.")
