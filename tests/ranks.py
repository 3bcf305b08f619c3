"""Two processes on the CPU: starts them, and lets DeepSpeed work there.

On a CPU accelerate never picks DeepSpeed: with ``use_cpu`` it quietly takes DDP, without it finds no backend
and sees one process. :func:`allow_deepspeed` tells it otherwise, in tests only; then ZeRO-1, 2 and 3 run for
real, with gloo in the place of NCCL.
"""

import os
import subprocess
from collections.abc import Sequence
from datetime import timedelta
from importlib import import_module

import torch
from torch import nn

from tests.processes import ROOT


def run(
    command: Sequence[str], *, timeout: float = 400, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command in the repository, all that it started ended with it."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    settings |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command,
        env={**os.environ, **settings, **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, 9)
            raise
    return subprocess.CompletedProcess(list(command), process.returncode, output, "")


def allow_deepspeed(timeout: float = 60) -> None:
    """Let accelerate take DeepSpeed on this CPU, with gloo, and transformers bf16. Call it before a
    configuration is made.

    What asks for ``use_cpu`` still gets DDP.
    """
    import deepspeed
    from accelerate.state import DistributedType, PartialState
    from transformers import training_args

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    given = PartialState._prepare_backend

    def prepare(self, cpu=False, sagemaker_dp=False, backend=None):
        if cpu:
            return given(self, cpu, sagemaker_dp, backend)
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = prepare
    training_args.is_torch_bf16_gpu_available = lambda: True
    # On a CPU DeepSpeed 0.19 first compiles an operation of its own, for a minute. Inference alone has a use
    # for it, and a process that is killed meanwhile leaves a lock at which all later ones wait for ever.
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # as an attribute that name is torch
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=timeout), verbose=False)
    assert deepspeed.comm.comm.cdb.shm_comm_op is None


def forget_deepspeed() -> None:
    """Let the next run in this process have another engine."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


class EngineGradients:
    """Keeps the gradient of each step of a wrapped model, whole and averaged, as the optimizer gets it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def watch(self, wrapped: nn.Module) -> None:
        """Look at the gradients before each step of a DeepSpeed engine."""
        step = wrapped.step

        def look_and_step(*args: object, **kwargs: object) -> object:
            from deepspeed.utils import safe_get_full_grad

            if wrapped.is_gradient_accumulation_boundary():
                named = [(name, p) for name, p in wrapped.module.named_parameters() if p.requires_grad]
                self.steps.append({name: safe_get_full_grad(p).clone() for name, p in named})
            return step(*args, **kwargs)

        wrapped.step = look_and_step
