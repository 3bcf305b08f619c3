"""What a run keeps of its frozen vision tower: which data sets read features in place of pixels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from vlcpt.config.precision import autocast_type
from vlcpt.config.training import CPTConfig
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.encode.features import FeatureStore
from vlcpt.errors import ConfigError
from vlcpt.model.vision_cache import FILL, open_store
from vlcpt.training.guards import asked_stage, converted_type

logger = logging.getLogger(__name__)


def keep_features(model: nn.Module, args: CPTConfig, datasets: Sequence[object]) -> bool:
    """Let data sets read features of media where ``vision_cache`` has them; whether it is asked for.

    No rank then calls the tower but for features that are missing, so no batch needs a filler. Where
    parameters are partitioned none may be missing.

    Args:
        model: Before an engine wraps it.
        args: Those of the run.
        datasets: All of the run, for training and evaluation.

    Raises:
        ConfigError: If the tower or the merger trains; or where parameters are partitioned, if the folder
            holds nothing of this tower, or a data set cannot read from it.
    """
    found = [one for one in datasets if isinstance(one, CPTDataset)]
    if args.vision_cache is None:
        for dataset in found:
            dataset.use_features(None)
        return False
    if len(found) < len(datasets):
        logger.warning("vision_cache is not used for data that is no CPTDataset: its pixels are used.")
    store, is_partitioned = run_store(model, args), asked_stage(args) == 3
    if is_partitioned and len(found) < len(datasets):
        raise ConfigError(
            "vision_cache with deepspeed zero3 needs a CPTDataset for all data. Remove one of them."
        )
    if is_partitioned and any(one.has_media for one in found) and not store.is_begun:
        raise ConfigError(
            f"vision_cache: {store.folder} has no features of this vision tower, and with deepspeed zero3 "
            f"they cannot be computed in training. Fill it ahead: {FILL}"
        )
    for dataset in found:
        dataset.use_features(store)
    return True


def run_store(model: nn.Module, args: CPTConfig) -> FeatureStore:
    """The features of a model's vision tower, in the arithmetic of a run.

    Raises:
        ConfigError: If the tower or the merger trains, or has an adapter.
    """
    return open_store(
        model,
        Path(str(args.vision_cache)),
        dtype=_asked_type(args),
        autocast=autocast_type(args) if asked_stage(args) is None else None,  # DeepSpeed converts
        converted=converted_type(args),
        patch_embedding=args.patch_embedding,
    )


def stored_type(weights: torch.dtype, args: CPTConfig) -> torch.dtype:
    """The type of the features that a run keeps.

    Args:
        weights: The type of the tower's weights, as loaded.

    Example:
        >>> stored_type(torch.float32, CPTConfig("out", use_cpu=True, bf16=True))
        torch.bfloat16
    """
    return _asked_type(args) or converted_type(args) or autocast_type(args) or weights


def _asked_type(args: CPTConfig) -> torch.dtype | None:
    asked = args.vision_cache_dtype
    return None if asked == "auto" else getattr(torch, asked)
