"""``vlcpt doctor`` on one of several ranks: ``-m tests.runs.doctor_rank FAULT CONFIG OUTPUT [ENGINE]``.

FAULT is none, skip, cached or fail-RANK. The last two run a few checks only, and exit as the command does.
"""

import sys
from pathlib import Path

import torch.distributed as dist

import vlcpt.runs.doctor.run
import vlcpt.runs.doctor.steps
import vlcpt.training.step
from tests.ranks import allow_deepspeed
from vlcpt.config.yaml import complete, read_early
from vlcpt.runs.doctor.run import doctor_run


def skip_a_tower() -> None:
    """Rank 1 puts no tiny image into batches without media."""
    given = vlcpt.training.step.share_towers

    def share_towers(*args, **kwargs):
        filled = given(*args, **kwargs)
        return () if dist.get_rank() == 1 else filled

    vlcpt.training.step.share_towers = share_towers


def fail(rank: int) -> None:
    """One rank fails before a step that the other one waits in; a collective would wait ten minutes."""
    given = vlcpt.runs.doctor.steps.first_step

    def first_step(subject, name, *args, **kwargs):
        if name == "split-2" and dist.get_rank() == rank:
            raise RuntimeError("CUDA error: out of memory")
        return given(subject, name, *args, **kwargs)

    vlcpt.runs.doctor.steps.first_step = first_step


if __name__ == "__main__":
    fault, config, output, *engine = sys.argv[1:]
    options = ["--use_cpu"]
    if engine:
        allow_deepspeed()
        options = ["--deepspeed", *engine]
    if fault == "skip":
        skip_a_tower()
    run, checks = vlcpt.runs.doctor.run, dict(vlcpt.runs.doctor.run.CHECKS)
    if fault == "cached":
        options += ["--train_merger", "false"]
        run.CHECKS = (("cached features = computed", checks["cached features = computed"]),)
    if fault.startswith("fail-"):
        options += ["--ddp_timeout", "600"]
        fail(int(fault.removeprefix("fail-")))
        names = ("media are never targets", "step = any split of it", "speed")
        run.CHECKS = tuple((name, checks[name]) for name in names)
    early = read_early(Path(config), options)
    found = doctor_run(early, complete(early), Path(output), quick=True)
    if fault not in ("none", "skip"):
        sys.exit(0 if found.passed else 1)
