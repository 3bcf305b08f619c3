"""The documents of a plan by their number, each read anew: whole, or up to its first trained span."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from vlcpt.data.documents import Document
from vlcpt.data.encode.encoder import DocumentEncoder, Sample, TokenStream, scaled_sample
from vlcpt.data.encode.vision import PlacedMedium
from vlcpt.data.media.files import MediaError, media_folder
from vlcpt.data.media.thumbnails import data_uri, thumbnails
from vlcpt.data.plan.plan import Plan
from vlcpt.data.sources import DocumentSource


class Opening(NamedTuple):
    """A document up to where its first trained span begins, of a long one its first part that has a target.

    Args:
        document: The document.
        sample: What comes before, with its pixels.
        media: Images and videos of that, in order.
        truth: The tokens of the span, end-of-text included where it is one: int64 (N,).
    """

    document: Document
    sample: Sample
    media: tuple[PlacedMedium, ...]
    truth: np.ndarray


class Documents(Sequence[Document]):
    """The documents of a data set that are read, in the order of sources and rows; each is read anew.

    Args:
        plan: Which are read.
        sources: Where.
        encoder: Encodes them.
    """

    def __init__(self, plan: Plan, sources: Sequence[DocumentSource], encoder: DocumentEncoder) -> None:
        self._plan, self._sources, self._encoder = plan, sources, encoder

    def __len__(self) -> int:
        return len(self._plan.documents)

    @overload
    def __getitem__(self, number: int) -> Document: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Document]: ...
    def __getitem__(self, number: int | slice) -> Document | Sequence[Document]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        source, row = self._plan.documents[number].tolist()
        return self._sources[source].document(row)

    def encoded(self, number: int) -> tuple[Document, TokenStream]:
        """A document and its tokens, by its number."""
        document = self[number]
        return document, self._encoder.tokens(document)

    def media_first(self) -> list[int]:
        """The numbers of all documents, those that have an image or a video first."""
        having = np.concatenate([self._plan.rows_with(one) for one in ("images", "videos")])
        has_media = {tuple(one) for one in having.tolist()}
        documents = [tuple(one) for one in self._plan.documents.tolist()]
        return sorted(range(len(documents)), key=lambda number: documents[number] not in has_media)

    def after(self, having: np.ndarray, source: int, row: int) -> Document | None:
        """The one that follows a document, in a circle, among those that have a medium; None if none does.

        Args:
            having: Those, as :meth:`vlcpt.data.plan.plan.Plan.rows_with` gives them.
        """
        place = np.flatnonzero((having == (source, row)).all(axis=1))
        if len(having) < 2 or not len(place):
            return None
        source, row = having[(place[0] + 1) % len(having)].tolist()
        return self._sources[source].document(row)

    def opening(self, number: int) -> Opening:
        """A document, by its number, up to its first trained span."""
        document, line = self[number], self._plan.first_line(number)
        stream = self._encoder.tokens(document)
        start = int(line["start"])
        labels = stream.labels[start + int(line["repeated"]) :]
        first = int((labels >= 0).argmax())
        truth = labels[first:][np.logical_and.accumulate(labels[first:] >= 0)]
        stop = start + int(line["repeated"]) + first
        media = (one for one in stream.media if start <= one.start and one.stop <= stop)
        sample = self._encoder.sample(document, stream, start, stop)
        return Opening(document, scaled_sample(sample, self._encoder.vision.scales), tuple(media), truth)

    def pictures(self, opening: Opening, most: int, side: int) -> list[str]:
        """Small pictures of the last images and videos of an opening, as addresses that hold them.

        Args:
            most: How many media at most, one picture each; for a video a frame in its middle.
            side: Pixels of the longer side, at most.

        Returns:
            In order, with an empty text for one that cannot be decoded.
        """
        root = media_folder(opening.document)
        return [self._picture(one, root, side) for one in opening.media[-most:]]

    def _picture(self, placed: PlacedMedium, root: Path | None, side: int) -> str:
        limits = self._encoder.options.limits
        try:
            small = thumbnails(placed.medium, placed.clip, media_root=root, limits=limits, side=side)
        except (MediaError, OSError):  # a picture is for people only
            return ""
        return data_uri(small[len(small) // 2])
