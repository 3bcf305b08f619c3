"""What its image gives each target: what a blank one costs there, found while a set is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict

import numpy as np
import torch
from accelerate.utils import gather_object

from vlcpt.data.encode.encoder import IGNORE_INDEX, Sample
from vlcpt.data.encode.pieces import NEEDS_IMAGE

# How far the targets of a set rely on their images: nats per target, and the share that gets over 0.1.
Reliance = TypedDict("Reliance", {"nats_per_target": float, "share_over_0.1": float})


class TargetPlaces(NamedTuple):
    """Where the targets of a batch stand, in the order of their losses.

    Args:
        documents: int64 (N,): the number of each target's document in its data set.
        places: int64 (N,): its place in that document, counted from the document's first token.
    """

    documents: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, samples: Sequence[tuple[int, int, Sample]]) -> TargetPlaces:
        """Those of samples: the number of its document, its first token there, and the sample itself.

        Example:
            >>> from vlcpt import encode_document, load_processor, parse_markup
            >>> from vlcpt.demo import base_path
            >>> document = parse_markup("one <trainable_text>two</trainable_text>")
            >>> sample = encode_document(document, load_processor(base_path()))
            >>> TargetPlaces.of([(7, 100, sample)]).places.tolist()  # "two", end of text
            [101, 102]
        """
        places = [
            (sample.labels[1:] != IGNORE_INDEX).nonzero()[:, 0] + start + 1 for _, start, sample in samples
        ]
        counts = torch.tensor([len(own) for own in places], dtype=torch.int64)
        numbers = torch.tensor([number for number, _, _ in samples], dtype=torch.int64)
        empty = torch.zeros(0, dtype=torch.int64)
        return cls(numbers.repeat_interleave(counts), torch.cat([empty, *places]))

    def common(self, other: TargetPlaces) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Which of these targets, and which of the others, are the same ones; None where all are, in order.

        A document whose own image cannot be decoded is missing from these alone.
        """
        if torch.equal(self.documents, other.documents) and torch.equal(self.places, other.places):
            return None
        mine, others = ((one.documents * 2**32 + one.places).numpy() for one in (self, other))
        _, first, second = np.intersect1d(mine, others, return_indices=True)
        return torch.from_numpy(first), torch.from_numpy(second)


@dataclass(frozen=True)
class TargetNats:
    """The targets of a set, each once, in the order of documents and places; N of them.

    Args:
        documents: int64 (N,): the number of the document among ``CPTDataset.documents``.
        places: int64 (N,): its place in the tokens of that document, however it was split.
        right: float32 (N,): its negative log likelihood with its own images, nats.
        blank: float32 (N,): the same with blank ones; without media the same numbers.
    """

    documents: np.ndarray
    places: np.ndarray
    right: np.ndarray
    blank: np.ndarray

    def of_document(self, number: int, length: int) -> np.ndarray | None:
        """What its image gives each token of a document: float64 (T,), NaN where nothing is measured.

        Args:
            number: The document's number.
            length: How many tokens it has.

        Returns:
            None of a document that was not measured.

        Example:
            >>> one, places = np.array([4]), np.array([2])
            >>> TargetNats(one, places, np.array([0.5]), np.array([3.0])).of_document(4, 3).tolist()
            [nan, nan, 2.5]
        """
        first, last = np.searchsorted(self.documents, [number, number + 1])
        if first == last:
            return None
        found = np.full(length, np.nan)
        blank, right = (one[first:last].astype(np.float64) for one in (self.blank, self.right))
        found[self.places[first:last]] = blank - right
        return found


class NatsCollector:
    """Compares the losses of batches with right and with blank images, target by target.

    Args:
        sums: float64 (documents, 4), which it adds to: of each document the targets that were compared,
            Σ what their images give them, and how many get more than ``NEEDS_IMAGE``; the last is unused.
        keeps_targets: Whether to keep each target, for :meth:`targets`.
    """

    def __init__(self, sums: torch.Tensor, *, keeps_targets: bool) -> None:
        self._sums, self._keeps_targets = sums, keeps_targets
        self._kept: list[tuple[TargetPlaces, torch.Tensor, torch.Tensor]] = []

    def add(
        self,
        places: Mapping[Literal["right", "blank"], TargetPlaces],
        losses: Mapping[Literal["right", "blank"], torch.Tensor],
    ) -> None:
        """Add a batch.

        Args:
            places: Where its targets stand, on the CPU; ``blank`` only where a document has media.
            losses: The nll of each, where the sums are.
        """
        own, right = places["right"], losses["right"]
        blank = losses.get("blank", right)
        if "blank" in places and (same := own.common(places["blank"])) is not None:
            first, second = same
            own = TargetPlaces(own.documents[first], own.places[first])
            right, blank = right[first.to(right.device)], blank[second.to(blank.device)]
        if "blank" in places:
            nats = (blank - right).to(self._sums.dtype)
            over, ones = (nats > NEEDS_IMAGE).to(nats.dtype), torch.ones_like(nats)
            values = torch.stack([ones, nats, over, torch.zeros_like(nats)], dim=1)
            self._sums.index_add_(0, own.documents.to(self._sums.device, non_blocking=True), values)
        if self._keeps_targets:
            self._kept.append((own, right.float(), blank.float()))

    def targets(self, ranks: int) -> TargetNats | None:
        """All targets of all ranks, which call this together; None where none are kept."""
        if not self._keeps_targets:
            return None
        own = [
            torch.cat([torch.zeros(0, dtype=kind), *found]).cpu().numpy()
            for kind, found in (
                (torch.int64, [places.documents for places, _, _ in self._kept]),
                (torch.int64, [places.places for places, _, _ in self._kept]),
                (torch.float32, [right.cpu() for _, right, _ in self._kept]),
                (torch.float32, [blank.cpu() for _, _, blank in self._kept]),
            )
        ]
        everywhere = gather_object([own]) if ranks > 1 else [own]
        documents, places, right, blank = (np.concatenate(column) for column in zip(*everywhere, strict=True))
        order = np.lexsort((places, documents))
        return TargetNats(documents[order], places[order], right[order], blank[order])


def reliance_of(sums: np.ndarray) -> Reliance | None:
    """What images give the targets of a set, from the sums of its documents; None where nothing was compared.

    Example:
        >>> reliance_of(np.array([[4.0, 6.0, 2.0, 0.0], [4.0, 0.0, 0.0, 0.0]]))
        {'nats_per_target': 0.75, 'share_over_0.1': 0.25}
    """
    targets, nats, over, _ = sums.sum(axis=0).tolist()
    if not targets:
        return None
    return {"nats_per_target": nats / targets, "share_over_0.1": over / targets}
