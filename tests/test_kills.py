"""The short form of benchmarks/kills.py: runs that are killed while they train and save, and go on."""

import re
import sys

import pytest

from tests.processes import ROOT
from tests.ranks import run


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(900)
def test_killed_runs_end_with_the_same_documents_losses_and_weights():
    command = [sys.executable, str(ROOT / "benchmarks/kills.py"), "--kills", "5"]

    done = run(command, timeout=800)

    assert done.returncode == 0, done.stdout
    kills, _, runs = map(
        int, re.findall(r"^\| all \| (\d+) \| (\d+) \| (\d+) \| yes \|$", done.stdout, re.M)[0]
    )
    assert kills == 5
    assert runs >= 4  # one of each case
