"""What is in each item of a planned data set: its documents by name, and as a person sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from vlcpt.data.by_number import Documents
from vlcpt.data.documents import Document, DocumentError, Source, modality_of
from vlcpt.data.encode.encoder import DocumentEncoder, Sample, TokenStream
from vlcpt.data.encode.pieces import pieces_of, token_texts
from vlcpt.data.encode.vision import PlacedMedium
from vlcpt.data.media.files import MediaError, media_folder
from vlcpt.data.media.thumbnails import data_uri, thumbnails
from vlcpt.data.plan.failures import FailedSample
from vlcpt.data.plan.ledger import Ledger
from vlcpt.data.plan.plan import Plan
from vlcpt.data.plan.split import Part
from vlcpt.data.shown import ShownDocument, ShownMedium, ShownPack, ShownText
from vlcpt.data.sources import DocumentSource


class PlannedSample(NamedTuple):
    """A document, or a part of one, in a pack.

    Args:
        source: The number of its source; those of replay follow.
        row: Its number there.
        place: File and line, as messages have them.
        start, stop: Its tokens of the document.
        targets, media: How many of them are trained, and how many are of media.
    """

    source: int
    row: int
    place: str
    start: int
    stop: int
    targets: int
    media: int


class PlannedItems(Dataset[list[Sample | FailedSample]]):
    """What a plan put into each item, and the documents behind it, for people to look at."""

    _plan: Plan
    _sources: Sequence[DocumentSource]
    _states: Sequence[object]
    _encoder: DocumentEncoder
    _pack_of: np.ndarray
    _pack_ends: np.ndarray
    ledger: Ledger
    max_length: int
    packing: bool

    def __len__(self) -> int:
        return len(self._pack_ends)

    def names(self, index: int) -> list[str]:
        """The documents of an item, as messages call them."""
        samples = map(self._plan.sample, self._numbers(index))
        return [self._sources[source].document(int(line["row"])).name for source, line in samples]

    @property
    def documents(self) -> Documents:
        """The documents that are read."""
        return Documents(self._plan, self._sources, self._encoder)

    def document_numbers(self, index: int) -> list[int]:
        """For each sample of an item, the number of its document among :attr:`documents`."""
        return [int(one) for one in self._plan.document_numbers[self._numbers(index)]]

    def starts(self, index: int) -> list[int]:
        """For each sample of an item, its first token in its document."""
        return [int(self._plan.sample(number)[1]["start"]) for number in self._numbers(index)]

    def samples_of(self, index: int) -> list[PlannedSample]:
        """What an item holds, without reading it."""
        found = []
        for source, line in map(self._plan.sample, self._numbers(index)):
            row, *numbers = (int(line[name]) for name in ("row", "start", "stop", "targets", "media"))
            place = str(self._sources[source].rows.source(row))
            found.append(PlannedSample(source, row, place, *numbers))
        return found

    def show(self, index: int, *, pictures: bool = True) -> ShownPack:
        """An item as the prompt shows it, and a notebook with its pictures: documents, their targets marked.

        Args:
            index: That of the item.
            pictures: Whether to decode small pictures of its media.

        Raises:
            DocumentError: If a document can no longer be read.

        Example:
            >>> from vlcpt import CPTDataset, load_processor
            >>> from vlcpt.demo import base_path
            >>> rows = [{"id": "a", "text": "one <trainable_text>two</trainable_text>"}]
            >>> CPTDataset(rows, load_processor(base_path()), max_length=8).show(0)
            item 0 of 1: 3 of 8 tokens, 2 targets
            <BLANKLINE>
            a  3 tokens, 2 targets
            one« two<|endoftext|>»
        """
        samples, documents = self.samples_of(index), []
        for number, one in zip(self._numbers(index), samples, strict=True):
            document, stream = self._read(one.source, one.row, int(self._plan.sample(number)[1]["checksum"]))
            documents.append(_shown(document, stream, one, self._encoder, pictures=pictures))
        used, targets = sum(one.stop - one.start for one in samples), sum(one.targets for one in samples)
        title = f"item {index} of {len(self):,}: {used:,} of {self.max_length:,} tokens, {targets:,} targets"
        return ShownPack(title, documents)

    def __repr__(self) -> str:
        what = "packs" if self.packing else "samples"
        fill = "" if self.ledger.fill is None else f", {self.ledger.fill:.1%} full"
        return f"<CPTDataset: {len(self):,} {what} of {self.max_length:,} tokens{fill}; {self.ledger!r}>"

    def _repr_html_(self) -> str:
        return self.ledger._repr_html_()

    def _numbers(self, index: int) -> np.ndarray:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        index %= len(self)
        first = self._pack_ends[index - 1] if index else 0
        return self._pack_of[first : self._pack_ends[index]]

    def _read(self, source: int, row: int, checksum: int) -> tuple[Document, TokenStream]:
        """A document and its tokens, which must be those that were planned."""
        try:
            document = self._sources[source].document(row)
        except DocumentError as error:
            if self._sources[source].state() == self._states[source]:
                raise
            raise _changed(
                f"its file was changed since the run was planned, and now gives: {error.reason} Put it back "
                "as it was, or delete",
                error.source or self._sources[source].rows.source(row),
            ) from None
        stream = self._encoder.tokens(document)
        if stream.checksum != checksum:
            what = "its tokens and targets are not those that were planned: the row or a medium was"
            raise _changed(f"{what} changed since. Delete", document.source)
        return document, stream


def _shown(
    document: Document,
    stream: TokenStream,
    sample: PlannedSample,
    encoder: DocumentEncoder,
    *,
    pictures: bool,
) -> ShownDocument:
    """A document, or the part of it that a sample holds."""
    part = Part(sample.start, sample.stop, False, sample.targets)
    found: list[ShownText | ShownMedium] = []
    for piece in pieces_of(stream, [part], token_texts(encoder.processor.tokenizer)):
        if piece.is_trimmed or piece.kind in ("cut", "part"):
            continue
        last = found[-1] if found else None
        if piece.kind == "medium":
            found.append(_shown_medium(stream.media[piece.medium], document, encoder, pictures=pictures))
        elif isinstance(last, ShownText) and last.weight == piece.weight:  # «one»«two» is one span
            found[-1] = ShownText(last.text + piece.text, last.weight)
        else:
            found.append(ShownText(piece.text, piece.weight))
    title = f"{document.name}  {part.length:,} tokens, {sample.targets:,} targets"
    return ShownDocument(title + (", a later part" if sample.start else ""), found)


def _shown_medium(
    placed: PlacedMedium, document: Document, encoder: DocumentEncoder, *, pictures: bool
) -> ShownMedium:
    root = media_folder(document)
    name = f"{modality_of(placed.medium)} {placed.medium}"
    if not pictures:
        return ShownMedium(name, placed.tokens)
    try:
        small = thumbnails(
            placed.medium, placed.clip, media_root=root, limits=encoder.options.limits, side=160
        )
    except MediaError as error:
        return ShownMedium(f"{name} ({error})", placed.tokens)
    return ShownMedium(name, placed.tokens, [data_uri(one) for one in small])


def _changed(what: str, source: Source | None) -> DocumentError:
    reason = f"{what} the run's folder plan and start it again."
    return DocumentError(reason, kind="changed", source=source)
