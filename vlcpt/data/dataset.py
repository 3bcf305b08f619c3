"""Which document is read when: a map-style data set of packs over sources that stay on disk."""

from __future__ import annotations

import copy
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash
from transformers import ProcessorMixin

from vlcpt.data.documents import Document, DocumentError, Modality
from vlcpt.data.encode.encoder import DocumentEncoder, Sample, TokenStream, scaled_sample
from vlcpt.data.encode.features import FeatureStore
from vlcpt.data.encode.vision import EncodingOptions, MediaCheck, TrainEos
from vlcpt.data.markup import Untagged
from vlcpt.data.media.open import MediaLimits
from vlcpt.data.plan.balance import PackCost, even_packs, kinds_of_packs
from vlcpt.data.plan.failures import FailedSample, Failures
from vlcpt.data.plan.ledger import Dropped
from vlcpt.data.plan.mix import plan_packs
from vlcpt.data.plan.plan import MAX_BAD_IN_A_ROW, Track, make_plan, untracked
from vlcpt.data.plan.scan import OnBadData, Reading
from vlcpt.data.plan.split import OnOverlong
from vlcpt.data.planned_items import PlannedItems
from vlcpt.data.prepared.fingerprint import require_same_encoding
from vlcpt.data.rows.base import MAX_ROW_BYTES
from vlcpt.data.sources import Sources, open_sources, require_distinct
from vlcpt.data.workers import WorkerBoard

PixelsOf = Literal["document", "next_document", "blank"]
LONG_BYTES = 160 << 20  # of long documents that a process keeps
_TOKEN_BYTES = 20  # of a token: its id, its label, its weight


class _LongDocuments:
    """The documents that were read last of those that are split, each with its tokens.

    The parts of a document lie in different packs, and each of them would tokenise all of it: 1 MB of text
    has 60 parts. Each loader worker has its own.

    Args:
        most: Bytes that are kept; of more, those that were used last, and one document at least.
    """

    def __init__(self, most: int = LONG_BYTES) -> None:
        self._most, self._bytes = most, 0
        self._kept: OrderedDict[tuple[int, int], tuple[Document, TokenStream, int]] = OrderedDict()

    def get(self, source: int, row: int) -> tuple[Document, TokenStream] | None:
        """A document that is kept."""
        if (found := self._kept.get((source, row))) is not None:
            self._kept.move_to_end((source, row))
        return None if found is None else found[:2]

    def keep(self, source: int, row: int, document: Document, stream: TokenStream) -> None:
        """Keep a document; others make room for it."""
        if (source, row) in self._kept:
            return
        media = sum(len(one.data or b"") for kind in (document.images, document.videos) for one in kind)
        size = _TOKEN_BYTES * len(stream) + media
        self._kept[source, row], self._bytes = (document, stream, size), self._bytes + size
        while len(self._kept) > 1 and self._bytes > self._most:
            self._bytes -= self._kept.popitem(last=False)[1][2]


class CPTDataset(PlannedItems):
    """Packs of samples, planned once: every document at least once a pass.

    Making it reads every row and every medium's header, and fills :attr:`ledger`; pixels are
    decoded when an item is read. Items and their order depend on the data and the seed alone,
    not on workers or ranks.

    Args:
        sources: A path, a mapping as in ``train_data``, or a list of these; or rows or Documents in
            memory, a ``datasets.Dataset`` included.
        processor: A ``Qwen2_5_VLProcessor``.
        max_length: Tokens of a pack, media included.
        packing: Whether an item holds as many samples as fit, or one.
        seed: Decides packs, repetition and replay.
        replay_data: Sources that are drawn from until they make up ``replay_share`` of all targets.
        replay_share: 0 ≤ share < 1.
        untagged, train_eos, on_overlong, on_bad_data, max_bad_fraction, max_row_bytes: See the configuration.
        max_documents: How many documents are read, drawn by ``seed`` from all that can be used; None: all.
            The ledger counts the others as ``not_drawn``.
        max_bad_in_a_row: With ``skip``, how many rows in a row that cannot be used stop it; None: no number.
        min_pixels, max_pixels, fps, max_frames, limits: Those of media; default: the processor's.
        media_check: What is read of a medium when the data set is made: see
            :class:`~vlcpt.data.encode.vision.EncodingOptions`.
        num_proc: Processes that read the rows, where enough is to be read; 0: this one alone. Nothing
            depends on it.
        timeout: Seconds in which each of them must come to another row, or planning stops; 0: any time.
        cache_dir: A folder for this data set alone: of processes that make it at the same time one reads, and
            the others and later starts use what it found. Delete it after changing media files, which are not
            looked at again, and only while no run uses it.
        track: What shows the progress of planning.

    Raises:
        DocumentError: At the first row that cannot be used, unless ``on_bad_data`` is ``skip``.

    Example:
        >>> from vlcpt import load_processor
        >>> from vlcpt.demo import base_path
        >>> rows = [{"text": "one <trainable_text>two</trainable_text>"}] * 3
        >>> dataset = CPTDataset(rows, load_processor(base_path()), max_length=64)
        >>> len(dataset), dataset.ledger.total.documents["used"]
        (1, 3)
    """

    _pixels_of: PixelsOf = "document"
    keeps_bytes = False  # whether items have pixels as they are decoded, for a collator that scales them

    def __init__(
        self,
        sources: Sources,
        processor: ProcessorMixin,
        *,
        max_length: int,
        packing: bool = True,
        seed: int = 0,
        replay_data: Sources = (),
        replay_share: float = 0.0,
        untagged: Untagged = "train",
        max_row_bytes: int = MAX_ROW_BYTES,
        train_eos: TrainEos = "auto",
        on_overlong: OnOverlong = "split",
        on_bad_data: OnBadData = "error",
        max_bad_fraction: float = 0.01,
        max_documents: int | None = None,
        max_bad_in_a_row: int | None = MAX_BAD_IN_A_ROW,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
        limits: MediaLimits | None = None,
        media_check: MediaCheck = "header",
        num_proc: int = 0,
        timeout: float = 1800,
        cache_dir: str | Path | None = None,
        track: Track = untracked,
    ) -> None:
        if not 0 <= replay_share < 1:
            raise ValueError(f"replay_share must be at least 0 and below 1; found {replay_share}.")
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, a target and its context; found {max_length}.")
        train = open_sources(sources, untagged, max_row_bytes=max_row_bytes)
        given = replay_data if replay_share else ()
        self._sources = [*train, *open_sources(given, untagged, "replay", "replay_data", max_row_bytes)]
        require_distinct(names := [source.name for source in self._sources])
        self._states = [source.state() for source in self._sources]  # before they are read
        options = EncodingOptions(
            train_eos, min_pixels, max_pixels, fps, max_frames, limits or MediaLimits(), media_check
        )
        require_same_encoding(self._sources, processor, untagged, options)
        self._encoder = DocumentEncoder(processor, options)
        plan = self._plan = make_plan(
            self._sources[: len(train)],
            self._sources[len(train) :],
            self._encoder,
            Reading(max_length, on_overlong, on_bad_data, max_bad_in_a_row, num_proc, timeout),
            replay_share=replay_share,
            seed=seed,
            max_bad_fraction=max_bad_fraction,
            max_documents=max_documents,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            track=track,
        )
        self.ledger, self.max_length, self.packing = plan.ledger, max_length, packing
        self._stops = on_bad_data == "error"
        self.failures = Failures(plan, names, max_bad_fraction, max_bad_in_a_row)
        self.board, self._long, self._seed = WorkerBoard(self.names), _LongDocuments(), seed
        self._pack()

    def _pack(self) -> None:
        """Which samples each item has, and what the ledger says of it."""
        self._with_images, self._with_videos = (self._plan.rows_with(one) for one in ("images", "videos"))
        # A shuffle first: packs take samples in this order, and are as mixed as it is.
        order = np.arange(len(self._plan), dtype=np.int32)
        np.random.default_rng(self._seed).shuffle(order)
        self._pack_of, self._pack_ends = order, np.arange(1, len(order) + 1, dtype=np.int32)
        lengths = self._plan.column("stop") - self._plan.column("start")
        fill = None
        if self.packing:
            # An array, not a list of a million objects; so are the numbers that come back.
            packed, ends = plan_packs(array("i", lengths[order].tobytes()), self.max_length)
            self._pack_of, self._pack_ends = order[np.asarray(packed)], np.asarray(ends)
            fill = round(int(lengths.sum(dtype=np.int64)) / (len(self) * self.max_length), 6)
        self._planned = self._pack_of, self._pack_ends
        self.ledger.samples, self.ledger.packs, self.ledger.fill = len(self._plan), len(self), fill

    def __getitem__(self, index: int) -> list[Sample | FailedSample]:
        """The samples of a pack. One that cannot be read after all comes as a :class:`FailedSample`."""
        numbers = self._numbers(index)
        with self.board.working_on(index % len(self)):
            return [self._sample_or_failure(number) for number in numbers]

    @property
    def has_media(self) -> bool:
        """Whether any document that is read has an image or a video."""
        return bool(self.modalities)

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Those of the documents that are read."""
        found: dict[Modality, np.ndarray] = {"image": self._with_images, "video": self._with_videos}
        return tuple(modality for modality, documents in found.items() if len(documents))

    @property
    def can_shuffle(self) -> bool:
        """Whether every document with an image, or with a video, has another one to swap with."""
        return self.has_media and 1 not in (len(self._with_images), len(self._with_videos))

    @property
    def digest(self) -> str:
        """The same for the same tokens and targets, planned in the same order, on whatever machine."""
        plan = xxhash.xxh3_128()
        names = ("source", "row", "start", "stop", "repeated", "targets", "media", "checksum")
        columns = (self._plan.column(name) for name in names)
        for part in (*columns, *self._planned):
            plan.update(np.ascontiguousarray(part, dtype=np.int64).data)
        return plan.hexdigest()

    @property
    def source_rows(self) -> dict[str, int]:
        """Rows of each source that were read, by its name."""
        scans = zip(self._sources, self._plan.scans, strict=True)
        return {source.name: scan.rows for source, scan in scans}

    def row_checksums(self) -> Iterator[np.ndarray]:
        """For each source: int32, a checksum of each row's tokens and targets; -1 of one that is not used."""
        for scan in self._plan.scans:
            found = np.full(scan.rows, -1, dtype=np.int32)
            found[scan.lines["row"]] = scan.lines["checksum"]
            yield found

    def row_name(self, source: int, row: int) -> str:
        """File and line of a row, as messages call it; after the last one, that it would be the next."""
        rows = self._sources[source].rows
        count = self._plan.scans[source].rows
        return str(rows.source(row)) if row < count else f"the end, after {rows.source(count - 1)}"

    def markings(self) -> list[str]:
        """How rows without a target get some, in the formats of the sources that have such rows."""
        having = (
            source.marking
            for source in self._sources
            if self.ledger.sources[source.name].dropped_documents["without_targets"]
        )
        return [how for how in dict.fromkeys(having) if how]

    def pack_sizes(self) -> np.ndarray:
        """int64 (packs, 3): tokens, targets and pad tokens of each item."""
        starts = np.append(0, self._pack_ends[:-1])
        stop, start, targets, media = (
            np.add.reduceat(self._of_packs(name), starts, dtype=np.int64)
            for name in ("stop", "start", "targets", "media")
        )
        return np.stack([stop - start, targets, media], axis=1)

    def balanced(self, cost: PackCost | None) -> CPTDataset:
        """The same samples in as many packs, as full and as mixed, that cost nearly the same.

        Args:
            cost: What a sample costs; None: the packs as they were planned.
        """
        if cost is None and self._pack_of is self._planned[0]:
            return self
        other = copy.copy(self)
        other._pack_of, other._pack_ends = self._planned
        if cost is not None and self.packing:
            lengths = other._of_packs("stop") - other._of_packs("start")
            places, other._pack_ends = even_packs(
                other._pack_ends, lengths, other._costs(cost), self.max_length, self._seed
            )
            other._pack_of = other._pack_of[places]
        other.board = WorkerBoard(other.names)  # which names the documents of the new packs
        return other

    def pack_costs(self, cost: PackCost, step: int) -> tuple[np.ndarray, np.ndarray]:
        """What each item costs, and its kind among those of so many a step: int64 (packs,) each.

        See :func:`~vlcpt.data.plan.balance.kinds_of_packs`.
        """
        starts = np.append(0, self._pack_ends[:-1])
        lengths = self._of_packs("stop") - self._of_packs("start")
        kinds = kinds_of_packs(self._of_packs("source"), lengths, self._pack_ends, step)
        return np.add.reduceat(self._costs(cost), starts), kinds

    def _costs(self, cost: PackCost) -> np.ndarray:
        """For each sample, pack after pack."""
        lengths = self._of_packs("stop") - self._of_packs("start")
        return cost.of(lengths, *(self._of_packs(name) for name in ("targets", "media", "frame_pairs")))

    def _of_packs(self, name: str) -> np.ndarray:
        """A column of the plan, pack after pack."""
        return self._plan.column(name)[self._pack_of]

    def longest(self, count: int) -> list[tuple[str, int]]:
        """Names of the longest documents, and their tokens up to the last target."""
        found: dict[tuple[int, int], int] = {}
        for number in np.argsort(-self._plan.column("stop"), kind="stable"):
            source, line = self._plan.sample(number)
            found.setdefault((source, int(line["row"])), int(line["stop"]))
            if len(found) == count:
                break
        return [(self._sources[source].document(row).name, stop) for (source, row), stop in found.items()]

    def with_pixels_of(self, pixels_of: PixelsOf) -> CPTDataset:
        """The same samples with other pixels: the next document's on the same grid, or none.

        How much worse the text is predicted then shows how far it relies on what is seen.
        """
        other = copy.copy(self)
        other._pixels_of = pixels_of
        return other

    def use_features(self, store: FeatureStore | None) -> None:
        """Give items the features of their media that a store has, in place of pixels; None: pixels alone."""
        self._encoder.use_features(store)

    @property
    def reads_features(self) -> bool:
        """Whether items get features of media that a store has, see :meth:`use_features`."""
        return self._encoder.reads_features

    def _sample_or_failure(self, number: int) -> Sample | FailedSample:
        source, line = self._plan.sample(number)
        row = int(line["row"])
        try:
            return self._sample(source, row, line)
        except DocumentError as error:
            dropped = Dropped.by(error, self._sources[source].rows.source(row))
            # What was changed is no bad row: nobody knows what else is another one now.
            stops = self._stops or error.kind in ("changed", "source")  # the latter: a prepared one
            return FailedSample(source, row, dropped, str(error), stops)

    def _sample(self, source: int, row: int, line: np.void) -> Sample:
        start, stop, repeated = (int(line[name]) for name in ("start", "stop", "repeated"))
        document, stream = self._long.get(source, row) or self._read(source, row, int(line["checksum"]))
        if len(stream) > self.max_length:
            self._long.keep(source, row, document, stream)
        pixels = None
        if self._pixels_of != "document":
            pixels = tuple(
                self.documents.after(others, source, row) if self._pixels_of == "next_document" else None
                for others in (self._with_images, self._with_videos)
            )
        encoded = self._encoder.sample(
            document, stream, start, stop, repeated=bool(repeated), pixels_of=pixels
        )
        sample = replace(encoded, source=source)
        return sample if self.keeps_bytes else scaled_sample(sample, self._encoder.vision.scales)
