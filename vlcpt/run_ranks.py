"""What the processes of one run do together before they train."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainingArguments


def first_rank_only(training: TrainingArguments, work: Callable[[], None]) -> None:
    """Let rank 0 do something while all others wait; what it raises, all raise.

    Args:
        training: Of the run, whose process group it sets up.
        work: Takes moments: the others wait in a collective, which has a timeout.

    Example:
        >>> first_rank_only(TrainingArguments("out", use_cpu=True), lambda: print("done"))
        done
    """
    failed: list[Exception | None] = [None]
    if training.process_index == 0:
        try:
            work()
        except (ValueError, OSError) as error:
            failed = [error]
    if training.world_size > 1:
        broadcast_object_list(failed)
    if failed[0] is not None:
        raise failed[0]


def leave_group() -> None:
    """Leave the process group: threads of gloo, in torch 2.14, can abort a process that ends with them.

    A launcher then takes the run for failed, and ends the rank that is still at work.

    Example:
        >>> leave_group()
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def require_equal(training: TrainingArguments, found: str, name: str) -> None:
    """Raise on every rank if they do not all have the same, for they would train on other items.

    Args:
        training: Of the run.
        found: What this rank has.
        name: What it is, for the message.

    Raises:
        ValueError: If ranks differ.

    Example:
        >>> require_equal(TrainingArguments("out", use_cpu=True), "0f3a", "the plan of train_data")
    """
    if training.world_size == 1:
        return
    everywhere = gather_object([found])
    other = [rank for rank, one in enumerate(everywhere) if one != everywhere[0]]
    if other:
        raise ValueError(
            f"{name} is another on rank {other[0]} than on rank 0: their files or configuration differ, or "
            "were changed while they were read. Give all machines the same, and start again with --overwrite."
        )
