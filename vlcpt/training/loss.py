"""The loss at the targets: logits are computed there and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from vlcpt.data.encode.encoder import IGNORE_INDEX

# What a collator made: tensors, and perhaps a flag or two.
BatchTensors = Mapping[str, object]


class TargetLosses(NamedTuple):
    """Each target of a batch, in order of row and place; N targets.

    Args:
        nll: float32 (N,): negative log likelihood, nats.
        weights: float32 (N,).
        ids: int64 (N,).
        rows: int64 (N,): the row of the batch.
    """

    nll: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    rows: torch.Tensor


def target_losses(model: nn.Module, inputs: BatchTensors) -> TargetLosses:
    """Run the model on a batch and score its targets.

    Args:
        model: Takes ``logits_to_keep`` as a bool mask (B, T) and returns flat logits (N, vocabulary).
        inputs: A collated batch; without ``loss_weights`` each target weighs 1.

    Example:
        >>> class Uniform(nn.Module):
        ...     def forward(self, input_ids, logits_to_keep):
        ...         return type("Output", (), {"logits": torch.zeros(int(logits_to_keep.sum()), 8)})
        >>> inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[-100, -100, 3]])}
        >>> [round(value, 3) for value in target_losses(Uniform(), inputs).nll.tolist()]
        [2.079]
    """
    is_target, weights = _targets(inputs)
    forward = {name: value for name, value in inputs.items() if name not in ("labels", "loss_weights")}
    # The logits at a place predict the token after it.
    keep = nn.functional.pad(is_target, (0, 1), value=False)
    logits = model(**forward, logits_to_keep=keep).logits
    ids = _tensor(inputs["labels"])[:, 1:][is_target]
    nll = cross_entropy(logits.float(), ids, reduction="none")
    return TargetLosses(nll, weights, ids, rows=is_target.nonzero()[:, 0])


def total_weight(inputs: BatchTensors) -> torch.Tensor:
    """Σ weight of a batch's targets, as ``target_losses`` would weigh them.

    Example:
        >>> total_weight({"labels": torch.tensor([[7, 7, -100]])})
        tensor(1.)
    """
    return _targets(inputs)[1].sum()


def _targets(inputs: BatchTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens from the second on are targets, bool (B, T-1), and the weight of each of these, (N,)."""
    is_target = _tensor(inputs["labels"])[:, 1:] != IGNORE_INDEX
    if "loss_weights" not in inputs:
        return is_target, is_target[is_target].float()
    return is_target, _tensor(inputs["loss_weights"])[:, 1:][is_target]


def _tensor(value: object) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    return value
