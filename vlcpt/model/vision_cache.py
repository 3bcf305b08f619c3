"""Features of a frozen vision tower, computed once: what they depend on, and batches that take them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

import torch
import xxhash
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlcpt.data.encode.features import FeatureStore, KeptMedium
from vlcpt.data.families import tower_of
from vlcpt.errors import ConfigError
from vlcpt.file_writes import WriteError
from vlcpt.model.tuning import base_model, unwrapped

logger = logging.getLogger(__name__)

FILL = "vlcpt prepare CONFIG --vision_cache DIR"
# Of a configuration: what says nothing of the features.
_WITHOUT_EFFECT = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
# Of which towers a model in memory has the weights: a data set may be read for another model than before.
_towers: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def open_store(
    model: nn.Module,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    converted: torch.dtype | None = None,
    patch_embedding: Literal["auto", "conv", "linear"] = "auto",
) -> FeatureStore:
    """The features of a model's vision tower and merger, as a run with these types computes them.

    Where parameters are partitioned, all ranks have to call it.

    Args:
        model: Before an engine wraps it: DeepSpeed converts the weights in place.
        folder: That of the features of all towers.
        dtype: The type to store them in; None: the one that the tower gives.
        autocast: The type of products, where the run uses autocast.
        converted: The type to which DeepSpeed converts the weights.
        patch_embedding: The setting, and not what a machine chooses by it: its timing would decide what is
            found, and where it chooses, on a GPU, bits depend on more than that.

    Raises:
        ConfigError: If the tower or the merger trains, or has an adapter.

    Example:
        >>> from vlcpt import ModelConfig, load_model
        >>> from vlcpt.demo import base_path
        >>> model = load_model(ModelConfig(base_path()))
        >>> store = open_store(model, Path("features"))
        >>> store.width, store.tower == open_store(model, Path("features"), autocast=torch.bfloat16).tower
        (128, False)
    """
    require_frozen(model)
    base = base_model(model)
    digest = xxhash.xxh3_128()
    config = base.config.vision_config.to_dict()
    facts = {name: value for name, value in config.items() if name not in _WITHOUT_EFFECT}
    what = [facts, str(dtype), str(autocast), patch_embedding]
    digest.update(json.dumps(what, sort_keys=True, default=str).encode())
    for name, weight in _weights(base):
        converts = converted is not None and weight.is_floating_point()
        plain = weight.detach().to("cpu", converted if converts else weight.dtype).contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().data)
    _towers.setdefault(base, set()).add(digest.hexdigest())
    width = int(base.config.vision_config.out_hidden_size)
    return FeatureStore(folder, digest.hexdigest(), width, dtype, autocast)


def require_frozen(model: nn.Module) -> None:
    """Refuse to keep features of a tower that will be another one after the next step.

    Raises:
        ConfigError: With the tower.

    Example:
        >>> from vlcpt import ModelConfig, load_model
        >>> from vlcpt.demo import base_path
        >>> require_frozen(load_model(ModelConfig(base_path(), train_merger=True)))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: vision_cache: the merger trains or has an adapter, ...
    """
    for name, parameter in model.named_parameters():
        is_changed = parameter.requires_grad or ".lora_" in name or ".modules_to_save." in name
        if is_changed and (tower := tower_of(name)) != "language":
            what = "merger" if tower == "merger" else "vision tower"
            raise ConfigError(
                f"vision_cache: the {what} trains or has an adapter, so its features change. Set "
                "train_vision: false and train_merger: false, or remove vision_cache."
            )


def _weights(base: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of vision tower and merger, those that ZeRO-3 has partitioned put together one by one."""
    for name, weight in sorted(base.model.visual.named_parameters()):
        with _gathered(weight):
            yield name, weight


def _gathered(weight: nn.Parameter) -> AbstractContextManager[object]:
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight])


def with_features(
    model: nn.Module, inputs: Mapping[str, object], *, must_keep: bool = False
) -> dict[str, object]:
    """A batch with the features of its media in place of pixels, where their store keeps them.

    Features that the store has not are computed, all of a kind in one call as the model itself would do it,
    and kept. A batch whose media are in no store stays as it is.

    Args:
        model: The one that trains, wrapped or not.
        inputs: What ``CPTDataCollator`` made, on the model's device.
        must_keep: Whether it is an error that features cannot be written; else a warning, once.

    Raises:
        ConfigError: If features are missing where parameters are partitioned: ranks would call the tower
            unequally often.
        WriteError: With ``must_keep``.
        ValueError: If :func:`open_store` was not called with this model, but with another one.
    """
    media = inputs.get("media")
    if media is None:
        return dict(inputs)
    assert isinstance(media, list)
    of_media = ("image_", "video_", "pixel_values")
    rest = {name: value for name, value in inputs.items() if not name.startswith(of_media)}
    del rest["media"]
    if "mm_encoder_outputs" in rest:  # of an earlier pass over the same batch
        return rest
    base = base_model(unwrapped(model))
    if not {one.store.tower for one in media} <= _towers.get(base, set()):
        raise ValueError(
            "a batch has features of another vision tower than this model's. Call use_features of its data "
            "set with open_store of this model, or with None."
        )
    outputs: dict[str, BaseModelOutputWithPooling] = {}
    for modality in _PIXELS:
        if mine := [one for one in media if one.modality == modality]:
            found = _features(base, inputs, modality, mine, must_keep=must_keep)
            # A tuple, as get_image_features of transformers 5.24 gives it.
            outputs[modality] = BaseModelOutputWithPooling(pooler_output=tuple(found))  # type: ignore[arg-type]
    return {**rest, "mm_encoder_outputs": outputs}


def _features(
    base: PreTrainedModel,
    inputs: Mapping[str, object],
    modality: str,
    media: Sequence[KeptMedium],
    *,
    must_keep: bool,
) -> list[torch.Tensor]:
    """The features of each medium of one kind, in order."""
    kept = inputs.get(f"{modality}_features")
    if isinstance(kept, torch.Tensor) and all(one.is_kept for one in media):
        return [kept]  # the model puts them together anyway
    sizes = [one.tokens for one in media if one.is_kept]
    found = iter(kept.split(sizes) if isinstance(kept, torch.Tensor) else ())
    missing = iter(_missing(base, inputs, modality, [one for one in media if not one.is_kept], must_keep))
    return [next(found if one.is_kept else missing) for one in media]


def _missing(
    base: PreTrainedModel,
    inputs: Mapping[str, object],
    modality: str,
    media: Sequence[KeptMedium],
    must_keep: bool,
) -> list[torch.Tensor]:
    """The features of media that have pixels in the batch."""
    pixels, grids = inputs[_PIXELS[modality]], inputs[f"{modality}_grid_thw"]
    assert isinstance(pixels, torch.Tensor)
    assert isinstance(grids, torch.Tensor)
    if len(grids) != len(media):
        raise ValueError(
            f"a batch has {len(grids)} {modality}s with pixels, but {len(media)} are to be kept. Make "
            "batches of the items of one CPTDataset, with a CPTDataCollator without fill_modalities."
        )
    # Looked for again: an earlier batch may have had the same medium, after a worker looked. So what is used
    # does not depend on how far workers read ahead.
    found = [one.store.get(one.key, one.tokens) for one in media]
    first: dict[str, int] = {}  # each that is computed, and where it comes first
    for place, (one, features) in enumerate(zip(media, found, strict=True)):
        if features is None:
            first.setdefault(one.key, place)
    places = list(first.values())
    bounds = {
        name: value
        for name, value in inputs.items()
        if name.startswith(f"{modality}_") and name not in (f"{modality}_grid_thw", f"{modality}_features")
    }
    if places and len(places) < len(media):
        # What the tower would get of all of them fits no longer.
        parts, bounds = pixels.split([one.tokens * _merge(base) for one in media]), {}
        pixels, grids = torch.cat([parts[place] for place in places]), grids[places]
    made = _computed(base, modality, pixels, grids, bounds, media[0].store) if places else ()
    computed = dict(zip(first, made, strict=True))
    if made:  # one copy of all: each would wait for the device
        copies = torch.cat(made).to("cpu").split([len(one) for one in made])
        for place, copy in zip(places, copies, strict=True):
            _keep(media[place], copy, must_keep=must_keep)
    return [
        (computed[one.key] if features is None else features).to(pixels.device)
        for one, features in zip(media, found, strict=True)
    ]


def _merge(base: PreTrainedModel) -> int:
    """Patches that make a token."""
    return int(base.config.vision_config.spatial_merge_size) ** 2


def _computed(
    base: PreTrainedModel,
    modality: str,
    pixels: torch.Tensor,
    grids: torch.Tensor,
    bounds: Mapping[str, object],
    store: FeatureStore,
) -> tuple[torch.Tensor, ...]:
    """The features of each medium, in the arithmetic of the run and the type of the store."""
    if any(hasattr(weight, "ds_id") for weight in base.model.visual.parameters()):
        raise ConfigError(
            f"vision_cache: features are missing in {store.folder}, and with deepspeed zero3 they cannot be "
            f"computed in training, where ranks would call the tower unequally often. Fill it ahead: {FILL}"
        )
    call = base.model.get_image_features if modality == "image" else base.model.get_video_features
    device = pixels.device.type
    with torch.no_grad(), torch.autocast(device, store.autocast, enabled=store.autocast is not None):
        found = call(pixels, grids, return_dict=True, **bounds).pooler_output
    return tuple(one.to(store.dtype or one.dtype) for one in found)


def _keep(medium: KeptMedium, features: torch.Tensor, *, must_keep: bool) -> None:
    try:
        medium.store.put(medium.key, features)
    except WriteError as error:
        if must_keep:
            raise
        if medium.store.folder not in _warned:
            _warned.add(medium.store.folder)
            logger.warning(
                "vision_cache: %s Training continues, and computes what is missing each time.", error
            )


_warned: set[Path] = set()  # folders that could not be written to: a warning for each, and not for each file
