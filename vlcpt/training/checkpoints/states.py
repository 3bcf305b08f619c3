"""The states in a checkpoint that Trainer takes as they are: looked at before they are used.

Each is compared with what this run has in its place, or tried on something that is thrown away. So a file
that was broken, forged, or saved by another optimizer is one message, and no step is made with it.
"""

from __future__ import annotations

import json
import math
import random
import re
import zipfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.dataclasses import type_validator
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from vlcpt.model.weights import UNREADABLE, damaged, first_not_finite, read_archive
from vlcpt.run_files import step_of
from vlcpt.training.checkpoints.files import CheckpointError

# States that are sums of squares: a negative one makes every later weight NaN.
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
_NUMBER = int | float | None
_Entries = dict[str, object]
# What Trainer writes into ``trainer_state.json`` that is no number.
_PROGRESS = {
    "global_step": int,
    "train_batch_size": int,
    "log_history": list[_Entries] | None,
    "stateful_callbacks": dict[str, _Entries | list[_Entries]] | None,
    "best_model_checkpoint": str | None,
    "trial_name": str | None,
    "trial_params": _Entries | None,
    "is_local_process_zero": bool,
    "is_world_process_zero": bool,
    "is_hyper_param_search": bool,
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
        return  # of another number of processes: Trainer then goes on without
    with safe_globals():  # NumPy's array, as Trainer allows it
        held = _read(path)
    try:
        assert isinstance(held, Mapping)
        random.Random().setstate(held["python"])
        np.random.RandomState().set_state(held["numpy"])
        torch.Generator().set_state(held["cpu"])
    except UNREADABLE as error:
        raise _broken(path, "it holds no state that a random generator takes") from error


def check_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an ``optimizer.pt`` that is not of this optimizer over these parameters, or not finite.

    Args:
        folder: Of the checkpoint.
        optimizer: Of this run, before anything is loaded into it.

    Raises:
        CheckpointError: With what was found.
    """
    path = folder / "optimizer.pt"
    held = _read(path)
    if not isinstance(held, dict) or not isinstance(held.get("state"), dict):
        raise _broken(path, "it holds no state of an optimizer")
    groups, now = held.get("param_groups"), optimizer.state_dict()["param_groups"]
    if not isinstance(groups, list) or not all(isinstance(one, dict) for one in groups):
        raise _broken(path, "it holds no state of an optimizer")
    if len(groups) != len(now):
        raise _broken(path, f"it has {len(groups)} groups of parameters, and this run has {len(now)}")
    for number, (group, mine) in enumerate(zip(groups, now, strict=True)):
        _check_group(path, number, group, mine)
    _check_states(path, held["state"], optimizer)


def check_scheduler(folder: Path, scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
    """Refuse a ``scheduler.pt`` that is not of this scheduler: loading it sets whatever attributes it names.

    Raises:
        CheckpointError: With what was found.
    """
    path = folder / "scheduler.pt"
    held, now = _read(path), scheduler.state_dict()
    if not isinstance(held, dict) or not all(isinstance(key, str) for key in held):
        raise _broken(path, "it holds no state of a scheduler")
    if missing := sorted({"base_lrs", "last_epoch"} & now.keys() - held.keys()):
        raise _broken(path, f"it has no {missing[0]}")
    for key, value in held.items():
        if key not in now and hasattr(scheduler, key):
            raise _broken(path, f"it would replace {key!r} of the scheduler")
        if key in now and not _is_like(value, now[key]):
            raise _broken(path, f"{key} is {_shortened(value)}, where this run has {_shortened(now[key])}")
    for key in ("base_lrs", "_last_lr"):
        if any(not math.isfinite(one) or one < 0 for one in held.get(key, ())):
            raise _broken(path, f"{key} is {_shortened(held[key])}, which is no learning rate")


def check_scaler(folder: Path) -> None:
    """Refuse a ``scaler.pt`` (``fp16``) that holds anything but finite numbers.

    Raises:
        CheckpointError: With what was found.
    """
    path = folder / "scaler.pt"
    if not path.is_file():
        return
    held = _read(path)
    if not isinstance(held, dict) or not all(_is_number(one) and math.isfinite(one) for one in held.values()):
        raise _broken(path, "it holds no state of a scaler of losses")


def check_archives(folder: Path) -> None:
    """Refuse what DeepSpeed would load, where a file of it is cut, compressed, or outside the checkpoint.

    Whether it may be loaded at all, see :mod:`vlcpt.training.checkpoints.files`: only DeepSpeed says more.

    Raises:
        CheckpointError: With the file.
    """
    path = folder / "latest"
    try:
        name = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise _broken(path, "it cannot be read") from error
    if not re.fullmatch(r"global_step\d+", name) or not (folder / name).is_dir():
        raise _broken(path, f"it names {_shortened(name)}, which is no folder of states in this checkpoint")
    states = sorted((folder / name).glob("*.pt"))
    if not states:
        raise _broken(folder / name, "it holds no states")
    for one in states:
        try:
            with zipfile.ZipFile(one) as archive:
                stored = all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
        except (OSError, zipfile.BadZipFile) as error:
            raise _broken(one, "it is cut, or no file that torch.save writes") from error
        if not stored:
            raise _broken(one, "it is compressed, which torch.save never does")


def _check_group(path: Path, number: int, group: Mapping[str, object], now: Mapping[str, object]) -> None:
    name = now.get("name", number)
    held, mine = group.get("params"), now["params"]
    assert isinstance(mine, list)
    if not isinstance(held, list) or len(held) != len(mine):
        count = len(held) if isinstance(held, list) else "no"
        raise _broken(path, f"its group {name} has {count} parameters, and this run's has {len(mine)}")
    for key, value in now.items():
        if key not in group:
            raise _broken(path, f"its group {name} has no {key}: it was saved by another optimizer")
        if key != "params" and not _is_like(group[key], value):
            raise _broken(path, f"{key} of its group {name} is {_shortened(group[key])}, where this run has "
                          f"{_shortened(value)}")  # fmt: skip
    if more := sorted(str(key) for key in group.keys() - now.keys() - {"initial_lr"}):
        raise _broken(path, f"its group {name} has {more[0]}: it was saved by another optimizer")
    for key in ("lr", "initial_lr", "weight_decay", "eps"):
        value = group.get(key)
        if isinstance(value, int | float) and (not math.isfinite(value) or value < 0):
            raise _broken(path, f"{key} of its group {name} is {value}")
    betas = group.get("betas", ())
    if isinstance(betas, tuple | list) and any(not 0 <= one < 1 for one in betas):
        raise _broken(path, f"betas of its group {name} are {_shortened(betas)}")


def _check_states(path: Path, states: Mapping[object, object], optimizer: torch.optim.Optimizer) -> None:
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    expected = _state_names(optimizer)
    for number, state in states.items():
        if not isinstance(number, int) or not 0 <= number < len(parameters) or not isinstance(state, dict):
            raise _broken(path, f"it has a state for parameter {_shortened(number)} of {len(parameters)}")
        if expected is not None and state.keys() != expected:
            raise _broken(
                path,
                f"its states are {', '.join(sorted(map(str, state)))[:80] or 'empty'}, and this optimizer's "
                f"are {', '.join(sorted(expected))}: it was saved by another one",
            )
        # Of others than torch's own, states may be packed or have a shape of their own.
        if expected is not None:
            for key, value in state.items():
                shape = tuple(getattr(value, "shape", ()))
                if shape not in ((), (1,), tuple(parameters[number].shape)):
                    raise _broken(
                        path,
                        f"{key} of parameter {number} has the shape {shape}, and the parameter "
                        f"{tuple(parameters[number].shape)}",
                    )
        _check_finite(path, number, state)


def _check_finite(path: Path, number: int, state: Mapping[object, object]) -> None:
    tensors = [(str(key), one) for key, one in state.items() if isinstance(one, torch.Tensor)]
    if (bad := first_not_finite(tensors)) is not None:
        raise _broken(
            path, f"{bad} of parameter {number} holds numbers that are not finite (NaN or infinity)"
        )
    for key, one in tensors:
        if key in _SQUARES and one.is_floating_point() and one.numel() and bool((one < 0).any()):
            raise _broken(
                path, f"{key} of parameter {number} holds negative numbers, and is a sum of squares"
            )


def _state_names(optimizer: torch.optim.Optimizer) -> set[str] | None:
    """What such an optimizer keeps of a parameter, from one that makes a step; None: not known."""
    inner = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's
    kind = type(inner)
    if not kind.__module__.startswith("torch.optim"):
        return None
    one = torch.nn.Parameter(torch.zeros(1))
    tried: torch.optim.Optimizer = kind([one], lr=1e-3)  # type: ignore[call-arg]  # each of torch's has it
    group = inner.param_groups[0]
    tried.param_groups[0] |= {key: value for key, value in group.items() if key != "params"}
    tried.param_groups[0] |= {key: None for key in ("fused", "foreach") if key in group}
    one.grad = torch.ones(1)
    tried.step()
    return {str(key) for key in tried.state[one]}


def _is_like(value: object, mine: object) -> bool:
    """Whether a saved value is one that this run could have in its place, by its kind."""
    if isinstance(mine, bool) or mine is None:
        return value is None or isinstance(value, bool)
    if isinstance(mine, int | float):
        return _is_number(value)
    if isinstance(mine, tuple | list):
        if not isinstance(value, tuple | list) or len(value) != len(mine):
            return False
        return all(_is_like(*both) for both in zip(value, mine, strict=True))
    if isinstance(mine, dict):
        return isinstance(value, dict) and value.keys() == mine.keys()
    if isinstance(mine, torch.Tensor):
        return isinstance(value, torch.Tensor) and value.shape == mine.shape
    return type(value) is type(mine)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
