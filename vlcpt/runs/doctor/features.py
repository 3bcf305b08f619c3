"""What ``vision_cache`` must do: the same step, and no features of an earlier tower."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from vlcpt.config.yaml import Configs
from vlcpt.data.encode.features import FeatureStore
from vlcpt.data.families import SEEING
from vlcpt.errors import ConfigError
from vlcpt.model.tuning import base_model
from vlcpt.model.vision_cache import require_frozen
from vlcpt.report.doctor import Line, judged
from vlcpt.report.screen import Screen
from vlcpt.runs.doctor.steps import AroundSteps, difference, fast_step, one_batch, reference
from vlcpt.runs.doctor.subject import Subject, release
from vlcpt.runs.features import fill_sets
from vlcpt.training.guards import asked_stage
from vlcpt.training.ranks import on_any_rank, together

_AVOID = "Remove vision_cache, and report it."


class Passes(AroundSteps):
    """Counts forward passes of the vision tower."""

    def __init__(self) -> None:
        self.count = 0

    def begin(self, model: nn.Module) -> None:
        """Count from here on."""
        base_model(model).model.visual.register_forward_hook(self._note)

    def _note(self, module: nn.Module, given: object, output: object) -> None:
        self.count += 1


def cached_as_computed(subject: Subject, name: str) -> Line:
    """The step of the same documents with features that ``vlcpt prepare`` has computed, and after the tower
    has changed: then those that are kept belong to another one. The cache is a folder of doctor's own.
    """
    if trained := _trained(subject):
        return Line(name, "not run", detail=f"not used: {trained}")
    plain, right = reference(subject), fast_step(subject)
    folder = subject.folder / "features"
    try:
        store = _fill(subject, folder)
        passes = Passes()
        step = one_batch(subject, "cached", callbacks=[passes], vision_cache=str(folder))
        measured, tolerance, what = difference(step, plain, right)
        if on_any_rank(passes.count > 0):
            cause = (
                f"{passes.count} forward passes of the vision tower compute features that are kept: {_AVOID}"
            )
            return Line(name, "failed", measured, tolerance, detail=cause)
        cause = (
            f"with kept features the {what} of a step is off by {measured:.1e} from that without: {_AVOID}"
        )
        # ZeRO-3 computes none in training.
        if not on_any_rank(not measured <= tolerance) and asked_stage(subject.training) != 3:
            together(lambda: _spoil(subject, store))
            step = one_batch(subject, "changed", change=_change_tower, vision_cache=str(folder))
            error, most, what = difference(step, plain, right)
            if not error / most <= measured / tolerance:  # nor if it is not a number
                measured, tolerance = error, most
            cause = (
                f"after the vision tower has changed the {what} of a step is off by {error:.1e}: features of "
                f"the earlier tower are taken for its own. {_AVOID}"
            )
    finally:
        subject.singles.use_features(None)
    media = sum(1 for _ in store.folder.glob(f"{store.tower}/*/*.safetensors"))
    again = "" if asked_stage(subject.training) == 3 else ", computed again for a changed tower"
    return judged(name, measured, tolerance, cause=cause, detail=f"{media} images and clips{again}")


def _trained(subject: Subject) -> str:
    """Why the run cannot keep features; empty if it can."""
    trained = [tower for tower in SEEING if tower in subject.config.trained_towers]
    if trained:
        return f"the {' and the '.join(trained)} trains" if len(trained) == 1 else "vision and merger train"
    if subject.config.adapter_name_or_path is not None:  # it may have layers there
        try:
            require_frozen(subject.placed())
        except ConfigError as error:
            return str(error)
        finally:
            release()
    return ""


def _fill(subject: Subject, folder: Path) -> FeatureStore:
    """Keep the features of all media, as ``vlcpt prepare`` does, each rank its part."""
    args = subject.settings("features", vision_cache=str(folder))
    configs = Configs(subject.config, subject.early.data, args)
    store = fill_sets(configs, {"": subject.singles}, subject.processor, Screen(file=StringIO()))
    release()
    together(lambda: None)  # each rank reads what the others have computed
    return store


def _spoil(subject: Subject, store: FeatureStore) -> None:
    """Put noise in the place of features: whoever takes them has another loss."""
    if subject.training.process_index == 0:
        for path in store.folder.glob(f"{store.tower}/*/*.safetensors"):
            (kept,) = load_file(path).values()
            noise = torch.randn(kept.shape, generator=torch.Generator().manual_seed(0))
            store.put(path.stem, noise.to(kept.dtype))


def _change_tower(model: nn.Module) -> None:
    """Move one weight of the vision tower by as little as its type can: its features stay as they were."""
    weight = next(base_model(model).model.visual.parameters()).data.view(-1)
    sizes, limits = weight.abs(), torch.finfo(weight.dtype)
    # The smallest: a step of bfloat16 at a large one moves a loss by more than rounding does.
    place = sizes.where(sizes > limits.tiny, torch.inf).argmin()
    weight[place] *= 1 + limits.eps
