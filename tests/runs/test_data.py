"""Tests of vlcpt/runs/data.py."""

import inspect
import logging
import warnings

import accelerate.accelerator
import pytest
import torch.distributed.distributed_c10d

from vlcpt.runs.data import quiet_libraries

MISMATCH = "Gradient accumulation steps mismatch: GradientAccumulationPlugin has "
BARRIER = "barrier(): using the device under current context"


def test_what_nobody_can_act_on_in_a_run_under_deepspeed_is_not_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert MISMATCH in inspect.getsource(accelerate.accelerator)
    assert BARRIER in inspect.getsource(torch.distributed.distributed_c10d)
    logger = logging.getLogger("accelerate.accelerator")

    with warnings.catch_warnings(record=True) as warned:
        quiet_libraries()
        logger.warning("%s1, DeepSpeed config has 2. Using DeepSpeed's value.", MISMATCH)
        logger.warning("another warning")
        warnings.warn(f"{BARRIER}. You can specify `device_id`", stacklevel=1)
        warnings.warn("another barrier()", stacklevel=1)

    assert [record.getMessage() for record in caplog.records] == ["another warning"]
    assert [str(one.message) for one in warned] == ["another barrier()"]
