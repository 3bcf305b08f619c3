"""The loss at the targets: their logits are computed a few at a time, and no others at all."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from vlcpt.config.training import LOSS_CHUNK
from vlcpt.data.encode.encoder import IGNORE_INDEX
from vlcpt.model.tuning import unwrapped
from vlcpt.model.vision_cache import with_features

logger = logging.getLogger(__name__)

# What a collator made: tensors, and perhaps a flag or two.
BatchTensors = Mapping[str, object]


@dataclass(frozen=True)
class Targets:
    """The targets of a batch, in order of row and place; N of them.

    No tuple, so that Trainer hands it on as it is: DeepSpeed would have it round the weights.

    Args:
        places: int64 (N,): where each is predicted from, its predecessor, over all rows laid end to end.
        ids: int64 (N,).
        weights: float32 (N,).
        rows: int64 (N,): the row of the batch.
        sources: int64 (N,): the source of the document, -1 where the batch does not say it.
    """

    places: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    rows: torch.Tensor
    sources: torch.Tensor

    def to(self, device: torch.device) -> Self:
        """The same on a device, without waiting for it."""
        return type(self)(**{name: one.to(device, non_blocking=True) for name, one in vars(self).items()})


class TargetLosses(NamedTuple):
    """Each target of a batch, in order of row and place; N targets.

    Args:
        nll: float32 (N,), float64 of a model in float64: negative log likelihood, nats.
        weights: float32 (N,).
        ids: int64 (N,).
        rows: int64 (N,): the row of the batch.
        sources: int64 (N,): the source of the document, -1 where the batch does not say it.
    """

    nll: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    rows: torch.Tensor
    sources: torch.Tensor


def targets_of(inputs: BatchTensors) -> Targets:
    """The targets of a batch: those taken from it before, or its labels from the second token on.

    Labels on a GPU are looked at, which waits for it; ``vlcpt.training.step.sent`` does so before.

    Args:
        inputs: Without ``loss_weights`` each target weighs 1.

    Example:
        >>> targets_of({"labels": torch.tensor([[7, 7, -100], [-100, -100, 5]])}).places.tolist()
        [0, 4]
    """
    if isinstance(known := inputs.get("targets"), Targets):
        return known
    labels = _tensor(inputs["labels"])
    rows, before = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    weights = inputs.get("loss_weights")
    places = rows * labels.shape[1] + before
    return Targets(
        places=places,
        ids=labels[rows, before + 1],
        weights=torch.ones(len(rows), device=rows.device)
        if weights is None
        else _tensor(weights)[rows, before + 1].float(),
        rows=rows,
        sources=_sources_of(inputs, places),
    )


def _sources_of(inputs: BatchTensors, places: torch.Tensor) -> torch.Tensor:
    """The source of the document of each target, from the bounds of documents."""
    if (sources := inputs.get("document_sources")) is None:
        return torch.full_like(places, -1)
    ends = _tensor(inputs["cu_seq_lens_q"])
    # The target is the token after its place, in the same document.
    documents = torch.searchsorted(ends, places + 1, right=True) - 1
    return torch.tensor(sources, device=places.device)[documents]


def total_weight(inputs: BatchTensors) -> float:
    """Σ weight of a batch's targets, as ``target_losses`` would weigh them; a plain number.

    Args:
        inputs: On the CPU, or this waits for the device.

    Example:
        >>> total_weight({"labels": torch.tensor([[7, 7, -100]])})
        1.0
    """
    return float(targets_of(inputs).weights.sum())


def target_losses(model: nn.Module, inputs: BatchTensors, chunk: int = LOSS_CHUNK) -> TargetLosses:
    """Run the model on a batch and score its targets.

    The output layer is called inside the model's own forward pass, on all places, so that DDP and ZeRO see
    it as they see every layer; there it takes the places of targets, and gives their losses for logits.

    Args:
        model: With an output layer, or one that takes ``logits_to_keep`` as a bool mask (B, T).
        inputs: A collated batch.
        chunk: Targets whose logits are held at once; 0: all of them, by the layer itself.

    Example:
        >>> class Uniform(nn.Module):
        ...     def forward(self, input_ids, logits_to_keep):
        ...         return type("Output", (), {"logits": torch.zeros(int(logits_to_keep.sum()), 8)})
        >>> inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[-100, -100, 3]])}
        >>> [round(value, 3) for value in target_losses(Uniform(), inputs).nll.tolist()]
        [2.079]
    """
    inputs = with_features(model, inputs)
    targets = targets_of(inputs)
    ours = ("labels", "loss_weights", "targets", "document_sources")
    forward = {name: value for name, value in inputs.items() if name not in ours}
    head = _output_layer(model)
    if chunk and head is not None:
        with _scoring(head, targets, chunk):
            nll = model(**forward).logits
    else:
        keep = torch.zeros_like(_tensor(inputs["input_ids"]), dtype=torch.bool)
        keep.view(-1)[targets.places] = True
        nll = _nll(model(**forward, logits_to_keep=keep).logits, targets.ids)
    return TargetLosses(nll, targets.weights, targets.ids, targets.rows, targets.sources)


def _output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits, of a model that DDP, DeepSpeed or peft may have wrapped."""
    found = getattr(unwrapped(model), "get_output_embeddings", None)
    return found() if found else None


def _scored_layers(head: nn.Module) -> list[nn.Module]:
    """The layers whose forward gives losses in place of logits."""
    if isinstance(head, ModulesToSaveWrapper):  # one of these is called by it, with hooks of its own
        return [head.original_module, *head.modules_to_save.values()]
    return [head]


_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "bitsandbytes")


def warn_of_hooks(model: nn.Module, chunk: int) -> None:
    """Warn where a forward hook on the output layer would be given losses and not logits.

    Args:
        model: Wrapped or not.
        chunk: As for :func:`target_losses`.

    Example:
        >>> warn_of_hooks(nn.Linear(1, 1), 128)  # no output layer
    """
    head = _output_layer(model)
    if not chunk or head is None:
        return
    # Engines have hooks of their own there, which look at no values.
    found = [
        hook
        for layer in {head, *_scored_layers(head)}
        for hook in layer._forward_hooks.values()
        if str(getattr(hook, "__module__", "")).partition(".")[0] not in _LIBRARIES
    ]
    if found:
        logger.warning(
            "a forward hook on the output layer (%s) gets the losses of targets in training, and not logits: "
            "these are made a few at a time inside the layer. Set loss_chunk: 0 to give it logits.",
            ", ".join(str(getattr(hook, "__qualname__", hook)) for hook in found),
        )


@contextmanager
def _scoring(head: nn.Module, targets: Targets, chunk: int) -> Iterator[None]:
    """Have an output layer give losses (N,) for hidden states (B, T, hidden) while this lasts."""
    before = [(layer, vars(layer).get("forward"), layer.forward) for layer in _scored_layers(head)]

    def scored(layer: nn.Module, forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def score(hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
            picked = hidden.flatten(0, 1).index_select(0, targets.places)
            return chunked_nll(layer, picked, targets.ids, chunk, lambda part: forward(part, *args, **kwargs))

        return score

    for layer, _, forward in before:
        _gather_with_layer(layer)
        vars(layer)["forward"] = scored(layer, forward)
    try:
        yield
    finally:
        for layer, own, _ in before:
            if own is None:
                del vars(layer)["forward"]
            else:
                vars(layer)["forward"] = own


def chunked_nll(
    layer: nn.Module,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    chunk: int,
    forward: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Negative log likelihoods (N,) of tokens, with the logits of ``chunk`` of them at a time.

    A plain linear layer that is frozen gets its one gradient, that of the hidden states, while its logits
    are there; one that trains computes them again in the backward pass. So does any other layer (with
    adapters, in 4 bits). Where ZeRO-3 has cut the weights inside it, they are gathered once around all
    chunks, since ranks have different numbers of those.

    Where products are in 16 bits, a gradient is kept in float32 until all factors and sums are in it. For a
    frozen layer that is targets × width.

    Args:
        layer: The output layer.
        hidden: (N, width).
        ids: int64 (N,).
        forward: What the layer does.
    """
    if type(layer) is nn.Linear:
        found = _LinearLosses.apply(hidden, layer.weight, layer.bias, ids, chunk)
        assert isinstance(found, torch.Tensor)
        return found

    def score_part(part: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        with _gathered_once(layer):
            return _nll(forward(part), wanted)

    if len(ids) <= chunk:
        return score_part(hidden, ids)
    parts = zip(hidden.split(chunk), ids.split(chunk), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([score_part(*part) for part in parts])
    return torch.cat([checkpoint(score_part, *part, use_reentrant=False) for part in parts])


def _gather_with_layer(layer: nn.Module) -> None:
    """Where ZeRO-3 has cut what is inside a layer, have it gather that before the layer is called.

    It then stays complete through all chunks, and again from the layer's first gradient to its last.
    """
    inside = [one for part in layer.children() for one in part.parameters() if hasattr(one, "ds_id")]
    if inside:
        import deepspeed

        for parameter in inside:
            deepspeed.zero.register_external_parameter(layer, parameter)


@contextmanager
def _gathered_once(layer: nn.Module) -> Iterator[None]:
    """Where ZeRO-3 has cut what is inside a layer, do without the hooks of its parts.

    They would be called once a chunk, and ranks have different numbers of chunks: DeepSpeed foresees what to
    gather next from the order of calls, and ranks that foresee different orders wait for each other for ever.
    """
    is_cut = any(hasattr(one, "ds_id") for one in layer.parameters())
    parts = [part for part in layer.modules() if part is not layer] if is_cut else []
    hooks = [(part, part._forward_pre_hooks, part._forward_hooks) for part in parts]
    for part in parts:
        part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for part, before, after in hooks:
            part._forward_pre_hooks, part._forward_hooks = before, after


def _parts(count: int, chunk: int) -> list[slice]:
    """The places of each chunk; one without places if there are none, so that gradients are zero."""
    return [slice(start, start + chunk) for start in range(0, max(count, 1), chunk)]


class _LinearLosses(torch.autograd.Function):
    """Losses of a linear layer: frozen, its gradient is made at once; else logits are made again."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        ids: torch.Tensor,
        chunk: int,
    ) -> torch.Tensor:
        # Autocast would make a copy of the weights for each chunk.
        typed, cast, cast_bias = _in_compute_type(hidden, weight, bias)
        is_wanted, *trains = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        # Of losses that are each times 1. It will be multiplied, so it is not rounded to 16 bits here.
        gradient = (
            torch.empty_like(hidden, dtype=_wide_type(hidden)) if is_wanted and not any(trains) else None
        )
        losses, normalisers = [], []
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _parts(len(ids), chunk):
                logits = linear(typed[part], cast, cast_bias)
                nll, normaliser = _nll_and_normaliser(logits, ids[part])
                losses.append(nll)
                normalisers.append(normaliser)
                if gradient is not None:
                    scales = None if typed.dtype != torch.float16 else torch.full_like(normaliser, _ROOM)
                    gradient[part] = _logit_gradient(logits, ids[part], normaliser, scales) @ cast
        if gradient is not None:
            ctx.save_for_backward(gradient)
        elif any(trains):
            # The weights themselves, not the copy: under ZeRO-3 the layer's hooks gather them again.
            ctx.save_for_backward(hidden, weight, bias, ids, torch.cat(normalisers))  # type: ignore[arg-type]
        ctx.chunk, ctx.dtype, ctx.hidden_dtype = chunk, typed.dtype, hidden.dtype  # type: ignore[attr-defined]
        return torch.cat(losses)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, upstream: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        kept, dtype = ctx.saved_tensors, ctx.dtype  # type: ignore[attr-defined]
        if len(kept) == 1:
            factors = upstream / _ROOM if dtype == torch.float16 else upstream
            only = torch.empty_like(kept[0], dtype=ctx.hidden_dtype)  # type: ignore[attr-defined]
            return torch.mul(kept[0], factors[:, None], out=only), None, None, None, None
        hidden, weight, bias, ids, normalisers = kept
        typed, cast = hidden.to(dtype), weight.to(dtype)
        cast_bias = None if bias is None else bias.to(dtype)
        of_weight = _sum_of_chunks(weight)
        of_bias = None if bias is None else _sum_of_chunks(bias)
        of_hidden = torch.empty_like(hidden)
        for part in _parts(len(ids), ctx.chunk):  # type: ignore[attr-defined]
            logits = linear(typed[part], cast, cast_bias)
            gradient = _logit_gradient(logits, ids[part], normalisers[part], upstream[part])
            of_hidden[part] = gradient @ cast
            if gradient.dtype == of_weight.dtype:
                of_weight.addmm_(gradient.T, typed[part])
            else:
                of_weight += gradient.T @ typed[part]
            if of_bias is not None:
                of_bias += gradient.sum(0, dtype=of_bias.dtype)
        found = None if of_bias is None else of_bias.to(bias.dtype)
        return of_hidden, of_weight.to(weight.dtype), found, None, None


# Gradients by logits are times this in float16, which holds nothing below 6e-8: most of a large vocabulary's.
_ROOM = 2.0**10


def _sum_of_chunks(weight: torch.Tensor) -> torch.Tensor:
    """Zeros for the gradient of a weight: a sum of chunks, so not in 16 bits."""
    return torch.zeros_like(weight, dtype=_wide_type(weight))


def _nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Negative log likelihoods (N,) from logits (N, vocabulary)."""
    return cross_entropy(_wide(logits), ids, reduction="none")


def _nll_and_normaliser(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log likelihoods (n,), and the logarithm of the sum of exponentials (n,)."""
    wide = _wide(logits)
    normaliser = wide.logsumexp(1)
    return normaliser - wide.gather(1, ids[:, None])[:, 0], normaliser


def _logit_gradient(
    logits: torch.Tensor, ids: torch.Tensor, normaliser: torch.Tensor, upstream: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient by logits (n, vocabulary), in their type, of losses that are each times ``upstream``."""
    wide = _wide(logits).sub(normaliser[:, None]).exp_()
    wide.scatter_add_(1, ids[:, None], wide.new_full((len(ids), 1), -1))
    if upstream is not None:
        wide *= upstream[:, None].to(wide.dtype)
    return wide.to(logits.dtype)


def _in_compute_type(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The three in autocast's type where it is on, else as they are."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _wide(values: torch.Tensor) -> torch.Tensor:
    """In float32, or in float64 where they are."""
    return values.to(_wide_type(values))


def _wide_type(values: torch.Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _tensor(value: object) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    return value
