"""A document becomes tokens, then a sample with positions."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from zlib import crc32

import numpy as np
import torch
from transformers import ProcessorMixin

from vlcpt.data.documents import Document, DocumentError, Image, Modality, Text, TurnEdge, Video
from vlcpt.data.encode.features import FeatureReader, FeatureStore, KeptMedium
from vlcpt.data.encode.pixels import PixelScales, scaled_pixels
from vlcpt.data.encode.positions import VisionBlock, mrope_positions
from vlcpt.data.encode.tokens import RunTokenizer, target_weight
from vlcpt.data.encode.vision import (
    DEFAULT_OPTIONS,
    EncodingOptions,
    PlacedMedium,
    TrainEos,
    VisionEncoder,
)

IGNORE_INDEX = -100
# What planning needs of a document. `length` ends with the last target; `pads` and `media` lie before it.
NUMBERS = np.dtype([*((name, "<i4") for name in (
    "tokens", "length", "targets", "pads", "media", "images", "videos", "without_context", "cut_edges",
    "untagged", "empty_spans", "checksum",
)), ("frame_pairs", "<f4")])  # fmt: skip


@dataclass(frozen=True, eq=False)
class TokenStream:
    """A complete document as tokens, before any pixel is decoded.

    Args:
        input_ids: int64 (T,).
        labels: int64 (T,): the id of a target, -100 elsewhere; ``labels[0]`` is -100.
        loss_weights: float32 (T,): 0 where there is no target.
        media: Each medium with its place, in order.
        without_context: Targets lost because nothing precedes them: 0 or 1.
        cut_edges: Span edges that cut a token.
        cuts: The tokens that follow them; empty for a prepared document, which does not keep them.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    loss_weights: np.ndarray
    media: tuple[PlacedMedium, ...]
    without_context: int
    cut_edges: int
    cuts: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def checksum(self) -> int:
        """31 bits of tokens, loss weights and media, which differ between texts of as many tokens."""
        ids = np.ascontiguousarray(self.input_ids, dtype="<i4").data
        of_both = crc32(np.ascontiguousarray(self.loss_weights, dtype="<f4").data, crc32(ids))
        # The pixels themselves are not read: what decides their places is.
        media = np.array([(*placed.grid_thw, placed.interval) for placed in self.media], dtype="<f8")
        return crc32(media.tobytes(), of_both) & 0x7FFFFFFF


def closed_stream(
    ids: Sequence[np.ndarray],
    weights: Sequence[np.ndarray],
    eos: int,
    eos_weight: float,
    *,
    media: Sequence[PlacedMedium] = (),
    cuts: Sequence[int] = (),
) -> TokenStream:
    """A document's tokens from those of its segments: closed, the first no target.

    Args:
        ids, weights: Tokens and loss weights, segment after segment.
        eos, eos_weight: The end of text.
        media, cuts: See :class:`TokenStream`.

    Example:
        >>> closed_stream([np.array([5, 6])], [np.array([1.0, 1.0])], 2, 0.0).labels.tolist()
        [-100, 6, -100]
    """
    input_ids = np.concatenate([*ids, [eos]], dtype=np.int64)
    loss_weights = np.concatenate([*weights, [eos_weight]], dtype=np.float32, casting="same_kind")
    without_context = int(loss_weights[0] > 0)
    loss_weights[0] = 0
    return TokenStream(
        input_ids=input_ids,
        labels=np.where(loss_weights > 0, input_ids, IGNORE_INDEX),
        loss_weights=loss_weights,
        media=tuple(media),
        without_context=without_context,
        cut_edges=len(cuts),
        cuts=tuple(cuts),
    )


def numbers_of(document: Document, stream: TokenStream) -> np.void:
    """What planning needs of a document: a scalar of ``NUMBERS``.

    Example:
        >>> stream = closed_stream([np.array([5, 6])], [np.array([1.0, 1.0])], 2, 0.0)
        >>> found = numbers_of(Document(()), stream)
        >>> found[["tokens", "length", "targets"]].item()
        (3, 2, 1)
    """
    targets = np.flatnonzero(stream.labels >= 0)
    length = int(targets[-1]) + 1 if len(targets) else 0
    kept = [placed for placed in stream.media if placed.stop <= length]
    numbers = np.zeros(1, NUMBERS)
    numbers[0] = (
        *(len(stream), length, len(targets), sum(one.tokens for one in kept), len(kept)),
        len(document.images),
        *(len(document.videos), stream.without_context, stream.cut_edges, not document.tagged),
        *(document.empty_spans, stream.checksum, sum(one.frame_pairs for one in kept)),
    )
    return numbers[0]


@dataclass(frozen=True)
class EncodedDocument(Document):
    """A document of a prepared data set: its media with their bytes, and its tokens in place of its text.

    Args:
        stream: Its tokens; the encoder places its media among them, as it does for any document.
        numbers: What planning was given of it: a scalar of ``NUMBERS``.
        folder: That of the prepared source, for messages.

    Example:
        >>> ids = np.array([5, 6])
        >>> stream = TokenStream(ids, np.array([-100, 6]), np.array([0.0, 1.0], np.float32), (), 0, 0)
        >>> len(EncodedDocument((), stream=stream, numbers=numbers_of(Document(()), stream)).stream)
        2
    """

    stream: TokenStream = field(kw_only=True, compare=False, repr=False)
    numbers: np.void = field(kw_only=True, compare=False, repr=False)
    folder: str = field(default="", kw_only=True, compare=False, repr=False)


_CONTROL_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|endoftext|>", "<|image_pad|>", "<|video_pad|>",
                   "<|im_start|>", "<|im_end|>")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Sample:
    """An encoded document, or one part of a long one.

    Args:
        input_ids: int64 (T,).
        labels: int64 (T,), -100 where there is no target.
        loss_weights: float32 (T,).
        position_ids: int64 (3, T): temporal, height, width.
        pixel_values: (P, D) patches of all images, or None: float32, or uint8 for
            :func:`vlcpt.data.encode.pixels.scaled_pixels`.
        image_grid_thw: int64 (I, 3), or None.
        pixel_values_videos: The same of all videos, or None.
        video_grid_thw: int64 (V, 3), or None.
        name: The document, for messages.
        source: The number of its source in the data set; -1 of a sample that comes from none.
        media: Its media in order, where features of theirs are kept; else empty. Only those without
            features then have pixels and a grid.
        image_features, video_features: Those that are kept, one medium after the other, or None.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_weights: torch.Tensor
    position_ids: torch.Tensor
    pixel_values: torch.Tensor | None = field(default=None, repr=False)
    image_grid_thw: torch.Tensor | None = None
    pixel_values_videos: torch.Tensor | None = field(default=None, repr=False)
    video_grid_thw: torch.Tensor | None = None
    name: str = "document"
    source: int = -1
    media: tuple[KeptMedium, ...] = ()
    image_features: torch.Tensor | None = field(default=None, repr=False)
    video_features: torch.Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.input_ids)


class DocumentEncoder:
    """Encodes documents for one processor and one set of options.

    Args:
        processor: A ``Qwen2_5_VLProcessor``.
        options: What the configuration says of it.
    """

    _features: FeatureReader | None = None

    def __init__(self, processor: ProcessorMixin, options: EncodingOptions = DEFAULT_OPTIONS) -> None:
        tokenizer = processor.tokenizer
        self.processor = processor
        self._vocabulary = len(tokenizer)
        self.options = options
        self.train_eos = options.train_eos
        self.runs = RunTokenizer(tokenizer)
        self.vision = VisionEncoder(processor, options)
        # By name, never `eos_token`: instruct tokenizers set that to <|im_end|>.
        self._start, self._end, self.eos, image, video, turn_start, turn_end = (
            _token_id(processor, token) for token in _CONTROL_TOKENS
        )
        self._pads = {Image: image, Video: video}
        self._turn_ids = {"start": turn_start, "end": turn_end}

    def tokens(self, document: Document) -> TokenStream:
        """The document's tokens and targets; of its media, only headers are read.

        A document that was encoded before has them with it: see ``vlcpt prepare``.

        Raises:
            DocumentError: If a medium cannot be used, or such tokens could not have been made here.
        """
        if isinstance(document, EncodedDocument):
            return self._kept_tokens(document)
        ids: list[np.ndarray] = []
        weights: list[np.ndarray] = []
        media: list[PlacedMedium] = []
        cuts: list[int] = []
        length = 0
        for kind, segments in groupby(document.segments, key=type):
            if kind is Text:
                try:
                    run = self.runs.tokenize([one for one in segments if isinstance(one, Text)])
                except DocumentError as error:
                    raise error.at(document.source) from None
                cuts += [length + place for place in run.cuts]
                ids.append(run.ids)
                weights.append(run.weights)
                length += len(run.ids)
                continue
            for other in segments:
                if isinstance(other, TurnEdge):
                    ids.append(np.array([self._turn_ids[other.kind]], dtype=np.int64))
                    weights.append(np.array([target_weight(other)], dtype=np.float32))
                    length += 1
                elif isinstance(other, Image | Video):
                    placed = self.vision.place(other, length, document)
                    ids.append(self._medium_ids(placed))
                    weights.append(np.zeros(placed.tokens + 2, dtype=np.float32))
                    media.append(placed)
                    length += placed.tokens + 2
        return closed_stream(ids, weights, self.eos, self.eos_weight(document), media=media, cuts=cuts)

    def _medium_ids(self, placed: PlacedMedium) -> np.ndarray:
        """The start token, the pads and the end token of a medium."""
        ids = np.full(placed.tokens + 2, self._pads[type(placed.medium)], dtype=np.int64)
        ids[0], ids[-1] = self._start, self._end
        return ids

    def _kept_tokens(self, document: EncodedDocument) -> TokenStream:
        """The tokens that came with a document, if this encoder could have made them."""
        ids, weights = document.stream.input_ids, document.stream.loss_weights
        # Far quicker than np.isin, for the few hundred tokens of most documents.
        is_start, is_end = ids == self._start, ids == self._end
        is_control = is_start | is_end | (ids == self._pads[Image]) | (ids == self._pads[Video])
        starts = np.flatnonzero(is_start).tolist()
        segments = [one for one in document.segments if isinstance(one, Image | Video)]
        if len(starts) != len(segments):
            raise _unsound(document, f"its tokens have {len(starts)} media, and its row {len(segments)}")
        # A medium's tokens follow from its header, as when it was prepared.
        media = [
            self.vision.place(medium, start, document) for medium, start in zip(segments, starts, strict=True)
        ]
        is_trained = weights[0] > 0 or weights[is_control].any()
        for placed in media:
            own = slice(placed.start, placed.stop)
            if np.array_equal(ids[own], self._medium_ids(placed)):
                is_control[own] = False
        if is_control.any():
            raise _unsound(document, "the tokens of its media are not those of their grids")
        if int(ids.max()) >= self._vocabulary:
            raise _unsound(document, f"token {ids.max()} is not among the tokenizer's {self._vocabulary:,}")
        if is_trained:
            raise _unsound(document, "its first token, or a medium, is a target")
        stream = replace(document.stream, media=tuple(media))
        if numbers_of(document, stream).item() != document.numbers.item():
            raise _unsound(document, "what it says for planning is not what its tokens give")
        return stream

    def sample(
        self,
        document: Document,
        stream: TokenStream,
        start: int = 0,
        stop: int | None = None,
        *,
        repeated: bool = False,
        pixels_of: tuple[Document | None, ...] | None = None,
    ) -> Sample:
        """The part ``start:stop`` of a document, with its pixels.

        Args:
            repeated: Whether the token at ``start`` was trained in the part before and is context here.
            pixels_of: The documents whose images and whose videos are seen instead of its own, on its
                grids; None for the mean colour.

        Raises:
            DocumentError: If a medium cannot be decoded.
        """
        stop = len(stream) if stop is None else stop
        media = [
            replace(placed, start=placed.start - start)
            for placed in stream.media
            if start <= placed.start and placed.stop <= stop
        ]
        labels = torch.from_numpy(stream.labels[start:stop].copy())
        loss_weights = torch.from_numpy(stream.loss_weights[start:stop].copy())
        if repeated:
            labels[0], loss_weights[0] = IGNORE_INDEX, 0
        blocks = [VisionBlock(placed.start + 1, placed.merged_grid, placed.interval) for placed in media]
        known = self._known(media, document) if pixels_of is None else []
        seen = (
            [placed for placed, (one, _) in zip(media, known, strict=True) if not one.is_kept]
            if known
            else media
        )
        image_source, video_source = pixels_of or (document, document)
        images, image_grids = self.vision.patches(seen, Image, document, image_source)
        videos, video_grids = self.vision.patches(seen, Video, document, video_source)
        return Sample(
            input_ids=torch.from_numpy(stream.input_ids[start:stop].copy()),
            labels=labels,
            loss_weights=loss_weights,
            position_ids=mrope_positions(stop - start, blocks),
            pixel_values=images,
            image_grid_thw=image_grids,
            pixel_values_videos=videos,
            video_grid_thw=video_grids,
            name=document.name,
            media=tuple(one for one, _ in known),
            image_features=_joined(known, "image"),
            video_features=_joined(known, "video"),
        )

    def use_features(self, store: FeatureStore | None) -> None:
        """Give samples features that a store has of their media, in place of pixels; None: pixels alone."""
        limits = self.options.limits
        self._features = None if store is None else FeatureReader(store, self.processor, limits)

    @property
    def reads_features(self) -> bool:
        """Whether samples get features of media that a store has."""
        return self._features is not None

    def _known(
        self, media: Sequence[PlacedMedium], document: Document
    ) -> list[tuple[KeptMedium, torch.Tensor | None]]:
        """Each medium with its features, as far as they are kept; empty where none are."""
        return [] if self._features is None else [self._features.look_up(one, document) for one in media]

    def eos_weight(self, document: Document) -> float:
        """The loss weight of the end of text: that of the last text with more than white space."""
        texts = (one for one in reversed(document.segments) if isinstance(one, Text))
        last_text = next((text for text in texts if not text.text.isspace()), None)
        trained = last_text is not None and last_text.trainable
        if self.train_eos == "never" or (self.train_eos == "auto" and not trained):
            return 0.0
        return target_weight(last_text) if last_text is not None and trained else 1.0


def scaled_sample(sample: Sample, scales: PixelScales | None) -> Sample:
    """A sample with its pixels as float32; see :func:`~vlcpt.data.encode.pixels.scaled_pixels`."""
    if scales is None:
        return sample
    images, videos = (
        None if one is None else scaled_pixels(one, scales)
        for one in (sample.pixel_values, sample.pixel_values_videos)
    )
    return replace(sample, pixel_values=images, pixel_values_videos=videos)


def encode_document(
    document: Document,
    processor: ProcessorMixin,
    *,
    media_root: str | None = None,
    train_eos: TrainEos = "auto",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
) -> Sample:
    """Encode one complete document: tokens, targets, positions and pixels.

    Args:
        document: What to encode.
        processor: A ``Qwen2_5_VLProcessor``.
        media_root: The folder that media paths start from and may not leave. Default: the
            document's own, as its reader set it; without either, the caller is trusted with paths.
        train_eos: Whether the closing ``<|endoftext|>`` is a target.
        min_pixels, max_pixels: Pixel limits of a medium after resizing; default: the processor's.
        fps, max_frames: Frames a second and in all to take from a video.

    Returns:
        The sample; T tokens, nothing trimmed or split; pixels as the processor gives them.

    Raises:
        DocumentError: If a medium cannot be used.

    Example:
        >>> from vlcpt import load_processor, parse_markup
        >>> from vlcpt.demo import base_path
        >>> document = parse_markup("one <trainable_text>two</trainable_text>")
        >>> sample = encode_document(document, load_processor(base_path()))
        >>> sample.position_ids.shape[1] == len(sample.labels)
        True
    """
    options = EncodingOptions(train_eos, min_pixels, max_pixels, fps, max_frames)
    cached = _encoders.get(processor)
    if cached is None or cached.options != options:
        _encoders[processor] = cached = DocumentEncoder(processor, options)
    if media_root is not None:
        document = replace(document, media_root=str(media_root))
    try:
        return scaled_sample(cached.sample(document, cached.tokens(document)), cached.vision.scales)
    except DocumentError as error:
        error.id = document.id
        raise


# Making the plain tokenizer of a 151,936-entry vocabulary takes a second: once per processor.
_encoders: weakref.WeakKeyDictionary[ProcessorMixin, DocumentEncoder] = weakref.WeakKeyDictionary()


def _joined(
    known: Sequence[tuple[KeptMedium, torch.Tensor | None]], modality: Modality
) -> torch.Tensor | None:
    """The features of all media of one kind, one after the other."""
    found = [features for one, features in known if one.modality == modality and features is not None]
    return torch.cat(found) if found else None


def _unsound(document: EncodedDocument, reason: str) -> DocumentError:
    return DocumentError(
        f"it is not as vlcpt prepares it ({reason}). Copy it again, or run vlcpt prepare again with "
        "--overwrite.",
        kind="source",
        source=document.source,
        field=document.folder,
    )


def _token_id(processor: ProcessorMixin, token: str) -> int:
    found = processor.tokenizer.convert_tokens_to_ids(token)
    if not isinstance(found, int) or processor.tokenizer.convert_ids_to_tokens(found) != token:
        raise ValueError(
            f"the tokenizer has no {token}. vlcpt needs a Qwen2.5-VL processor: "
            "load the folder or Hub id of one."
        )
    return found
