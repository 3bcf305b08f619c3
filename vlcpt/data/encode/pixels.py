"""Bytes of patches become the numbers that the vision tower takes, equal to the processor's to the bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import ProcessorMixin
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor


@dataclass(frozen=True)
class PixelScales:
    """How bytes become what the vision tower takes, by the processor's own numbers.

    Args:
        mean, std: float32 (3, 1): of a channel, in bytes.
        width: Numbers of a patch: channels, frames, rows and columns.
    """

    mean: torch.Tensor
    std: torch.Tensor
    width: int


def pixel_scales(processor: ProcessorMixin) -> PixelScales | None:
    """The scales of a processor; None where it does something else with bytes, and must do it itself.

    Example:
        >>> from vlcpt import load_processor
        >>> from vlcpt.demo import base_path
        >>> pixel_scales(load_processor(base_path())).width
        1176
    """
    images, videos = processor.image_processor, processor.video_processor
    numbers = [
        (one.image_mean, one.image_std, one.rescale_factor, one.patch_size, one.temporal_patch_size)
        for one in (images, videos)
    ]
    is_known = type(images) is Qwen2VLImageProcessor and type(videos) is Qwen2VLVideoProcessor
    does_all = all(one.do_resize and one.do_rescale and one.do_normalize for one in (images, videos))
    if not is_known or not does_all or numbers[0] != numbers[1]:
        return None
    # As the processor joins the two steps.
    mean, std = (
        (torch.tensor(one) * (1.0 / images.rescale_factor)).reshape(3, 1)
        for one in (images.image_mean, images.image_std)
    )
    return PixelScales(mean, std, 3 * images.temporal_patch_size * images.patch_size**2)


_CHUNK = 256  # patches: their floats stay in a core's cache
_MANY_HUGE_PAGES = 2**26  # bytes: where memory is fragmented, to find as many takes longer than they save


def scaled_pixels(pixels: torch.Tensor, scales: PixelScales) -> torch.Tensor:
    """Patches as the vision tower takes them, equal to the processor's to the bit.

    Args:
        pixels: uint8 (P, D), or (P, D / frames) of an image, whose frame is given once; any other type is
            returned as it is.

    Returns:
        float32 (P, D), on the device of ``pixels``.

    Example:
        >>> scales = PixelScales(torch.full((3, 1), 127.5), torch.full((3, 1), 127.5), width=6)
        >>> scaled_pixels(torch.tensor([[0, 255, 0]], dtype=torch.uint8), scales).tolist()
        [[-1.0, -1.0, 1.0, 1.0, -1.0, -1.0]]
    """
    if pixels.dtype != torch.uint8:
        return pixels
    count, width = pixels.shape
    mean, std = (one.to(pixels.device, non_blocking=True) for one in (scales.mean, scales.std))
    shape = (count, 3, scales.width // width, width // 3)
    on_cpu = pixels.device.type == "cpu"
    if on_cpu and count * scales.width * 4 < _MANY_HUGE_PAGES:
        # numpy asks for huge pages: without them most of the time goes into page faults.
        found = torch.from_numpy(np.empty(shape, np.float32))
    else:
        found = torch.empty(shape, device=pixels.device)
    size = _CHUNK if on_cpu else max(count, 1)
    for part, out in zip(pixels.view(count, 3, width // 3).split(size), found.split(size), strict=True):
        # As torchvision's normalize does, so that every bit is the same.
        out.copy_(part.float().sub_(mean).div_(std).unsqueeze(2))
    return found.view(count, scales.width)
