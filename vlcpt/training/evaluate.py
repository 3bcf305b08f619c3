"""Perplexity, what is kept of the old, and how far the text relies on the images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, ProcessorMixin

from vlcpt.config.training import LOSS_CHUNK
from vlcpt.data.collator import CPTDataCollator
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.encode.tokens import token_sizes
from vlcpt.data.plan.plan import Track, untracked
from vlcpt.data.workers import Workers
from vlcpt.model.tuning import base_model
from vlcpt.training.loss import BatchTensors, target_losses
from vlcpt.training.step import leave_out_failed, watched


class SetResult(TypedDict):
    """One set of ``vlcpt eval --output``: nats per target, unweighted; null where it does not apply."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    targets: int
    base_loss: float | None
    shuffled_images_loss: float | None
    blank_images_loss: float | None


@dataclass(frozen=True)
class Score:
    """Sums over the targets of a data set.

    Args:
        nll: Σ negative log likelihood, nats.
        targets: How many.
        text_nll: The same sum without end-of-text.
        text_bytes: UTF-8 bytes of the targets without end-of-text.

    Example:
        >>> round(Score(nll=8.0, targets=4, text_nll=6.0, text_bytes=8).bits_per_byte, 3)
        1.082
    """

    nll: float
    targets: int
    text_nll: float
    text_bytes: int

    @property
    def loss(self) -> float:
        """Nats per target."""
        return self.nll / self.targets

    @property
    def bits_per_byte(self) -> float | None:
        """Of the text; None for text without a byte."""
        return self.text_nll / math.log(2) / self.text_bytes if self.text_bytes else None


def row_sums(model: nn.Module, inputs: BatchTensors, loss_chunk: int = LOSS_CHUNK) -> torch.Tensor:
    """Σ nll and number of targets of each row: float64 (B, 2).

    Rows, and no means, so that evaluation does not move with the batch size, and Trainer's gathering
    can take away rows that it repeated to fill the last batch.
    """
    losses = target_losses(model, inputs, loss_chunk)
    ids = inputs["input_ids"]
    assert isinstance(ids, torch.Tensor)
    # MPS has no float64; the sum of one row is short enough for float32 there.
    dtype = torch.float32 if ids.device.type == "mps" else torch.float64
    sums = torch.zeros(len(ids), 2, dtype=dtype, device=ids.device)
    values = torch.stack([losses.nll.to(dtype), torch.ones_like(losses.nll, dtype=dtype)], dim=1)
    return sums.index_add_(0, losses.rows, values)


def trainer_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Trainer's ``compute_metrics``: Σ nll / Σ targets over the rows of :func:`row_sums`.

    Example:
        >>> rows = np.array([[2.0, 1.0], [4.0, 2.0]])
        >>> trainer_metrics(EvalPrediction(predictions=rows, label_ids=rows))["loss"]
        2.0
    """
    nll, targets = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    loss = float(nll / targets)
    return {"loss": loss, "perplexity": perplexity(loss), "targets": int(targets)}


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows.

    Example:
        >>> perplexity(0.0), perplexity(1e6)
        (1.0, inf)
    """
    return math.exp(loss) if loss < 700 else math.inf


@dataclass(frozen=True)
class EvalOptions:
    """How data sets are scored; no number depends on it but for ``autocast``.

    Args:
        batch_size: Items in one forward pass.
        num_workers: Processes that read.
        timeout: Seconds to wait for a batch of theirs; 0: for ever.
        autocast: The type of products, as in training; None for that of the weights.
        track: What shows the progress.
    """

    batch_size: int = 1
    num_workers: int = 0
    timeout: float = 0
    autocast: torch.dtype | None = None
    track: Track = untracked


_DEFAULTS = EvalOptions()


def score(
    model: nn.Module,
    dataset: CPTDataset,
    processor: ProcessorMixin,
    options: EvalOptions = _DEFAULTS,
    description: str = "measuring",
) -> Score:
    """Score every target of a data set.

    Args:
        model: In the state it is to be measured in; its mode is restored.
        dataset: Packed or not.
        description: What the progress is shown as.

    Raises:
        LoadingError: If a worker died, or did not answer in time.
    """
    eos = processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    token_bytes = torch.tensor(token_sizes(processor.tokenizer.get_vocab()))
    collator = CPTDataCollator(processor)
    collator.window_size = base_model(model).config.vision_config.window_size
    loader = DataLoader(dataset, options.batch_size, collate_fn=collator, num_workers=options.num_workers)
    device = next(model.parameters()).device
    nll, text_nll, targets, text_bytes = 0.0, 0.0, 0, 0
    was_training = model.training
    model.eval()
    with (
        torch.no_grad(),
        torch.autocast(device.type, options.autocast, enabled=options.autocast is not None),
        Workers(options.timeout, lambda: watched(dataset)) as workers,
    ):
        for batch in options.track(workers.awaited(loader), description):
            leave_out_failed(batch)
            inputs = {
                key: value.to(device) if isinstance(value, torch.Tensor) else value
                for key, value in batch.items()
            }
            losses = target_losses(model, inputs)
            nlls, ids = losses.nll.double().cpu(), losses.ids.cpu()
            is_text = ids != eos
            nll += float(nlls.sum())
            text_nll += float(nlls[is_text].sum())
            targets += len(ids)
            text_bytes += int(token_bytes[ids[is_text]].sum())
    model.train(was_training)
    return Score(nll, targets, text_nll, text_bytes)


def evaluate_sets(
    model: nn.Module,
    sets: Mapping[str, CPTDataset],
    processor: ProcessorMixin,
    options: EvalOptions = _DEFAULTS,
    *,
    base: nn.Module | None = None,
    with_base: bool = True,
) -> dict[str, SetResult]:
    """What ``vlcpt eval --output`` writes under ``sets``.

    Args:
        model: The trained model; with adapters, its own base is measured by switching them off.
        sets: Held-out and retention data by name.
        base: The model before training, where there are no adapters to switch off.
        with_base: Whether to measure what came before training at all.
    """
    if base is None and with_base and isinstance(model, PeftModel):
        base = model
    measure = partial(score, processor=processor, options=options)
    results: dict[str, SetResult] = {}
    for name, dataset in sets.items():
        what = "right images" if dataset.has_media else "text"
        right = measure(model, dataset, description=f"{name}, {what}")
        before = shuffled = blank = None
        if base is not None:
            with base.disable_adapter() if isinstance(base, PeftModel) else nullcontext():
                before = measure(base, dataset, description=f"{name}, base")
        if dataset.has_media:
            pixels = dataset.with_pixels_of("blank")
            blank = measure(model, pixels, description=f"{name}, blank images")
        if dataset.can_shuffle:
            pixels = dataset.with_pixels_of("next_document")
            shuffled = measure(model, pixels, description=f"{name}, shuffled images")
        results[name] = SetResult(
            loss=right.loss,
            perplexity=perplexity(right.loss),
            bits_per_byte=right.bits_per_byte,
            targets=right.targets,
            base_loss=before.loss if before else None,
            shuffled_images_loss=shuffled.loss if shuffled else None,
            blank_images_loss=blank.loss if blank else None,
        )
    return results
