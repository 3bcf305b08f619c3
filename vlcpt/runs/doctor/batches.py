"""What a batch must hold: documents kept apart, the model's positions, no target on media, equal calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel

from vlcpt.data.collator import Batch, CPTDataCollator
from vlcpt.data.encode.encoder import IGNORE_INDEX, Sample
from vlcpt.data.families import SEEING
from vlcpt.model.counting import empty_model
from vlcpt.model.tuning import base_model
from vlcpt.report.doctor import Line, judged
from vlcpt.runs.doctor.documents import clip_seconds, documents
from vlcpt.runs.doctor.plain import FLOOR, Alone, distance, exact_products, run_alone
from vlcpt.runs.doctor.subject import Subject, release
from vlcpt.training.guards import asked_stage
from vlcpt.training.loss import target_losses
from vlcpt.training.step import sent, take_documents
from vlcpt.training.trainer import CPTTrainer


@dataclass(frozen=True)
class Place:
    """A document in a batch.

    Args:
        row: That of the batch.
        start, stop: Its tokens.
        sample: As it was before it was packed.
    """

    row: int
    start: int
    stop: int
    sample: Sample


def collated(trainer: CPTTrainer, packs: Sequence[Sequence[Sample]]) -> Batch:
    """The batch of some packs as training would have it, without the documents' names; on the CPU."""
    collator = trainer.data_collator
    assert isinstance(collator, CPTDataCollator)
    batch = collator(packs)
    take_documents(batch)
    return batch


def _sent(trainer: CPTTrainer, batch: Batch) -> dict[str, object]:
    """A batch on the device, as training sends it."""
    return sent(batch, trainer.args.device, getattr(trainer.data_collator, "scales", None))


def places(packs: Sequence[Sequence[Sample]]) -> Iterator[Place]:
    """Each document of a batch, row by row.

    Example:
        >>> from vlcpt import encode_document, load_processor, parse_markup
        >>> from vlcpt.demo import base_path
        >>> sample = encode_document(parse_markup("one two"), load_processor(base_path()))
        >>> [(one.row, one.start) for one in places([[sample, sample], [sample]])] == [
        ...     (0, 0), (0, len(sample)), (1, 0)]
        True
    """
    for row, pack in enumerate(packs):
        start = 0
        for sample in pack:
            yield Place(row, start, start + len(sample), sample)
            start += len(sample)


def _packs(subject: Subject) -> list[list[Sample]]:
    """The packs of one batch, each of several documents."""
    dataset = subject.packs
    numbers = range(min(subject.rows_of_batch, len(dataset)))
    return [[one for one in dataset[number] if isinstance(one, Sample)] for number in numbers]


def packed_as_alone(subject: Subject, name: str) -> Line:
    """Logits and losses of documents that share packs against those of each alone."""
    packs = _packs(subject)
    samples = [sample for pack in packs for sample in pack]
    if all(len(pack) < 2 for pack in packs):
        return Line(name, "failed", detail="no pack has two documents, so nothing is compared.")
    plain = partial(run_alone, samples=subject.with_pixels(samples), device=subject.device)
    with exact_products():
        exact = plain(subject.placed(dtype="float32", attn_implementation="eager"), autocast=None)
    release()
    rounded = plain(subject.placed(attn_implementation="sdpa"), autocast=subject.autocast)
    release()
    found = _together(subject, packs)
    errors = [_differences(one, right) for one, right in zip(found, exact, strict=True)]
    rounding = [_differences(one, right) for one, right in zip(rounded, exact, strict=True)]
    tolerance = 2 * max(map(max, rounding)) + FLOOR
    worst = max(range(len(errors)), key=lambda number: max(errors[number]))
    logits, losses = errors[worst]
    cause = (
        f"{samples[worst].name} has other logits (off by {logits:.1e}) or losses ({losses:.1e}) in a pack "
        "than alone: documents see each other, or the attention kernel is wrong. Compare with "
        "attn_implementation: sdpa and with packing: false, and report it."
    )
    return judged(name, max(logits, losses), tolerance, cause=cause, detail=f"{len(samples)} documents")


def _together(subject: Subject, packs: Sequence[Sequence[Sample]]) -> list[Alone]:
    """The targets of documents in packs, as the trainer runs them."""
    with torch.no_grad():
        trainer = _engineless(subject)
        model = trainer.model
        model.eval()
        batch = collated(trainer, packs)
        labels = batch["labels"]
        assert isinstance(labels, torch.Tensor)
        keep = nn.functional.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))
        inputs = _sent(trainer, batch)
        forward = {key: one for key, one in inputs.items() if key != "targets"}
        with trainer.compute_loss_context_manager():
            logits = model(**forward, logits_to_keep=keep.to(subject.device)).logits.float().cpu()
            nll = target_losses(model, inputs, trainer.args.loss_chunk).nll.float().cpu()
    # Targets lie in the order of rows and places; the first token of a document is none.
    counts = keep.flatten().cumsum(0)
    width, found = labels.shape[1], []
    for place in places(packs):
        start, stop = place.row * width + place.start, place.row * width + place.stop
        first, last = int(counts[start - 1]) if start else 0, int(counts[stop - 1])
        found.append(Alone(logits[first:last], nll[first:last]))
    return found


def _engineless(subject: Subject) -> CPTTrainer:
    """A trainer whose model this process has for itself."""
    args = subject.settings("batches", deepspeed=None)
    return subject.trainer(args, subject.packs, lora_dropout=0.0)


def _differences(found: Alone, right: Alone) -> tuple[float, float]:
    """Differences of logits and of losses, relative to the largest."""
    if found.logits.shape != right.logits.shape:
        return float("inf"), float("inf")
    return distance(found.logits, right.logits), distance(found.nll, right.nll, 1.0)


def own_positions(subject: Subject, name: str) -> Line:
    """Positions in a batch against ``get_rope_index`` of the model, which needs no weights."""
    packs = _packs(subject)
    batch = collated(_engineless(subject), packs)
    release()
    positions = batch["position_ids"]
    assert isinstance(positions, torch.Tensor)
    with_model = empty_model(subject.config)
    seconds = {str(row["id"]): clip_seconds(row) for row in documents(5 * len(subject.packs) + 5)}
    wrong, compared, first = 0, 0, ""
    for place in places(packs):
        found = positions[:, place.row, place.start : place.stop]
        durations = seconds.get(place.sample.name.rpartition(" ")[2].strip("()"), [])
        expected = torch.cat(
            [torch.arange(len(place.sample))[None], _rope(with_model, place.sample, durations)]
        )
        differing = int((found != expected).any(dim=0).sum())
        wrong, compared = wrong + differing, compared + len(place.sample)
        first = first or (place.sample.name if differing else "")
    cause = (
        f"{wrong} of {compared} tokens have other positions than the model's get_rope_index gives, first in "
        f"{first}. The installed transformers may differ from the tested one; report it."
    )
    return judged(name, wrong, 0, unit="tokens", cause=cause, detail=f"of {compared:,}")


def _rope(model: PreTrainedModel, sample: Sample, durations: Sequence[float]) -> torch.Tensor:
    """(3, T) positions of the model's own."""
    config, ids = model.config, sample.input_ids[None]
    grids = sample.video_grid_thw
    seconds = None
    if grids is not None:
        # Of the file's own time a step has its part.
        steps = zip(durations, grids[:, 0].tolist(), strict=False)
        seconds = torch.tensor([duration / count for duration, count in steps])
    positions, _ = model.model.get_rope_index(
        ids,
        (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int(),
        image_grid_thw=sample.image_grid_thw,
        video_grid_thw=grids,
        second_per_grid_ts=seconds,
    )
    found: torch.Tensor = positions[:, 0]
    return found


def media_untrained(subject: Subject, name: str) -> Line:
    """Labels and loss weights at the tokens of media, in packs and in documents alone."""
    tokenizer = subject.processor.tokenizer
    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    control = torch.tensor(tokenizer.convert_tokens_to_ids(list(names)))
    trainer = _engineless(subject)
    singles = [[one] for one in subject.samples(subject.singles)]
    media = trained = targets = 0
    for packs in (_packs(subject), singles):
        batch = collated(trainer, packs)
        ids, labels, weights = (batch[key] for key in ("input_ids", "labels", "loss_weights"))
        assert isinstance(ids, torch.Tensor)
        assert isinstance(labels, torch.Tensor)
        assert isinstance(weights, torch.Tensor)
        is_media = torch.isin(ids, control)
        media += int(is_media.sum())
        trained += int((is_media & ((labels != IGNORE_INDEX) | (weights > 0))).sum())
        targets += int((labels != IGNORE_INDEX).sum())
    if not media or not targets:
        return Line(name, "failed", detail="the documents have no media or no targets, so nothing is shown.")
    cause = (
        f"{trained} of {media} tokens of images and clips have a loss. Their pixels would be learnt as text; "
        "report it."
    )
    return judged(
        name, trained, 0, unit="tokens", cause=cause, detail=f"of {media:,}, with {targets:,} targets"
    )


def equal_calls(subject: Subject, name: str) -> Line:
    """How often each rank calls the vision tower for the batches of a step; no collective is in them."""
    if subject.ranks == 1:
        return Line(name, "not run", detail="one process")
    args = subject.settings("calls", packing=False)
    is_partitioned = asked_stage(args) == 3
    # The forward passes are those of a model that this process has for itself.
    trainer = CPTTrainer(
        subject.placed(),
        args,
        train_dataset=subject.singles,
        processing_class=subject.processor,
    )
    trains = {tower for tower in subject.config.trained_towers if tower in SEEING}
    if not trains and not is_partitioned:
        return Line(
            name, "not run", detail="ranks share no tower: vision and merger are frozen, and complete"
        )
    calls: list[int] = []
    visual = base_model(trainer.model).model.visual
    visual.register_forward_hook(lambda *_: calls.append(1))
    found: list[int] = []
    samples = subject.samples(subject.singles)
    # Rank by rank another document, so that one may have an image where another has text alone.
    for number in range(args.process_index, len(samples), args.world_size):
        inputs = _sent(trainer, collated(trainer, [[samples[number]]]))
        with torch.no_grad(), trainer.compute_loss_context_manager():
            target_losses(trainer.model, inputs)
        found.append(len(calls))
        calls.clear()
    everywhere: list[list[int]] = gather_object([found])
    unequal = [step for step, counts in enumerate(zip(*everywhere, strict=True)) if len(set(counts)) > 1]
    cause = ""
    if unequal:
        counts = ", ".join(f"rank {rank}: {one[unequal[0]]}" for rank, one in enumerate(everywhere))
        cause = (
            f"in {len(unequal)} of {len(found)} steps ranks call the vision tower another number of times "
            f"({counts}): training would wait for a rank that does not come. Use CPTDataCollator; report it."
        )
    return judged(name, len(unequal), 0, unit="steps", cause=cause, detail=f"of {len(found)}")
