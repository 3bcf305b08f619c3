"""Image and video features that forward passes have in common: the first one makes them for the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlcpt.data.families import family_of
from vlcpt.model.tuning import base_model

T = TypeVar("T")
# By modality, as forward(mm_encoder_outputs=…) takes them (transformers 5.24).
Features = dict[str, BaseModelOutputWithPooling]
_PIXELS = ("pixel_values", "pixel_values_videos")


def see_alike(model: nn.Module, base: nn.Module) -> bool:
    """Whether two models make the same features of the same pixels.

    That is so where nothing of peft's stands in the vision tower or the merger, and both are the same modules
    or have equal weights: those of a model with its adapters on and off, and of one trained in full with its
    base, where these towers were frozen.

    Args:
        model: With its adapters on.
        base: Perhaps the same one, with its adapters off.

    Example:
        >>> from vlcpt import ModelConfig, load_model
        >>> from vlcpt.demo import base_path
        >>> frozen = load_model(ModelConfig(base_path(), lora_r=4))
        >>> trained = load_model(ModelConfig(base_path(), lora_r=4, train_merger=True))
        >>> see_alike(frozen, frozen), see_alike(trained, trained), see_alike(frozen, trained)
        (True, False, False)
    """
    seeing, other = _seeing(model), _seeing(base)
    if _is_adapted(seeing) or _is_adapted(other):
        return False
    if seeing is other:
        return True
    mine, theirs = seeing.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in mine
    )


def _seeing(model: nn.Module) -> nn.Module:
    """The vision tower of a model, its merger inside."""
    base = base_model(model)
    (path,) = family_of(base.config.model_type).towers["vision"]
    return base.get_submodule(path)


def _is_adapted(tower: nn.Module) -> bool:
    """Whether an adapter, or a copy that trained in full beside adapters, is in a tower."""
    # By where its class is from: the tuners that peft has, and will have, share no other sign.
    return any(type(module).__module__.startswith("peft.") for module in tower.modules())


@contextmanager
def kept_features(model: nn.Module) -> Iterator[Features]:
    """What the forward pass inside makes of images and videos; filled when it is over.

    Taken from the model's own output, so that the features are those of that pass to the bit, whatever
    engine, autocast or hook is around it, and no tower is called that the pass does not call.

    Example:
        >>> from vlcpt import ModelConfig, load_model
        >>> from vlcpt.demo import base_path
        >>> model = load_model(ModelConfig(base_path()))
        >>> with torch.no_grad(), kept_features(model) as features:
        ...     _ = model(input_ids=torch.tensor([[1, 2]]))
        >>> features  # there was nothing to see
        {}
    """
    found: Features = {}

    def keep(module: nn.Module, args: object, output: object) -> None:
        for modality in ("image", "video"):
            seen = getattr(output, f"{modality}_outputs", None)
            if seen is not None:  # without the tower's other states, which are larger
                found[modality] = BaseModelOutputWithPooling(pooler_output=seen.pooler_output)

    handle = base_model(model).base_model.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def with_features(inputs: Mapping[str, T], features: Features) -> dict[str, T | Features]:
    """The arguments of a forward pass, with features in place of the pixels that they were made of.

    Args:
        inputs: Those of the pass that made them.
        features: As :func:`kept_features` gives them; without any, nothing is changed.

    Example:
        >>> with_features({"input_ids": 1, "pixel_values": 2}, {"image": BaseModelOutputWithPooling()}).keys()
        dict_keys(['input_ids', 'mm_encoder_outputs'])
    """
    if not features:
        return dict(inputs)
    return {name: value for name, value in inputs.items() if name not in _PIXELS} | {
        "mm_encoder_outputs": features
    }
