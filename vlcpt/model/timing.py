"""How long a computation takes on a device, for a choice between two ways to compute the same."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

# The usual way stays where the other one gains less, so that a run resumed on the same GPU, measured again,
# gets the same one.
GAIN = 1.1

_CALLS = 6
_LONGEST = 0.5  # seconds after which no further call is measured


def median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, the device's work included.

    The first call is not counted. A call may take seconds, so fewer are measured where they are slow.

    Returns:
        The median; infinity if the device cannot do the work.

    Raises:
        torch.OutOfMemoryError: A full GPU says nothing of the work.

    Example:
        >>> def missing():
        ...     raise RuntimeError("no kernel of this type")
        >>> median_seconds(missing, torch.device("cpu"))
        inf
    """
    spent: list[float] = []
    try:
        while len(spent) < _CALLS and sum(spent) < _LONGEST:
            _wait(device)
            start = time.perf_counter()
            work()
            _wait(device)
            spent.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # some releases of cuDNN lack a convolution of a type
        return math.inf
    return statistics.median(spent[1:] or spent)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
