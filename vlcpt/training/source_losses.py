"""The loss of each source over the steps between two lines of the log."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vlcpt.training.loss import TargetLosses


class SourceLosses:
    """Adds up Σ weight · nll and Σ weight of each source on the device, without waiting for it.

    Args:
        names: The sources by their numbers; with fewer than two there is nothing to tell apart.
        device: That of the run.

    Example:
        >>> losses = SourceLosses(["new", "old"], torch.device("cpu"))
        >>> nll, ones, numbers = torch.tensor([1.0, 2.0, 4.0]), torch.ones(3), torch.tensor([0, 0, 1])
        >>> losses.add(TargetLosses(nll, ones, ids=numbers, rows=numbers, sources=numbers))
        >>> losses.take(list)
        {'new': 1.5, 'old': 4.0}
        >>> losses.take(list)
        {}
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = names if len(names) > 1 else []
        # MPS has no float64. The last row is of targets whose source nobody knows.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(len(names) + 1, 2, dtype=dtype, device=device)

    def add(self, losses: TargetLosses) -> None:
        """Note the losses of a batch."""
        if self._names:
            weights = losses.weights.to(self._sums.dtype)
            values = torch.stack([losses.nll.detach().to(self._sums.dtype) * weights, weights], dim=1)
            self._sums.index_add_(0, losses.sources % len(self._sums), values)

    def take(self, over_ranks: Callable[[list[float]], list[float]]) -> dict[str, float]:
        """The loss of each source that had a target since this was last called; waits for the device.

        Args:
            over_ranks: Adds numbers up over all ranks, which call this together.
        """
        if not self._names:
            return {}
        sums = over_ranks(self._sums.flatten().tolist())
        self._sums.zero_()
        pairs = zip(self._names, sums[::2], sums[1::2], strict=False)
        return {name: nll / weight for name, nll, weight in pairs if weight}
