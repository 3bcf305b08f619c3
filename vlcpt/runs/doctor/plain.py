"""Documents one by one on the plain path: no pack, a mask, all logits, the loss of transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from vlcpt.data.encode.encoder import IGNORE_INDEX, Sample
from vlcpt.model.tuning import base_model

# What float32 itself may be off by, of the largest number: as in the tests of this package.
FLOOR, GRADIENT_FLOOR = 1e-5, 1e-4
_KEPT = 2**16  # numbers of a gradient that are compared, at most
Gradients = dict[str, torch.Tensor]
_MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


@dataclass(frozen=True)
class Alone:
    """The targets of one document; N of them, on the CPU.

    Args:
        logits: float32 (N, vocabulary), from which each is predicted.
        nll: float32 (N,).
    """

    logits: torch.Tensor
    nll: torch.Tensor


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 that a GPU does not round, as it would with TF32."""
    # Not `allow_tf32`, which torch refuses to read once transformers has set these (tf32: true).
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = "ieee"
    try:
        yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision


def logits_alone(model: nn.Module, sample: Sample, device: torch.device) -> torch.Tensor:
    """(1, T, vocabulary) of one document, at its own positions."""
    ids = sample.input_ids[None].to(device)
    media = {name: one.to(device) for name in _MEDIA if (one := getattr(sample, name)) is not None}
    output = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=sample.position_ids[:, None].to(device),
        use_cache=False,
        **media,
    )
    logits: torch.Tensor = output.logits
    return logits


def run_alone(
    model: nn.Module, samples: Sequence[Sample], device: torch.device, autocast: torch.dtype | None
) -> list[Alone]:
    """The targets of each document."""
    found = []
    for sample in samples:
        with torch.no_grad(), _autocast(device, autocast):
            logits = logits_alone(model, sample, device)[0]
        is_target = sample.labels[1:] != IGNORE_INDEX
        kept = logits[:-1].float().cpu()[is_target]
        nll = nn.functional.cross_entropy(kept, sample.labels[1:][is_target], reduction="none")
        found.append(Alone(kept, nll))
    return found


def gradients_alone(
    model: nn.Module, samples: Sequence[Sample], device: torch.device, autocast: torch.dtype | None
) -> tuple[list[float], Gradients]:
    """The parts of documents in the loss of a step, and its gradient: each forward and backward."""
    model.train()
    total = sum(float(sample.loss_weights[1:].sum()) for sample in samples)
    parts = []
    for sample in samples:
        with _autocast(device, autocast):
            logits = logits_alone(model, sample, device)
        part = _weighted_sum(base_model(model), logits, sample) / total
        part.backward()
        parts.append(float(part.detach()))
    return parts, kept_gradients(model)


def narrow_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold a model's weights in a type of 16 bits, but for its tables of angles, as DeepSpeed does.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> narrow_weights(layer, torch.bfloat16)
        >>> layer.weight.dtype
        torch.bfloat16
    """
    for one in model.parameters():
        if one.is_floating_point():  # four bits are packed into whole numbers
            one.data = one.data.to(dtype)


def _weighted_sum(base: PreTrainedModel, logits: torch.Tensor, sample: Sample) -> torch.Tensor:
    """Σ weight · nll, by the loss of transformers, which knows no weights: once for each of them."""
    labels = sample.labels[None].to(logits.device)
    weights = sample.loss_weights[None].to(logits.device)
    total = torch.zeros((), device=logits.device)
    for weight in sorted(set(sample.loss_weights[1:].tolist()) - {0.0}):
        own = torch.where(weights == weight, labels, IGNORE_INDEX)
        total = total + weight * base.loss_function(
            logits=logits, labels=own, vocab_size=logits.shape[-1], num_items_in_batch=1
        )
    return total


def kept_gradients(model: nn.Module, scale: float = 1.0) -> Gradients:
    """The gradients of what trains, on the CPU; of large ones evenly spaced numbers."""
    named = ((name, one) for name, one in model.named_parameters() if one.requires_grad)
    return {
        name: sampled(torch.zeros_like(one) if one.grad is None else one.grad / scale) for name, one in named
    }


def sampled(tensor: torch.Tensor) -> torch.Tensor:
    """float32 numbers of a tensor, on the CPU: all, or evenly spaced ones where there are many.

    Example:
        >>> sampled(torch.zeros(2**20)).numel() <= 2**16
        True
    """
    # An odd distance, so that it is no multiple of a row.
    distance = -(-tensor.numel() // _KEPT) | 1
    return tensor.detach().flatten()[::distance].float().cpu()


def distance(found: torch.Tensor, expected: torch.Tensor, least: float = 0.0) -> float:
    """The difference of two tensors, relative to the second; infinite where it is not a number.

    Args:
        least: What the second one counts as at least.

    Example:
        >>> distance(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0]))
        0.5
    """
    scale = max(float(expected.abs().max()), least, 1e-30) if expected.numel() else 1.0
    difference = float((found - expected).abs().max()) if found.numel() else 0.0
    return difference / scale if difference == difference else float("inf")


@dataclass(frozen=True)
class Worst:
    """The tensor that is off most, of what it may be.

    Args:
        name: What it is called.
        error: By which it is off.
        allowed: By which it may be.
    """

    name: str
    error: float
    allowed: float


def worst_gradient(found: Gradients, expected: Gradients, plain: Mapping[str, float]) -> Worst:
    """Where gradients are off most.

    Args:
        plain: By how much the plain path is off for each, see :func:`plain_errors`.

    Example:
        >>> one = {"a": torch.ones(2)}
        >>> worst_gradient({"a": torch.tensor([1.0, 1.1])}, one, {"a": 0.2}).error <= 0.1001
        True
    """
    least = _least(expected)
    middle = float(torch.tensor(list(plain.values())).median()) if plain else 0.0
    compared = []
    for name, one in expected.items():
        error = distance(found[name], one, least) if name in found else float("inf")
        # A tensor that the plain path happens to hit is rounded like the others all the same.
        compared.append(Worst(name, error, 2 * max(plain[name], middle) + GRADIENT_FLOOR))
    return max(compared, key=lambda worst: worst.error / worst.allowed)


def plain_errors(found: Sequence[Gradients], exact: Gradients) -> dict[str, float]:
    """By how much each gradient of the plain path is off at most, relative to its largest number.

    That of one layer may happen to be nearly right, where those of other layers are off as rounding goes: so
    each counts as off by as much as the worst of its kind.

    Args:
        found: As computed by several kernels, which round differently.
        exact: In float32.

    Example:
        >>> exact = {"layers.0.weight": torch.ones(2), "layers.1.weight": torch.ones(2)}
        >>> rounded = {"layers.0.weight": torch.tensor([1.0, 1.25]), "layers.1.weight": torch.ones(2)}
        >>> plain_errors([rounded], exact)
        {'layers.0.weight': 0.25, 'layers.1.weight': 0.25}
    """
    least = _least(exact)
    worst: dict[str, float] = {}
    for name, one in exact.items():
        error = max(distance(gradients[name], one, least) for gradients in found)
        worst[_kind(name)] = max(worst.get(_kind(name), 0.0), error)
    return {name: worst[_kind(name)] for name in exact}


def _kind(name: str) -> str:
    """The name of a weight without the number of its layer."""
    return re.sub(r"\b(layers|blocks)\.\d+\.", r"\1.*.", name)


def _least(gradients: Gradients) -> float:
    """What a gradient counts as at least: of what is nearly zero everything is rounding."""
    largest = [float(one.abs().max()) for one in gradients.values() if one.numel()]
    return 1e-4 * max(largest, default=0.0)


def _autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast | nullcontext[None]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
