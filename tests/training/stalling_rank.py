"""``vlcpt train`` on one rank of two, of which the second hangs or dies.

``python -m tests.training.stalling_rank CASE CONFIG``, with RANK and its like set.
"""

import os
import signal
import sys
import time

from vlcpt.__main__ import main
from vlcpt.data.dataset import CPTDataset
from vlcpt.runs import train
from vlcpt.training.trainer import CPTTrainer


def hang(*args: object, **kwargs: object) -> None:
    """For longer than any test."""
    time.sleep(600)


def die(*args: object, **kwargs: object) -> None:
    """As by a full memory."""
    time.sleep(2)  # so that it has said where it is
    os.kill(os.getpid(), signal.SIGKILL)


def spoil(case: str) -> None:
    """Make this rank hang in loading, hang at a document of step 2, or die in step 2."""
    if case == "loading":
        train.load_model = hang
    elif case == "document":
        read, seen = CPTDataset._sample_or_failure, []

        def read_or_hang(self: CPTDataset, number: int) -> object:
            seen.append(number)
            if len(seen) == 3:  # accelerate reads one ahead
                hang()
            return read(self, number)

        CPTDataset._sample_or_failure = read_or_hang
    else:
        compute = CPTTrainer.compute_loss

        def compute_or_die(self: CPTTrainer, *args: object, **kwargs: object) -> object:
            if self.state.global_step == 1:
                die()
            return compute(self, *args, **kwargs)

        CPTTrainer.compute_loss = compute_or_die


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        spoil(sys.argv[1])
    sys.argv = ["vlcpt", "train", sys.argv[2]]
    main()
