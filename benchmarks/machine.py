"""What the scripts of this folder ask of the system: the memory of a process, and one core to measure on."""

from __future__ import annotations

import os
from pathlib import Path


def memory(name: str = "VmHWM", file: str = "/proc/self/status") -> int:
    """Bytes of a process, by the kernel's name for them; 0 if it has gone."""
    try:
        status = Path(file).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(name)), 0)


def pin() -> None:
    """One thread, on one core."""
    import torch

    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
