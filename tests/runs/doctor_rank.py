"""``vlcpt doctor`` on one of several ranks: ``-m tests.runs.doctor_rank FAULT CONFIG OUTPUT [ENGINE]``."""

import sys
from pathlib import Path

import torch.distributed as dist

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


if __name__ == "__main__":
    fault, config, output, *engine = sys.argv[1:]
    options = ["--use_cpu"]
    if engine:
        allow_deepspeed()
        options = ["--deepspeed", *engine]
    if fault == "skip":
        skip_a_tower()
    early = read_early(Path(config), options)
    doctor_run(early, complete(early), Path(output), quick=True)
