"""Perplexity, what is kept of the old, and how far the text relies on the images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import EvalPrediction, ProcessorMixin

from vlcpt.config.training import LOSS_CHUNK
from vlcpt.data.collator import Batch, CPTDataCollator
from vlcpt.data.dataset import CPTDataset, PixelsOf
from vlcpt.data.encode.encoder import Sample
from vlcpt.data.encode.tokens import token_sizes
from vlcpt.data.plan.failures import FailedSample
from vlcpt.data.plan.plan import Track, untracked
from vlcpt.data.workers import Workers
from vlcpt.model.shared_features import kept_features, see_alike, with_features
from vlcpt.model.tuning import base_model
from vlcpt.training.loss import BatchTensors, TargetLosses, target_losses
from vlcpt.training.ranks import Alarm, add_up
from vlcpt.training.scores import PASSES, Pass, SetResult, SetScores, perplexity
from vlcpt.training.step import leave_out_failed, require_few_failed, sent, watched
from vlcpt.training.target_nats import NatsCollector, TargetPlaces


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

    Where the rows have a third number, Σ nll with blank images, also the loss with these, and how much higher
    it is.

    Example:
        >>> rows = np.array([[2.0, 1.0], [4.0, 2.0]])
        >>> trainer_metrics(EvalPrediction(predictions=rows, label_ids=rows))["loss"]
        2.0
    """
    nll, targets, *blank = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    loss = float(nll / targets)
    found = {"loss": loss, "perplexity": perplexity(loss), "targets": int(targets)}
    for one in blank:
        found |= {"blank_images_loss": float(one / targets), "reliance": float((one - nll) / targets)}
    return found


@dataclass(frozen=True)
class EvalOptions:
    """How data sets are scored; no number depends on it but for ``autocast``.

    Args:
        batch_size: Items in one forward pass.
        num_workers: Processes that read.
        timeout: Seconds to wait for a batch of theirs; 0: no limit.
        autocast: The type of products, as in training; None for that of the weights.
        loss_chunk: Targets whose logits are held at once; 0: all.
        pixel_bytes: Whether pixels go to the device as bytes.
        track: What shows the progress.
        rank: Which of the processes that share the items this one is.
        ranks: How many do, each with the same model and sets; all make the same calls and get all numbers.
    """

    batch_size: int = 1
    num_workers: int = 0
    timeout: float = 0
    autocast: torch.dtype | None = None
    loss_chunk: int = LOSS_CHUNK
    pixel_bytes: bool = True
    track: Track = untracked
    rank: int = 0
    ranks: int = 1


_DEFAULTS = EvalOptions()
_PIXELS_OF: Mapping[Pass, PixelsOf] = {"right": "document", "blank": "blank", "shuffled": "next_document"}
_Item = list[Sample | FailedSample]
_GRIDS_OF = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}


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

    Each batch is read once and scored in all passes. Right images go through the vision tower once, for the
    model and its base, where both see alike (:func:`vlcpt.model.shared_features.see_alike`).

    Args:
        model: The trained model, in the state it is to be measured in; its mode is restored. With adapters,
            its own base is measured by switching them off.
        sets: Held-out and retention data by name.
        base: The model before training, where there are no adapters to switch off.
        with_base: Whether to measure what came before training at all.

    Raises:
        DocumentError: At a document that cannot be read, with ``on_bad_data: error``.
        BadDataError: If more of them than ``max_bad_fraction`` cannot be read.
        LoadingError: If a worker died, or did not answer in time.
        CollectiveError: For one of these on another rank.
    """
    scores = score_sets(model, sets, processor, options, base=base, with_base=with_base)
    return {name: one.result() for name, one in scores.items()}


def score_sets(
    model: nn.Module,
    sets: Mapping[str, CPTDataset],
    processor: ProcessorMixin,
    options: EvalOptions = _DEFAULTS,
    *,
    base: nn.Module | None = None,
    with_base: bool = True,
    keeps_targets: bool = False,
) -> dict[str, SetScores]:
    """The same, document by document.

    Args:
        keeps_targets: Whether also each target is kept, 24 bytes of it, with right and with blank images.
    """
    if base is None and with_base and isinstance(model, PeftModel):
        base = model
    scorer = _Scorer(model, base, processor, options, keeps_targets=keeps_targets)
    return {name: scorer.scores(name, dataset) for name, dataset in sets.items()}


class _Scorer:
    """Scores data sets under a model and its base.

    Args:
        model: The trained one.
        base: The one before; the same where its adapters are switched off for that; None: not measured.
        keeps_targets: Whether each target is kept.
    """

    def __init__(
        self,
        model: nn.Module,
        base: nn.Module | None,
        processor: ProcessorMixin,
        options: EvalOptions,
        *,
        keeps_targets: bool = False,
    ) -> None:
        self._model, self._base, self._options = model, base, options
        self._keeps_targets = keeps_targets
        self._shares_features = base is not None and see_alike(model, base)
        self._collator = CPTDataCollator(processor)
        self._collator.keeps_bytes = options.pixel_bytes
        self._collator.window_size = base_model(model).config.vision_config.window_size
        self._device = next(model.parameters()).device
        # MPS has no float64. Elsewhere sums stay on the device, so that nothing waits for it.
        self._summing = torch.device("cpu") if self._device.type == "mps" else self._device
        tokenizer = processor.tokenizer
        self._eos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        self._token_bytes = torch.tensor(token_sizes(tokenizer.get_vocab())).to(self._summing, torch.float64)

    def scores(self, name: str, dataset: CPTDataset) -> SetScores:
        """The sums of each document, on all ranks, in each pass that can be made."""
        seen: list[Pass] = ["right"]
        seen += ["blank"] if dataset.has_media else []
        seen += ["shuffled"] if dataset.can_shuffle else []
        # The sums of the passes, and behind them what images give.
        shape = (len(PASSES) + 1, len(dataset.documents), 4)
        sums = torch.zeros(shape, dtype=torch.float64, device=self._summing)
        nats = NatsCollector(sums[-1], keeps_targets=self._keeps_targets)
        if self._options.ranks == 1:
            self._score(name, dataset, seen, sums, nats, Alarm(1))
        else:
            sums = self._score_share(name, dataset, seen, sums, nats)
        require_few_failed(dataset, self._options.ranks)
        measured = frozenset(seen) | (frozenset[Pass](("base",)) if self._base is not None else frozenset())
        found = sums.transpose(0, 1).cpu().numpy()
        return SetScores(found[:, :-1], measured, found[:, -1], nats.targets(self._options.ranks))

    def _score_share(
        self,
        name: str,
        dataset: CPTDataset,
        seen: Sequence[Pass],
        sums: torch.Tensor,
        nats: NatsCollector,
    ) -> torch.Tensor:
        """The sums of all ranks. Where one fails, the others end their share as well, and all raise."""
        alarm = Alarm(self._options.ranks)
        failed: Exception | None = None
        try:
            self._score(name, dataset, seen, sums, nats, alarm)
        except Exception as error:  # whatever it is: the others must not wait for this rank
            failed = error
            alarm.ring()
        return add_up(sums, failed)

    def _score(
        self,
        name: str,
        dataset: CPTDataset,
        seen: Sequence[Pass],
        sums: torch.Tensor,
        nats: NatsCollector,
        alarm: Alarm,
    ) -> None:
        """Add this rank's share of a set to the sums of its documents."""
        options = self._options
        variants = [dataset.with_pixels_of(_PIXELS_OF[one]) for one in seen]
        for variant in variants:
            variant.keeps_bytes = options.pixel_bytes
        loader = DataLoader(
            _Variants(variants),
            batch_sampler=_Share(len(dataset), options.batch_size, options.rank, options.ranks),
            collate_fn=_VariantCollator(self._collator, seen),
            num_workers=options.num_workers,
            pin_memory=self._device.type == "cuda",
        )
        with (
            evaluating(self._model, self._base),
            torch.autocast(self._device.type, options.autocast, enabled=options.autocast is not None),
            Workers(options.timeout, lambda: watched(dataset)) as workers,
        ):
            for read in options.track(workers.awaited(loader), f"measuring {name}"):
                batches = {one: batch for one, (batch, _) in zip(seen, read, strict=True)}
                places = {one: own for one, (_, own) in zip(seen, read, strict=True)}
                compared: dict[Literal["right", "blank"], torch.Tensor] = {}
                for one, batch in batches.items():
                    # With the pixels of others it would be another document that failed.
                    leave_out_failed(batch, dataset if one == "right" else None)
                dataset.failures.check()
                for one, losses in self._losses(batches):
                    of_targets = places["right" if one == "base" else one].documents
                    own, values = sums[PASSES.index(one)], self._values(losses)
                    own.index_add_(0, of_targets.to(self._summing, non_blocking=True), values)
                    if one == "right" or one == "blank":
                        compared[one] = values[:, 0]
                nats.add({one: places[one] for one in compared}, compared)
                if alarm.rings():
                    return

    def _sent(self, one: Pass, batch: Batch) -> dict[str, object]:
        """A batch on the device, with all its pixels."""
        inputs = sent(batch, self._device, self._collator.scales)
        for name, grids in _GRIDS_OF.items():
            if one == "blank" and isinstance(counts := batch.get(grids), torch.Tensor):
                pixels = inputs[name]
                assert isinstance(pixels, torch.Tensor)
                inputs[name] = pixels.new_zeros(int(counts.prod(dim=1).sum()), pixels.shape[1])
        return inputs

    def _losses(self, batches: Mapping[Pass, Batch]) -> Iterator[tuple[Pass, TargetLosses]]:
        """The losses of a batch in each of its passes."""
        chunk = self._options.loss_chunk
        for one, batch in batches.items():
            inputs = self._sent(one, batch)
            if one != "right" or self._base is None:
                yield one, target_losses(self._model, inputs, chunk)
                continue
            with kept_features(self._model) as features:
                yield "right", target_losses(self._model, inputs, chunk)
            before = with_features(inputs, features) if self._shares_features else inputs
            with _as_base(self._base):
                yield "base", target_losses(self._base, before, chunk)

    def _values(self, losses: TargetLosses) -> torch.Tensor:
        """For each target nll, 1, and where it is not end-of-text nll and bytes: float64 (N, 4)."""
        nll, ids = losses.nll.to(self._summing).double(), losses.ids.to(self._summing)
        is_text = ids != self._eos
        # Indexing would wait for the device, which alone knows how many there are.
        text_nll, sizes = nll.where(is_text, 0.0), self._token_bytes[ids].where(is_text, 0.0)
        return torch.stack([nll, torch.ones_like(nll), text_nll, sizes], dim=1)


@dataclass(frozen=True)
class _NumberedItem:
    """An item with each kind of pixels; of each sample its document's number, and where it begins there."""

    variants: Sequence[_Item]
    documents: Sequence[int]
    starts: Sequence[int]


class _Variants(Dataset[_NumberedItem]):
    """Items of a data set with each kind of pixels."""

    def __init__(self, variants: Sequence[CPTDataset]) -> None:
        self._variants = variants

    def __getitem__(self, index: int) -> _NumberedItem:
        items = [variant[index] for variant in self._variants]
        first = self._variants[0]
        return _NumberedItem(items, first.document_numbers(index), first.starts(index))


@dataclass(frozen=True)
class _VariantCollator:
    """Makes a batch for each kind of pixels; those of blank images are made where they are used.

    Args:
        collator: That of one batch.
        seen: The kinds.
    """

    collator: CPTDataCollator
    seen: Sequence[Pass]

    def __call__(self, items: Sequence[_NumberedItem]) -> list[tuple[Batch, TargetPlaces]]:
        """One of each kind, from items with each; and where its targets stand."""
        found = []
        for place, one in enumerate(self.seen):
            packs = [item.variants[place] for item in items]
            batch = self.collator(packs)
            for name in _GRIDS_OF:
                if one == "blank" and isinstance(pixels := batch.get(name), torch.Tensor):
                    batch[name] = pixels[:0].clone()
            # A sample that could not be read is in no batch.
            read = [
                (number, start, sample)
                for item, pack in zip(items, packs, strict=True)
                for number, start, sample in zip(item.documents, item.starts, pack, strict=True)
                if isinstance(sample, Sample)
            ]
            found.append((batch, TargetPlaces.of(read)))
        return found


class _Share(Sampler[list[int]]):
    """The batches of one rank: those of one process, in turn, so that each is computed as there.

    Example:
        >>> [list(_Share(5, 2, rank, ranks=2)) for rank in range(2)]
        [[[0, 1], [4]], [[2, 3]]]
    """

    def __init__(self, items: int, batch_size: int, rank: int, ranks: int) -> None:
        self._items, self._batch_size = items, batch_size
        self._starts = range(rank * batch_size, items, ranks * batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return ([*range(start, min(start + self._batch_size, self._items))] for start in self._starts)

    def __len__(self) -> int:
        return len(self._starts)


@contextmanager
def evaluating(*models: nn.Module | None) -> Iterator[None]:
    """Models in evaluation mode and without gradients; then in the mode they were in."""
    modes = [(model, model.training) for model in models if model is not None]
    for model, _ in modes:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model, was_training in modes:
            model.train(was_training)


def _as_base(model: nn.Module) -> AbstractContextManager[None]:
    """A model as it was before training: its adapters off, where it has any."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
