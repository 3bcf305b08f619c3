"""What an evaluation in training measures besides the loss: the same targets with blank images and videos."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from vlcpt.config.rules import shared_names
from vlcpt.config.training import CPTConfig
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.encode.features import KeptMedium
from vlcpt.errors import refuse
from vlcpt.model.tuning import base_model, unwrapped
from vlcpt.training.evaluate import row_sums
from vlcpt.training.guards import asked_stage

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
_OF_MEDIA = ("image_", "video_", "pixel_values")


def measures_blank(dataset: object, args: CPTConfig) -> bool:
    """Whether a set is also measured with blank images; the same on all ranks.

    Not where none of its documents has any, of a data set that does not say it, and with ``vision_cache``
    under ZeRO-3: blank images need the vision tower, which ranks would call unequally often there.
    """
    keeps_tower_out = args.vision_cache is not None and asked_stage(args) == 3
    has_media = isinstance(dataset, CPTDataset) and dataset.has_media
    return bool(args.eval_blank_images) and has_media and not keeps_tower_out


def sets_of(eval_dataset: object, args: CPTConfig) -> list[object]:
    """The data sets that are evaluated: one, or several by name.

    Raises:
        ConfigError: If numbers of two of them would be logged under one name.
    """
    if not isinstance(eval_dataset, Mapping):
        return [eval_dataset]
    if args.eval_blank_images:
        refuse(shared_names([*map(str, eval_dataset)]))
    return [*eval_dataset.values()]


def sums_with_blank(
    model: nn.Module,
    inputs: dict[str, object],
    args: CPTConfig,
    prepared: Callable[[dict[str, object]], dict[str, object]],
) -> torch.Tensor:
    """Σ nll, number of targets and Σ nll with blank images of each row: float64 (B, 3).

    The same batch twice, so that the same documents and the same targets are compared, of which none is read
    or decoded again.

    Args:
        model: The one that is measured, wrapped or not.
        inputs: A batch on the model's device.
        args: Those of the run.
        prepared: What makes of a batch what the model takes.
    """
    sums = row_sums(model, prepared(inputs), args.loss_chunk)
    blank = with_blank_media(model, inputs)
    # Where parameters are partitioned, ranks call the model equally often, whatever their batches hold.
    if blank is None and asked_stage(args) != 3:
        return torch.cat([sums, sums[:, :1]], dim=1)
    other = row_sums(model, prepared(inputs if blank is None else blank), args.loss_chunk)
    return torch.cat([sums, other[:, :1]], dim=1)


def with_blank_media(model: nn.Module, inputs: Mapping[str, object]) -> dict[str, object] | None:
    """A batch with the processor's mean colour in place of all its pixels, which is 0 after normalising.

    Media whose features are kept (``vision_cache``) get pixels again.

    Args:
        model: For which the batch is, wrapped or not.
        inputs: What ``CPTDataCollator`` made, its pixels scaled; it stays as it is.

    Returns:
        None where the batch has no media.

    Example:
        >>> batch = {"input_ids": torch.ones(1, 2), "pixel_values": torch.ones(4, 6)}
        >>> with_blank_media(nn.Identity(), batch)["pixel_values"].sum()
        tensor(0.)
        >>> with_blank_media(nn.Identity(), {"input_ids": torch.ones(1, 2)}) is None
        True
    """
    if isinstance(media := inputs.get("media"), list) and media:
        return _without_features(model, inputs, media)
    pixels = {
        name: torch.zeros_like(one)
        for name in _PIXELS.values()
        if isinstance(one := inputs.get(name), torch.Tensor)
    }
    return {**inputs, **pixels} if pixels else None


def _without_features(
    model: nn.Module, inputs: Mapping[str, object], media: Sequence[KeptMedium]
) -> dict[str, object]:
    """A batch whose media were to be kept, as it would be without a store, with blank pixels."""
    rest = {name: value for name, value in inputs.items() if not name.startswith(_OF_MEDIA)}
    del rest["media"]
    ids = inputs["input_ids"]
    assert isinstance(ids, torch.Tensor)
    vision = base_model(unwrapped(model)).config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    for modality, name in _PIXELS.items():
        if grids := [one.grid_thw for one in media if one.modality == modality]:
            found = torch.tensor(grids)
            rest[f"{modality}_grid_thw"] = found.to(ids.device)
            rest[name] = torch.zeros(int(found.prod(dim=1).sum()), width, device=ids.device)
    return rest
