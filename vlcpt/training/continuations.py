"""What a model writes where held-out documents go on: greedily, from their first trained span."""

from __future__ import annotations

from itertools import groupby
from typing import TypedDict

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedTokenizerFast, ProcessorMixin

from vlcpt.data.by_number import Opening
from vlcpt.data.collator import CPTDataCollator
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.documents import DocumentError
from vlcpt.training.evaluate import EvalOptions, evaluating
from vlcpt.training.step import sent

MOST_TOKENS = 128  # of a continuation
_FEWEST_TOKENS = 16  # even where the truth is shorter
_SHOWN = 300  # characters of what comes before
_PICTURES = 3  # of a continuation: eval.json holds them
_SIDE = 160  # pixels


class Continuation(TypedDict):
    """A document continued: what came before, what the model wrote, what the document says.

    ``media`` are its images and videos up to there, as the row names them; ``before`` has ``[image]`` and
    ``[video]`` where they stand, and only its end. ``thumbnails`` are small pictures of the last of
    ``media``, as ``data:`` addresses in their order; empty of one that cannot be decoded.
    """

    document: str
    source: str
    media: list[str]
    thumbnails: list[str]
    before: str
    continuation: str
    truth: str


def continue_documents(
    model: nn.Module, dataset: CPTDataset, processor: ProcessorMixin, count: int, options: EvalOptions
) -> list[Continuation]:
    """Continue some documents of a set, those with images or videos first.

    A continuation starts where the first trained span does, so that the model stands where it stood in
    training: no space is added before it. It ends at end-of-text, or after as many tokens as the span has.

    Args:
        count: How many documents, at most.
        options: Those of these the type of products counts.
    """
    collator = CPTDataCollator(processor)
    device = next(model.parameters()).device
    found: list[Continuation] = []
    with (
        evaluating(model),
        torch.autocast(device.type, options.autocast, enabled=options.autocast is not None),
    ):
        for number in dataset.documents.media_first():
            if len(found) == count:
                break
            try:
                opening = dataset.documents.opening(number)
            except DocumentError:  # measuring the set has counted it, or ended
                continue
            most = min(max(len(opening.truth), _FEWEST_TOKENS), MOST_TOKENS)
            written = _continued(model, collator, opening, most, device, processor.tokenizer)
            truth = opening.truth[:MOST_TOKENS].tolist()
            pictures = dataset.documents.pictures(opening, _PICTURES, _SIDE)
            found.append(_as_text(opening, pictures, written, truth, processor.tokenizer))
    return found


def _continued(
    model: nn.Module,
    collator: CPTDataCollator,
    opening: Opening,
    most: int,
    device: torch.device,
    tokenizer: PreTrainedTokenizerFast,
) -> list[int]:
    """The tokens that a model writes after an opening, each the most likely one."""
    ends = {tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>")}
    batch = sent(collator([opening.sample]), device, collator.scales)
    del batch["targets"]
    positions = batch["position_ids"]
    assert isinstance(positions, torch.Tensor)
    # After the last token each row of positions grows by one: the text row by tokens, the others together.
    following = positions[:, :, -1:].clone()
    following[1:] = positions[1:].amax()
    kept = {"use_cache": True, "cache": DynamicCache()}
    inputs: dict[str, object] = {**batch, **kept}
    written: list[int] = []
    while len(written) < most:
        token = int(model(**inputs, logits_to_keep=1).logits[0, -1].argmax())
        if token in ends:
            break
        written.append(token)
        following = following + 1
        inputs = {
            "input_ids": torch.tensor([[token]], device=device),
            "position_ids": following,
            **kept,
        }
    return written


def _as_text(
    opening: Opening,
    pictures: list[str],
    written: list[int],
    truth: list[int],
    tokenizer: PreTrainedTokenizerFast,
) -> Continuation:
    names = {tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>"): f"[{kind}]" for kind in ("image", "video")}
    before = "".join(
        names[pad] if pad in names else _decoded([*run], tokenizer)
        for pad, run in groupby(
            opening.sample.input_ids.tolist(), key=lambda one: one if one in names else None
        )
    )
    document = opening.document
    shown = before if len(before) <= _SHOWN else f"…{before[-_SHOWN:]}"
    return Continuation(
        document=document.name,
        source=str(document.source or ""),
        media=[str(one.medium) for one in opening.media],
        thumbnails=pictures,
        before=shown,
        continuation=_decoded(written, tokenizer),
        truth=_decoded(truth, tokenizer),
    )


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerFast) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)
