"""Media of one token, for a batch that has none where ranks share the vision tower."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from transformers import ProcessorMixin

from vlcpt.data.documents import Modality
from vlcpt.data.encode.encoder import IGNORE_INDEX, Sample


def make_fillers(processor: ProcessorMixin, modalities: Iterable[Modality]) -> Mapping[Modality, Sample]:
    """One sample for each modality: a medium of the mean colour that takes a single token.

    Ranks that share a step must call the vision tower equally often: once a batch for its images and
    once for its videos. Where one of them has neither, ZeRO-3 waits for ever for its part of the tower's
    weights, and ZeRO-2 for its part of the gradients.

    Args:
        processor: A ``Qwen2_5_VLProcessor``.
        modalities: Those of any batch of the run.

    Example:
        >>> from vlcpt import load_processor
        >>> from vlcpt.demo import base_path
        >>> filler = make_fillers(load_processor(base_path()), ["image"])["image"]
        >>> len(filler), filler.image_grid_thw.tolist()
        (3, [[1, 2, 2]])
    """
    made: dict[Modality, Sample] = {}
    for modality in modalities:
        if modality not in ("image", "video"):
            raise ValueError(f"fill_modalities has {modality!r}. Its values are image and video.")
        is_image = modality == "image"
        one = processor.image_processor if is_image else processor.video_processor
        names = ("<|vision_start|>", "<|image_pad|>" if is_image else "<|video_pad|>", "<|vision_end|>")
        grid = torch.tensor([[1, one.merge_size, one.merge_size]])
        # 0 after normalising is the mean colour.
        patches = torch.zeros(one.merge_size**2, 3 * one.temporal_patch_size * one.patch_size**2)
        made[modality] = Sample(
            input_ids=torch.tensor(processor.tokenizer.convert_tokens_to_ids(list(names))),
            labels=torch.full((3,), IGNORE_INDEX),
            loss_weights=torch.zeros(3),
            position_ids=torch.arange(3).expand(3, -1),  # one token: a step in each direction
            pixel_values=patches if is_image else None,
            image_grid_thw=grid if is_image else None,
            pixel_values_videos=None if is_image else patches,
            video_grid_thw=None if is_image else grid,
            name=f"{modality} filler",
        )
    return made
