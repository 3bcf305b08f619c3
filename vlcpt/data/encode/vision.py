"""A medium becomes a grid of tokens, then patches: through the processor's own classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image as PILImage
from torchvision.transforms.v2.functional import resize
from transformers import ProcessorMixin
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vlcpt.data.documents import Document, DocumentError, Image, Medium, Video, modality_of
from vlcpt.data.encode.pixels import pixel_scales
from vlcpt.data.media.cut import check_container
from vlcpt.data.media.files import media_folder
from vlcpt.data.media.open import (
    DEFAULT_LIMITS,
    MediaError,
    MediaLimits,
    giants_in_turn,
    image_size,
    read_image,
    without_cache,
)
from vlcpt.data.media.videos import Clip, clip_of, read_video

TrainEos = Literal["auto", "always", "never"]
MediaCheck = Literal["header", "container", "pixels"]


@dataclass(frozen=True)
class EncodingOptions:
    """What a configuration says of it, by its own names.

    Args:
        train_eos: Whether the closing ``<|endoftext|>`` is a target: ``auto`` where the last text
            that is not white space is.
        min_pixels, max_pixels: Pixel limits of a medium after resizing; default: the processor's.
        fps, max_frames: Frames a second and in all to take from a video.
        limits: What a media file may be.
        media_check: What is read of a medium before its pixels are needed: its header, which is all that
            tokens need; its container, so that a cut file is found; or all of it.
    """

    train_eos: TrainEos = "auto"
    min_pixels: int | None = None
    max_pixels: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    limits: MediaLimits = DEFAULT_LIMITS
    media_check: MediaCheck = "header"


DEFAULT_OPTIONS = EncodingOptions()


DEFAULT_FPS = 2.0
DEFAULT_MAX_FRAMES = 768


@dataclass(frozen=True)
class PlacedMedium:
    """A medium, how many tokens it takes, and where they stand.

    Args:
        medium: The reference.
        start: Index of its vision start token.
        grid_thw: Patches in time, height and width, before merging, as ``image_grid_thw`` has them.
        size: Height and width in pixels as shown, before resizing.
        min_pixels: The lower limit that applied.
        merge: Patches merged along each side.
        patch: Pixels of a patch along each side.
        interval: Position steps between two temporal grids.
        clip: Which frames were chosen; None for images.
    """

    medium: Medium
    start: int
    grid_thw: tuple[int, int, int]
    size: tuple[int, int]
    min_pixels: int
    merge: int
    patch: int
    interval: float = 1.0
    clip: Clip | None = None

    @property
    def merged_grid(self) -> tuple[int, int, int]:
        """(T, H, W) in tokens."""
        time, height, width = self.grid_thw
        return time, height // self.merge, width // self.merge

    @property
    def pixels_per_token(self) -> int:
        """Pixels of a frame that one token stands for."""
        return (self.patch * self.merge) ** 2

    @property
    def tokens(self) -> int:
        """Pad tokens; start and end token not counted."""
        time, height, width = self.merged_grid
        return time * height * width

    @property
    def frame_pairs(self) -> int:
        """Pairs of its pad tokens within a frame, or two: those that full attention in the tower joins."""
        time, height, width = self.merged_grid
        return time * (height * width) ** 2

    def tokens_at(self, max_pixels: int) -> int:
        """The pad tokens it takes with this ``max_pixels``.

        A lower limit can give a thin image more of them: ``smart_resize`` counts its true area there,
        and not that of the whole tokens that it fills.
        """
        factor = self.patch * self.merge
        low = min(self.min_pixels, max_pixels)
        high = max_pixels if self.clip is None else max(max_pixels, int(low * 1.05))
        height, width = smart_resize(*self.size, factor, min_pixels=low, max_pixels=high)
        return self.grid_thw[0] * (height // factor) * (width // factor)

    @property
    def stop(self) -> int:
        """One past its vision end token."""
        return self.start + self.tokens + 2


class VisionEncoder:
    """Grids from headers, and patches from pixels, of one processor and one set of options."""

    def __init__(self, processor: ProcessorMixin, options: EncodingOptions) -> None:
        self._images = processor.image_processor
        self._videos = processor.video_processor
        self.scales = pixel_scales(processor)
        self._min_pixels, self._max_pixels = options.min_pixels, options.max_pixels
        self._fps = options.fps or DEFAULT_FPS
        self._max_frames = options.max_frames or DEFAULT_MAX_FRAMES
        self._limits, self._check = options.limits, options.media_check

    def place(self, medium: Medium, start: int, document: Document) -> PlacedMedium:
        """The grid of a medium whose vision start token is token ``start``, from its header."""
        clip, frames, time, interval = None, 1, 1, 1.0
        size, root = self._size(medium), media_folder(document)
        low, high = size["shortest_edge"], size["longest_edge"]
        with medium_errors(medium, document):
            if self._check != "header":  # first: that a file is cut says more than what its header then lacks
                check_container(medium, media_root=root, limits=self._limits)
            if isinstance(medium, Image):
                processor = self._images
                shown = image_size(medium, media_root=root, limits=self._limits)
            else:
                processor, clip = self._videos, self._clip(medium, root)
                shown, frames = (clip.height, clip.width), len(clip.indices)
            self._refuse_enlarging(medium, low, frames)
            patch, merge = processor.patch_size, processor.merge_size
            if clip is not None:
                # The budget of a video, shared by its frames: `cap_pixels_per_frame` of transformers 5.23.
                total = int(processor.max_video_tokens * (patch * merge) ** 2 * 0.9)
                high = max(min(high, total * processor.temporal_patch_size // frames), int(low * 1.05))
                time = -(-frames // processor.temporal_patch_size)
                interval = processor.temporal_patch_size / clip.sample_fps * self.tokens_per_second
            try:
                height, width = smart_resize(*shown, factor=patch * merge, min_pixels=low, max_pixels=high)
            except ValueError as error:  # sides of more than 1:200
                raise MediaError(f"{medium} has {shown[0]} × {shown[1]} pixels: {error}. Crop it.") from None
            if self._check == "pixels":
                self._decode(medium, shown, clip, root)
        grid = (time, height // patch, width // patch)
        return PlacedMedium(medium, start, grid, shown, low, merge, patch, interval, clip)

    def _decode(self, medium: Medium, shown: tuple[int, int], clip: Clip | None, root: Path | None) -> None:
        """Raise if the pixels cannot be read as the header says."""
        if clip is not None and isinstance(medium, Video):
            read_video(medium, clip, media_root=root, limits=self._limits)
        if not isinstance(medium, Image):
            return
        with giants_in_turn(shown[0] * shown[1]):
            width, height = read_image(medium, media_root=root, limits=self._limits).size
        if (height, width) != shown:
            raise MediaError(
                f"{medium} decodes to {height} × {width} pixels, but its header promised "
                f"{shown[0]} × {shown[1]}. Write the file again."
            )

    def _clip(self, video: Video, root: Path | None) -> Clip:
        return clip_of(
            video, fps=self._fps, max_frames=self._max_frames, media_root=root, limits=self._limits
        )

    # Of the vision config: 2 in every published Qwen2.5-VL; the processor does not carry it.
    tokens_per_second = 2

    def patches(
        self,
        placed: Sequence[PlacedMedium],
        kind: type[Image] | type[Video],
        document: Document,
        pixels_of: Document | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Patches (P, D) and grids (N, 3) int64 of the media of one kind; None without any.

        Patches are bytes for :func:`scaled_pixels`, those of images with one frame, or float32 where the
        processor has no scales and for the mean colour.

        Args:
            placed: The media of a sample.
            kind: Those wanted.
            document: Theirs.
            pixels_of: The document whose media are seen: ``document``, or another whose pixels are
                brought to these grids, or None for the mean colour, which is 0 after normalising.
        """
        mine = [one for one in placed if isinstance(one.medium, kind)]
        if not mine:
            return None, None
        grids = torch.tensor([one.grid_thw for one in mine])
        if pixels_of is document:
            own = [self._one(one.medium, one, document) for one in mine]
            return own[0] if len(own) == 1 else torch.cat(own), grids  # photos take tens of megabytes
        if pixels_of is None:
            width = 3 * self._images.temporal_patch_size * self._images.patch_size**2
            return torch.zeros(int(grids.prod(dim=1).sum()), width), grids
        others = pixels_of.images if kind is Image else pixels_of.videos
        found = [self._one(others[number % len(others)], one, pixels_of) for number, one in enumerate(mine)]
        return torch.cat(found), grids

    def _one(self, medium: Medium, placed: PlacedMedium, document: Document) -> torch.Tensor:
        """Patches of ``medium`` on the grid of ``placed``, which is its own unless pixels are swapped."""
        own = medium is placed.medium
        root = media_folder(document)
        height, width = (side * placed.patch for side in placed.grid_thw[1:])
        size = self._size(medium) if own else dict.fromkeys(("shortest_edge", "longest_edge"), height * width)
        with medium_errors(medium, document):
            if isinstance(medium, Image):
                stored = placed.size if own else image_size(medium, media_root=root, limits=self._limits)
                with giants_in_turn(stored[0] * stored[1]):
                    picture = read_image(medium, media_root=root, limits=self._limits)
                    if not own:
                        picture = picture.resize((width, height))
                    patches, grid = self._image_patches(picture, size)
                    del picture  # hundreds of megabytes, which the next giant in turn would stand beside
            else:
                clip = placed.clip if own and placed.clip else self._clip(medium, root)
                frames = torch.from_numpy(read_video(medium, clip, media_root=root, limits=self._limits))
                frames = frames.permute(0, 3, 1, 2)
                if not own:  # as many frames as the grid has, the last one held
                    wanted = placed.grid_thw[0] * self._videos.temporal_patch_size
                    frames = frames[torch.arange(wanted).clamp(max=len(frames) - 1)]
                    frames = resize(frames, [height, width], antialias=True)
                patches, grid = self._video_patches(frames, size, capped=own)
            if grid != placed.grid_thw:
                raise MediaError(
                    f"{medium} decodes to the grid {list(grid)} but its header promised "
                    f"{list(placed.grid_thw)}. The file is damaged or was changed during the run."
                )
        return patches

    def _image_patches(
        self, picture: PILImage.Image, size: dict[str, int]
    ) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Patches of an RGB image, and its grid."""
        one = self._images
        if self.scales is None:
            made = one([picture], size=size, return_tensors="pt")
            return made["pixel_values"], tuple(made["image_grid_thw"][0].tolist())
        # The processor's own steps, but on one frame of bytes: its results do not depend on the layout, and
        # channels that lie together are resized six times as fast.
        pixels = torch.from_numpy(_bytes_of(picture)).permute(2, 0, 1)[None]
        pixels = one.resize(pixels, SizeDict(**size), one.resample, one.patch_size * one.merge_size)
        patches = _frame_patches(pixels[0].numpy(), one.patch_size, one.merge_size)
        return torch.from_numpy(patches), (1, *(side // one.patch_size for side in pixels.shape[-2:]))

    def _video_patches(
        self, frames: torch.Tensor, size: dict[str, int], *, capped: bool
    ) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Patches of frames, uint8 (N, 3, height, width), and their grid."""
        one = self._videos
        if self.scales is None:
            made = one(
                [frames],
                size=size,
                do_sample_frames=False,
                cap_pixels_per_frame=capped,
                return_metadata=False,
                return_tensors="pt",
            )
            return made["pixel_values_videos"], tuple(made["video_grid_thw"][0].tolist())
        pixels = one.resize(
            frames[None],
            SizeDict(**size),
            one.resample,
            one.patch_size * one.merge_size,
            temporal_factor=one.temporal_patch_size,
            cap_pixels_per_frame=capped,
        )
        patches, *grid = one.patchify(pixels, one.patch_size, one.merge_size, one.temporal_patch_size)
        return patches[0], tuple(grid)

    def _size(self, medium: Medium) -> dict[str, int]:
        size = (self._images if isinstance(medium, Image) else self._videos).size
        low = medium.min_pixels or self._min_pixels or size["shortest_edge"]
        high = medium.max_pixels or self._max_pixels or size["longest_edge"]
        # A limit set alone wins over the processor's other one.
        if low > high:
            low, high = (low, low) if medium.max_pixels is None and self._max_pixels is None else (high, high)
        return {"shortest_edge": low, "longest_edge": high}

    def _refuse_enlarging(self, medium: Medium, low: int, frames: int = 1) -> None:
        """A row may ask for any ``min_pixels``; beyond the limits of files it takes all memory."""
        for most, name in (
            (self._limits.max_image_pixels, "max_image_pixels"),
            (self._limits.max_video_pixels // frames, "max_video_pixels"),
        ):
            if low > most:
                of = f" in each of {frames} frames" if frames > 1 else ""
                raise MediaError(
                    f"{medium}: min_pixels asks for more than {most:,} pixels{of}, which {name} forbids. "
                    "Lower min_pixels, or raise the limit."
                )


_STRIP = 128  # rows: in and out of them, a strip stays in a core's cache
_LARGE = 2**22  # bytes from which numpy asks for huge pages


def _bytes_of(picture: PILImage.Image) -> np.ndarray:
    """The bytes (height, width, 3) of an RGB image.

    Pillow hands out a copy of a copy, each in new pages; strips of a photo take a third of that time.
    """
    width, height = picture.size
    if width * height * 3 < _LARGE:
        return np.array(picture)
    found = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, _STRIP):
        below = min(top + _STRIP, height)
        found[top:below] = np.asarray(picture.crop((0, top, width, below)))
    return found


def _frame_patches(pixels: np.ndarray, patch: int, merge: int) -> np.ndarray:
    """Patches (P, 3 · patch²) of a frame (3, height, width) in the order of the processor's ``patchify``.

    numpy copies such bytes in half of torch's time, and its large arrays take few page faults.
    """
    channels, height, width = pixels.shape
    high, wide = height // (patch * merge), width // (patch * merge)
    parts = pixels.reshape(channels, high, merge, patch, wide, merge, patch)
    ordered = np.ascontiguousarray(parts.transpose(1, 4, 2, 5, 0, 3, 6))
    return ordered.reshape(-1, channels * patch * patch)


@contextmanager
def medium_errors(medium: Medium, document: Document) -> Iterator[None]:
    """Raise what is wrong with a medium as the error of its document.

    Raises:
        DocumentError: In place of a ``MediaError``.
    """
    try:
        yield
    except MediaError as error:
        field = f"{modality_of(medium)}s"
        reason = without_cache(str(error))
        raise DocumentError(reason, kind="medium", source=document.source, field=field) from None
