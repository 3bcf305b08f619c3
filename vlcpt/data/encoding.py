"""A document becomes tokens, then a sample. The only module that knows the model's control tokens."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Literal

import numpy as np
import torch
from transformers import ProcessorMixin

from vlcpt.data.documents import Document, DocumentError, Image, Segment, Text, Video
from vlcpt.data.media import MediaLimits
from vlcpt.data.positions import VisionBlock, mrope_positions
from vlcpt.data.sound_tokens import require_sound_tokens
from vlcpt.data.streams import IGNORE_INDEX, EncodedDocument, TokenStream, closed_stream
from vlcpt.data.tokens import RunTokenizer, target_weight
from vlcpt.data.turn_edges import TurnEdge
from vlcpt.data.vision import PlacedMedium, VisionEncoder

TrainEos = Literal["auto", "always", "never"]
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
        pixel_values: float32 (P, D) patches of all images, or None.
        image_grid_thw: int64 (I, 3), or None.
        pixel_values_videos: float32 (P, D) patches of all videos, or None.
        video_grid_thw: int64 (V, 3), or None.
        name: The document, for messages.
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

    def __len__(self) -> int:
        return len(self.input_ids)


class DocumentEncoder:
    """Encodes documents for one processor and one set of options.

    Args:
        processor: A ``Qwen2_5_VLProcessor``.
        train_eos: Whether the closing ``<|endoftext|>`` is a target: ``auto`` where the last text
            that is not white space is.
        min_pixels, max_pixels: Pixel limits of a medium after resizing; default: the processor's.
        fps, max_frames: Frames a second and in all to take from a video.
        limits: What a media file may be.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        *,
        train_eos: TrainEos = "auto",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
        limits: MediaLimits | None = None,
    ) -> None:
        tokenizer = processor.tokenizer
        self._require_sound = _sound_tokens(processor)
        self.train_eos = train_eos
        self.runs = RunTokenizer(tokenizer)
        self.vision = VisionEncoder(
            processor,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            fps=fps,
            max_frames=max_frames,
            limits=limits or MediaLimits(),
        )
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
            self._require_sound(document)
            return document.stream
        ids: list[np.ndarray] = []
        weights: list[np.ndarray] = []
        media: list[PlacedMedium] = []
        length, cut_edges = 0, 0
        for is_text, segments in groupby(document.segments, key=_is_text):
            if is_text:
                texts = [segment for segment in segments if isinstance(segment, Text)]
                try:
                    run = self.runs.tokenize(texts)
                except DocumentError as error:
                    raise error.at(document.source) from None
                cut_edges += run.cut_edges
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
                    pads = np.full(placed.tokens + 2, self._pads[type(other)], dtype=np.int64)
                    pads[0], pads[-1] = self._start, self._end
                    ids.append(pads)
                    weights.append(np.zeros(len(pads), dtype=np.float32))
                    media.append(placed)
                    length += len(pads)
        return closed_stream(
            ids, weights, self.eos, self.eos_weight(document), media=media, cut_edges=cut_edges
        )

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
        image_source, video_source = pixels_of or (document, document)
        images, image_grids = self.vision.patches(media, Image, document, image_source)
        videos, video_grids = self.vision.patches(media, Video, document, video_source)
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
        )

    def eos_weight(self, document: Document) -> float:
        """The loss weight of the end of text: that of the last text with more than white space."""
        texts = (one for one in reversed(document.segments) if isinstance(one, Text))
        last_text = next((text for text in texts if not text.text.isspace()), None)
        trained = last_text is not None and last_text.trainable
        if self.train_eos == "never" or (self.train_eos == "auto" and not trained):
            return 0.0
        return target_weight(last_text) if last_text is not None and trained else 1.0


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
    """Encode one document whole: tokens, targets, positions and pixels.

    Args:
        document: What to encode.
        processor: A ``Qwen2_5_VLProcessor``.
        media_root: The folder that media paths start from and may not leave. Default: the
            document's own, as its reader set it; without either, the caller is trusted with paths.
        train_eos: Whether the closing ``<|endoftext|>`` is a target.
        min_pixels, max_pixels: Pixel limits of a medium after resizing; default: the processor's.
        fps, max_frames: Frames a second and in all to take from a video.

    Returns:
        The sample; T tokens, nothing trimmed or split.

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
    options = (train_eos, min_pixels, max_pixels, fps, max_frames)
    cached = _encoders.get(processor)
    if cached is None or cached[0] != options:
        encoder = DocumentEncoder(
            processor,
            train_eos=train_eos,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            fps=fps,
            max_frames=max_frames,
        )
        _encoders[processor] = cached = (options, encoder)
    if media_root is not None:
        document = replace(document, media_root=str(media_root))
    try:
        return cached[1].sample(document, cached[1].tokens(document))
    except DocumentError as error:
        error.id = document.id
        raise


# Making the plain tokenizer of a 151,936-entry vocabulary takes a second: once per processor.
_encoders: weakref.WeakKeyDictionary[ProcessorMixin, tuple[tuple[object, ...], DocumentEncoder]] = (
    weakref.WeakKeyDictionary()
)


def _sound_tokens(processor: ProcessorMixin) -> partial[None]:
    start, end, _, image, video, _, _ = (_token_id(processor, token) for token in _CONTROL_TOKENS)
    images, videos = processor.image_processor, processor.video_processor
    return partial(
        require_sound_tokens,
        vocabulary=len(processor.tokenizer),
        edges=(start, end),
        pads={Image: image, Video: video},
        squares={
            Image: (images.merge_size, images.patch_size),
            Video: (videos.merge_size, videos.patch_size),
        },
    )


def _is_text(segment: Segment) -> bool:
    return isinstance(segment, Text)


def _token_id(processor: ProcessorMixin, token: str) -> int:
    found = processor.tokenizer.convert_tokens_to_ids(token)
    if not isinstance(found, int) or processor.tokenizer.convert_ids_to_tokens(found) != token:
        raise ValueError(
            f"the tokenizer has no {token}. vlcpt needs a Qwen2.5-VL processor: "
            "load the folder or Hub id of one."
        )
    return found
