"""Going on from a checkpoint: its states are checked before Trainer loads them, its weights are restored.

Each state is compared with what this run has in its place, or given to something that is thrown away. So a
file that was broken, forged, or saved by another optimizer is one message, and no step is made with it.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import cast

import numpy as np
import torch
from huggingface_hub.dataclasses import type_validator
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import safe_globals

from vlcpt.model.adapters import read_adapter_config, read_adapter_shapes
from vlcpt.model.attention import with_attention
from vlcpt.model.saved import damaged, not_loaded
from vlcpt.model.weights import (
    UNREADABLE,
    compare_shapes,
    first_few,
    first_not_finite,
    read_archive,
    read_shapes,
    weight_files,
)
from vlcpt.run_files import step_of
from vlcpt.training.checkpoints.files import CheckpointError
from vlcpt.training.checkpoints.identity import differences, lora_facts

# States that are sums of squares: a negative one makes every later weight NaN.
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
_Entries = dict[str, object]
# What Trainer writes into ``trainer_state.json`` besides numbers and switches.
_NUMBER = int | float | bool | None
_PROGRESS = {
    "global_step": int,
    "train_batch_size": int,
    "log_history": list[_Entries] | None,
    "stateful_callbacks": dict[str, _Entries | list[_Entries]] | None,
    "best_model_checkpoint": str | None,
    "trial_name": str | None,
    "trial_params": _Entries | None,
}


def check_progress(folder: Path) -> None:
    """Refuse a ``trainer_state.json`` that is none.

    Raises:
        CheckpointError: With the key and what was found.
    """
    path = folder / "trainer_state.json"
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(path, "it is no JSON that can be read") from error
    if not isinstance(found, dict):
        raise _broken(path, "expected a JSON object")
    known = {one.name for one in fields(TrainerState)}
    if more := sorted(found.keys() - known):
        raise _broken(path, f"it has the key {more[0]!r}, which no state of a run has")
    for key, value in found.items():
        try:
            type_validator(key, value, _PROGRESS.get(key, _NUMBER))
        except TypeError as error:
            raise _broken(path, f"{key} is {_shortened(value)}, which no run writes") from error
    if missing := sorted({"global_step", "train_batch_size", "stateful_callbacks"} - found.keys()):
        raise _broken(path, f"it has no {missing[0]}")
    step, named = found["global_step"], step_of(folder)
    if not 0 < step < 2**31 or named not in (None, step):
        raise _broken(path, f"global_step is {step}, in the folder {folder.name}")


def check_random(folder: Path, rank: int, processes: int) -> None:
    """Refuse a saved random state that no generator takes.

    Raises:
        CheckpointError: With the file.
    """
    path = folder / ("rng_state.pth" if processes == 1 else f"rng_state_{rank}.pth")
    if not path.is_file():
        return  # of another number of processes: Trainer then restores none
    with safe_globals():  # NumPy's array, as Trainer allows it
        held = _read(path)
    try:
        assert isinstance(held, Mapping)
        random.Random().setstate(held["python"])
        np.random.RandomState().set_state(held["numpy"])
        torch.Generator().set_state(held["cpu"])
    except UNREADABLE as error:
        raise _broken(path, "it holds no state that a random generator takes") from error


def check_optimizer(folder: Path, optimizer: Optimizer) -> None:
    """Refuse an ``optimizer.pt`` that is not of this optimizer over these parameters, or not finite.

    Args:
        folder: That of the checkpoint.
        optimizer: That of this run, before anything is loaded into it.

    Raises:
        CheckpointError: With what was found.
    """
    path = folder / "optimizer.pt"
    held, now = _read(path), optimizer.state_dict()["param_groups"]
    groups, states = (held.get("param_groups"), held.get("state")) if isinstance(held, dict) else (None, None)
    if not isinstance(groups, list) or not isinstance(states, dict):
        raise _broken(path, "it holds no state of an optimizer")
    if len(groups) != len(now):
        raise _broken(path, f"it has {len(groups)} groups of parameters, and this run has {len(now)}")
    for group, mine in zip(groups, now, strict=True):
        name = f"its group {mine.get('name')}"
        if isinstance(group, dict):  # not every schedule notes it in the groups
            group = {key: value for key, value in group.items() if key != "initial_lr" or key in mine}
        _require_like(path, name, group, mine)
        if any(not 0 <= one < 1 for one in group.get("betas", ())):
            raise _broken(path, f"betas of {name} are {_shortened(group['betas'])}")
    count, expected = sum(len(group["params"]) for group in now), _states_after_a_step(optimizer)
    for number, state in states.items():
        is_known = number in range(count) and (expected is None or number in expected)
        if not is_known or not isinstance(state, dict):
            raise _broken(path, f"it has a state for parameter {_shortened(number)} of {count}")
        name = f"parameter {number}"
        # Of others than torch's own, states may be packed: of those, numbers have to be finite.
        _require_like(path, name, state, state if expected is None else expected[number])
        for key in state.keys() & set(_SQUARES):
            found = state[key]
            if not isinstance(found, torch.Tensor) or (found.is_floating_point() and bool((found < 0).any())):
                raise _broken(path, f"{key} of {name} holds negative numbers, or none, and sums up squares")


def _states_after_a_step(optimizer: Optimizer) -> dict[int, object] | None:
    """What such an optimizer keeps of each parameter, by a step without numbers; None: not known."""
    kind = type(inner := getattr(optimizer, "optimizer", optimizer))  # inside accelerate's
    if not kind.__module__.startswith("torch.optim"):
        return None
    groups = []
    for group in inner.param_groups:
        bare = [torch.nn.Parameter(torch.empty_like(one, device="meta")) for one in group["params"]]
        for one in bare:
            one.grad = torch.empty_like(one)
        groups.append(
            {**group, "params": bare, **{key: None for key in ("fused", "foreach") if key in group}}
        )
    tried: Optimizer = kind(groups, lr=1e-3)  # type: ignore[call-arg]  # each of torch's has it
    tried.step()
    states: dict[int, object] = tried.state_dict()["state"]
    return states


def check_scheduler(folder: Path, scheduler: LRScheduler) -> None:
    """Refuse a ``scheduler.pt`` that is not of this scheduler: loading it sets whatever attributes it names.

    Raises:
        CheckpointError: With what was found.
    """
    path = folder / "scheduler.pt"
    held, now = _read(path), scheduler.state_dict()
    if not isinstance(held, dict) or not all(isinstance(key, str) for key in held):
        raise _broken(path, "it holds no state of a scheduler")
    for key in held.keys() - now.keys():
        if hasattr(scheduler, key):
            raise _broken(path, f"it would replace {key!r} of the scheduler")
    known = {key: value for key, value in held.items() if key in now}
    needed = {key: now[key] for key in now if key in held or key in ("base_lrs", "last_epoch")}
    _require_like(path, "it", known, needed)


def check_scaler(folder: Path, scaler: torch.amp.GradScaler | None) -> None:
    """Refuse a ``scaler.pt`` (``fp16``) that is not of such a scaler.

    Raises:
        CheckpointError: With what was found.
    """
    path = folder / "scaler.pt"
    if scaler is not None and path.is_file():
        _require_like(path, "it", _read(path), scaler.state_dict())


def _require_like(path: Path, name: str, held: object, mine: object) -> None:
    """Refuse a saved value that this run could not have in its place: by kind, entries, shape and range."""
    if isinstance(mine, dict) and isinstance(held, dict):
        if missing := [key for key in mine if key not in held]:
            raise _broken(path, f"{name} has no {missing[0]}: it was saved by another optimizer")
        if more := [key for key in held if key not in mine]:
            raise _broken(path, f"{name} has {_shortened(more[0])}: it was saved by another optimizer")
        for key, value in mine.items():
            _require_like(path, str(key) if name == "it" else f"{key} of {name}", held[key], value)
        return
    if isinstance(mine, torch.Tensor) and isinstance(held, torch.Tensor):
        if held.shape != mine.shape:
            raise _broken(
                path, f"{name} has the shape {tuple(held.shape)}, and this run's {tuple(mine.shape)}"
            )
        if first_not_finite([(name, held)]):
            raise _broken(path, f"{name} holds numbers that are not finite (NaN or infinity)")
        return
    if isinstance(mine, tuple | list) and isinstance(held, tuple | list) and len(held) == len(mine):
        for both in zip(held, mine, strict=True):
            _require_like(path, name, *both)
        return
    if mine is None or isinstance(mine, bool):
        is_like = held is None or isinstance(held, bool)
    elif isinstance(mine, int | float):
        is_like = isinstance(held, int | float) and not isinstance(held, bool) and _is_in_range(held, mine)
    else:
        is_like = type(held) is type(mine) and not isinstance(mine, tuple | list)
    if not is_like:
        raise _broken(path, f"{name} is {_shortened(held)}, where this run has {_shortened(mine)}")


def _is_in_range(held: float, mine: float) -> bool:
    return (math.isfinite(held) or not math.isfinite(mine)) and (held >= 0 or mine < 0)


def _read(path: Path) -> object:
    try:
        return read_archive(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _broken(path: Path, found: str) -> CheckpointError:
    return CheckpointError(str(damaged(path, found)))


def _shortened(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:80]}…"


def restore_weights(model: PreTrainedModel, checkpoint: str) -> None:
    """Load every tensor of a full fine-tuning checkpoint into the model in memory.

    Trainer of transformers 5.23 loads a checkpoint's Hub names into the in-memory names with
    ``strict=False``, which restores 1 of 57 tensors; tests/training/checkpoints/test_resume.py shows when
    that ends. Adapters it restores completely, so they are left to it.

    Raises:
        CheckpointError: If any tensor is missing, unexpected, or of another shape.
    """
    # The shapes are those of the model in memory, whatever config.json says: what it says could fill memory.
    config = with_attention(model.config, "sdpa")
    try:
        for file in weight_files(checkpoint):
            read_shapes(file)
        # float32 holds every bfloat16 exactly, and copying into the model rounds back to the same number.
        loaded = type(model).from_pretrained(
            checkpoint,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (SafetensorError, *UNREADABLE) as error:
        if isinstance(error, ValueError) and str(error).startswith(checkpoint):
            raise CheckpointError(str(error)) from error
        raise CheckpointError(not_loaded("model", checkpoint, error)) from error
    saved, info = cast("tuple[PreTrainedModel, dict[str, set[str]]]", loaded)  # not typed for loading info
    # from_pretrained warns of these, and makes up what is missing.
    wrong = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": sorted(str(one[0]) for one in info["mismatched_keys"]),
    }
    if any(wrong.values()):
        raise _other_tensors(checkpoint, wrong)
    model.load_state_dict(saved.state_dict())


def check_adapter(model: PeftModel, checkpoint: str) -> None:
    """Compare a checkpoint's adapter with the one in memory: Trainer and peft load what fits, silently.

    Raises:
        CheckpointError: If any tensor is missing, unexpected, or of another shape.
    """
    try:
        config = read_adapter_config(checkpoint)
        saved = read_adapter_shapes(Path(checkpoint))
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    mine = model.peft_config[model.active_adapter]
    if other := differences(lora_facts(config), lora_facts(mine)):
        raise CheckpointError(
            f"{checkpoint}/adapter_config.json is not that of the adapter in memory: {other}. Use the "
            "configuration that it was saved with, or another checkpoint."
        )
    expected = {
        # Under ZeRO-3 a parameter has lost its shape, and keeps it elsewhere.
        name: tuple(getattr(tensor, "ds_shape", tensor.shape))
        for name, tensor in get_peft_model_state_dict(model).items()
    }
    wrong = compare_shapes(expected, saved)
    if any(wrong.values()):
        raise _other_tensors(checkpoint, wrong)


def _other_tensors(checkpoint: str, wrong: dict[str, list[str]]) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint}: its tensors are not those of the model in memory: {first_few(wrong)}. Use the "
        "configuration, and the versions of transformers and peft, that it was saved with."
    )


class StepSeeds(TrainerCallback):
    """Seeds each step by the run's seed, the step and the rank, so that dropout is the same after a resume.

    Trainer restores the random state it saved, but loaders draw from the same stream when they start
    their workers: persistent ones once a process, and so at another step in a resumed run.

    Example:
        >>> args, state = TrainingArguments(output_dir="out", use_cpu=True), TrainerState()
        >>> StepSeeds().on_step_begin(args, state, TrainerControl())
        >>> first = torch.rand(1)
        >>> StepSeeds().on_step_begin(args, state, TrainerControl())
        >>> torch.equal(torch.rand(1), first)
        True
    """

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Seed torch, on every device."""
        # Each step of each rank has a number of its own, up to a million of them.
        torch.manual_seed(args.seed * 1_000_000 + state.global_step * args.world_size + args.process_index)
