"""What was measured of data sets: sums of documents, and the numbers that are made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypedDict

import numpy as np

from vlcpt.training.intervals import loss_intervals
from vlcpt.training.target_nats import Reliance, TargetNats, reliance_of

Pass = Literal["right", "base", "blank", "shuffled"]  # what one batch is scored as
PASSES: tuple[Pass, ...] = ("right", "base", "blank", "shuffled")
_ADDED: Mapping[str, Pass] = {"learnt": "base", "shuffled": "shuffled", "blank": "blank"}


class SetResult(TypedDict):
    """One set of ``vlcpt eval --output``: nats per target, unweighted; null where it does not apply.

    ``intervals`` has the 95% interval over documents of ``loss``, and of what ``learnt`` (``base_loss``),
    ``shuffled`` and ``blank`` images add to it: see :mod:`vlcpt.training.intervals`. ``reliance`` says how
    far its targets rely on their images.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    targets: int
    base_loss: float | None
    shuffled_images_loss: float | None
    blank_images_loss: float | None
    documents: int
    intervals: dict[str, list[float] | None]
    reliance: Reliance | None


class DocumentResult(TypedDict):
    """One document of a set: nats per target; null where it does not apply."""

    loss: float
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
        """Bits per byte of the text; None for text without a byte."""
        return self.text_nll / math.log(2) / self.text_bytes if self.text_bytes else None


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows.

    Example:
        >>> perplexity(0.0), perplexity(1e6)
        (1.0, inf)
    """
    return math.exp(loss) if loss < 700 else math.inf


@dataclass(frozen=True)
class SetScores:
    """The sums of each document of a set in each pass.

    Args:
        sums: float64 (documents, passes, 4), by the numbers of ``CPTDataset.documents``: Σ nll, targets, and
            without end-of-text Σ nll and bytes. Zeros where a document could not be read.
        measured: The passes that were made.
        image_sums: float64 (documents, 4): what images give the targets of each, see
            :class:`~vlcpt.training.target_nats.NatsCollector`.
        targets: Each target, where they were asked for.
    """

    sums: np.ndarray
    measured: frozenset[Pass]
    image_sums: np.ndarray
    targets: TargetNats | None = None

    @cached_property
    def totals(self) -> dict[Pass, Score]:
        """The sums over the set, of each pass that was made."""
        whole = zip(PASSES, self.sums.sum(axis=0).tolist(), strict=True)
        return {
            one: Score(nll, int(targets), text_nll, int(text_bytes))
            for one, (nll, targets, text_nll, text_bytes) in whole
            if one in self.measured
        }

    def result(self) -> SetResult:
        """The numbers of the set, with their intervals over documents."""
        right = self.totals["right"]
        losses = {one: self.totals[one].loss if one in self.totals else None for one in PASSES}
        places: dict[str, tuple[int, int | None]] = {"loss": (0, None)}
        places |= {name: (PASSES.index(one), 0) for name, one in _ADDED.items() if one in self.measured}
        found = loss_intervals(self.sums[:, :, :2], places)
        intervals = {name: found.get(name) for name in ("loss", *_ADDED)}
        return SetResult(
            loss=right.loss,
            perplexity=perplexity(right.loss),
            bits_per_byte=right.bits_per_byte,
            targets=right.targets,
            base_loss=losses["base"],
            shuffled_images_loss=losses["shuffled"],
            blank_images_loss=losses["blank"],
            documents=int((self.sums[:, 0, 1] > 0).sum()),
            intervals={name: None if one is None else [*one] for name, one in intervals.items()},
            reliance=reliance_of(self.image_sums),
        )

    def document(self, number: int, *, has_media: bool) -> DocumentResult | None:
        """The numbers of a document; None if it could not be read."""
        nll, targets = self.sums[number, :, 0], self.sums[number, :, 1]
        if not targets[0]:
            return None

        def loss(one: Pass) -> float | None:
            place = PASSES.index(one)
            applies = one in self.measured and (has_media or one == "base") and targets[place]
            return float(nll[place] / targets[place]) if applies else None

        return DocumentResult(
            loss=float(nll[0] / targets[0]),
            targets=int(targets[0]),
            base_loss=loss("base"),
            shuffled_images_loss=loss("shuffled"),
            blank_images_loss=loss("blank"),
        )
