"""A rank that times out waiting for another says for which, and ends; two processes with gloo."""

import json
import re
from pathlib import Path

import pytest
from transformers import TrainingArguments

from tests.processes import Started, start_ranks
from tests.support import digits
from vlcpt.demo import base_path
from vlcpt.training.ranks import CollectiveError, RankWatch

TIMEOUT = 20  # seconds a collective may take
CASES = ("loading", "document", "death")


def start(case: str, folder: Path) -> tuple[list[Started], object]:
    """Both ranks of a run, the second of which stalls; and where they meet."""
    folder.mkdir()
    rows = [{"text": f"a <trainable_text>{digits(5, n)}</trainable_text>"} for n in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my.yaml").write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: train.jsonl\noutput_dir: out\nmax_length: 64\n"
        f"use_cpu: true\npacking: false\ndataloader_num_workers: 0\nddp_timeout: {TIMEOUT}\n"
    )
    return start_ranks(["tests.training.stalling_rank", case, str(folder / "my.yaml")], folder / "output")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code of rank 0, and the output, in each case; they run at the same time, as they mostly wait."""
    folder = tmp_path_factory.mktemp("stalled")
    pairs = {case: start(case, folder / case) for case in CASES}
    try:
        return {
            case: (ranks[0].wait(240), (folder / case / "output").read_text())
            for case, (ranks, _) in pairs.items()
        }
    finally:
        for ranks, _ in pairs.values():
            for rank in ranks:
                rank.kill()


pytestmark = pytest.mark.timeout(300)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize(
    ("case", "waiting", "other"),
    [
        ("loading", "before step 1", r"rank 1 is before step 1 \(loading the model\) for \d\d seconds\."),
        (
            "document",
            "at step 2",
            r"rank 1 is at step 2 \(reading documents\) for \d+ seconds, worker 0 was reading \S+\.jsonl:",
        ),
        ("death", "at step 2", r"rank 1 gives no sign of life, and was at step 2 \(computing\)\."),
    ],
)
def test_a_rank_that_times_out_names_the_other_and_its_step(case, waiting, other, ended):
    code, output = ended[case]

    assert code == 1, output
    (line,) = [line for line in output.splitlines() if line.startswith("vlcpt: rank 0 timed out")]
    assert line.startswith(f"vlcpt: rank 0 timed out waiting for the other ranks, {waiting} (")
    assert re.search(other, line), line
    assert f"--ddp_timeout (now {TIMEOUT} seconds) allows more time" in line
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.alone
def test_before_the_time_is_over_it_is_logged_as_well(ended):
    """With NCCL the process then ends by itself, and cannot say so any more."""
    _, output = ended["document"]

    assert f"a collective ends after {TIMEOUT} (ddp_timeout). The others: rank 1 is at step 2 (rea" in output


@pytest.fixture
def two(tmp_path, monkeypatch) -> TrainingArguments:
    """Arguments of a rank of two, whose launcher is gone."""
    args = TrainingArguments(str(tmp_path), use_cpu=True, ddp_timeout=1)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    return args


def test_without_the_launcher_that_is_said(two):
    expected = r"the other ranks, before step 1 \(starting\): rank 0, or the launcher, does not answer"
    with pytest.raises(CollectiveError, match=expected), RankWatch(two).watched():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")


def test_other_errors_stay_as_they_are(two):
    with pytest.raises(RuntimeError, match="out of memory"), RankWatch(two).watched():
        raise RuntimeError("out of memory")
