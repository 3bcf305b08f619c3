"""What makes a run the one that a checkpoint is of: its data, order, model and settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import xxhash
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from vlcpt.config.precision import autocast_type
from vlcpt.config.schema import LEARNING_RATES
from vlcpt.config.training import CPTConfig
from vlcpt.data.dataset import CPTDataset
from vlcpt.model.tuning import base_model
from vlcpt.model.weights import UNREADABLE
from vlcpt.training.checkpoints.files import CheckpointError
from vlcpt.training.guards import asked_stage, converted_type

ROWS = "data_rows.npz"  # in a checkpoint: a number for each row, or for each block of rows
# Of a source at most so many numbers are kept, 8 MB: beyond that, one stands for several rows.
MAX_NUMBERS = 2_000_000
_AGREEING = 16  # numbers that must agree again after a row that was put in or taken out


def save_rows(dataset: object, folder: Path) -> None:
    """Put a number for each row into a checkpoint: a checksum of its tokens, targets and grids."""
    if isinstance(dataset, CPTDataset):
        np.savez(folder / ROWS, *_numbers(dataset))


def changed_rows(dataset: object, folder: Path, saved: object) -> str | None:
    """Where the data differ first from those of a checkpoint, for a message; None where that is not known.

    Args:
        dataset: That of this run.
        folder: That of the checkpoint.
        saved: Rows of each source by its name, as its manifest has them.

    Example:
        >>> changed_rows([1, 2], Path("checkpoint-2"), None) is None
        True
    """
    if not isinstance(dataset, CPTDataset) or not isinstance(saved, dict):
        return None
    try:
        with np.load(folder / ROWS, allow_pickle=False) as kept:
            before = [kept[name] for name in kept.files]
        rows = {str(name): int(count) for name, count in saved.items()}
    except UNREADABLE:
        return None
    mine = dataset.source_rows
    if [*rows] != [*mine]:
        return f"its sources were {', '.join(rows)}, and are {', '.join(mine)} now"
    for number, (name, then, now) in enumerate(zip(mine, before, _numbers(dataset), strict=False)):
        block, shared = _block(mine[name]), min(len(then), len(now))
        if block != _block(rows[name]):
            return f"{name} had {rows[name]:,} rows and has {mine[name]:,} now"
        differing = np.flatnonzero(then[:shared] != now[:shared])
        if len(differing) or len(then) != len(now):
            place = int(differing[0]) if len(differing) else shared
            where = dataset.row_name(number, place * block)
            where = f"at {where}" if block == 1 else f"within {block:,} rows from {where} on"
            return f"the first difference is {where}: {_what(then[place:], now[place:])}"
    return (
        "all rows and their order are the same, so it is max_length, packing, data_seed, a share or "
        "replay_share that was changed"
    )


def _block(rows: int) -> int:
    """Rows for which one number stands, in a source of so many."""
    return max(1, -(-rows // MAX_NUMBERS))


def _numbers(dataset: CPTDataset) -> Iterator[np.ndarray]:
    """The checksums of each source's rows, int32; of a block of several rows, one over theirs."""
    for checksums in dataset.row_checksums():
        block = _block(len(checksums))
        if block > 1:
            digests = [
                xxhash.xxh32_intdigest(checksums[first : first + block].tobytes())
                for first in range(0, len(checksums), block)
            ]
            checksums = np.array(digests, dtype=np.uint32).view(np.int32)
        yield checksums


def _what(old: np.ndarray, new: np.ndarray) -> str:
    """What happened at the first difference, as far as the rows after it show."""
    if not len(new):
        return f"{len(old):,} rows are missing from there on"
    if not len(old):
        return f"{len(new):,} rows were added from there on"
    if len(old) == len(new) and np.array_equal(np.sort(old), np.sort(new)):
        return "the same rows are in another order from there on"
    if _agree(old, new[1:]):
        return "a row was put in there"
    if _agree(old[1:], new):
        return "the row that was there is gone"
    return "its tokens, targets or the sizes of its media are others"


def _agree(first: np.ndarray, other: np.ndarray) -> bool:
    count = min(len(first), len(other), _AGREEING)
    return count > 0 and bool(np.array_equal(first[:count], other[:count]))


Facts = Mapping[str, object]

# Settings that change what a run learns, and that it takes from the configuration also after a resume. What
# would make it another run is refused instead, see identity.py.
_OF_CONFIGURATION = (
    *("num_train_epochs", "max_steps", "warmup_steps", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("tf32", "metric_for_best_model", "greater_is_better"),
)
# Of a group: what is no setting, or only how a step is computed.
_PASSED_OVER = ("params", "name", "lr", "initial_lr", "foreach", "fused", "capturable", "differentiable")


def saved_settings(model: nn.Module, args: TrainingArguments) -> dict[str, object]:
    """The settings to keep in a checkpoint, so that a resume can say which have changed.

    Example:
        >>> saved_settings(nn.Linear(1, 1), CPTConfig("out", use_cpu=True, max_steps=7))["max_steps"]
        7
    """
    values = {name: getattr(args, name) for name in _OF_CONFIGURATION}
    if isinstance(model, PeftModel):
        values["lora_dropout"] = getattr(model.peft_config[model.active_adapter], "lora_dropout", None)
    return {name: getattr(value, "value", value) for name, value in values.items()}


def settings_of(groups: Sequence[Facts]) -> list[dict[str, object]]:
    """The settings of an optimizer's groups under the names of the configuration, to be compared later.

    Example:
        >>> settings_of([{"params": [], "name": "merger", "lr": 0.1, "eps": 1e-8}])
        [{'merger_learning_rate': 0.1, 'adam_epsilon': 1e-08}]
    """
    found = []
    for group in groups:
        # The learning rate that the schedule starts from, not what it has come to.
        rate = group.get("initial_lr", group["lr"])
        key = LEARNING_RATES.get(str(group.get("name")), "learning_rate")
        named = {key: rate.item() if isinstance(rate, torch.Tensor) else rate}
        named |= {name: value for name, value in group.items() if name not in _PASSED_OVER}
        if isinstance(betas := named.pop("betas", None), Sequence):
            named |= {f"adam_beta{number}": beta for number, beta in enumerate(betas, 1)}
        if "eps" in named:
            named["adam_epsilon"] = named.pop("eps")
        found.append(named)
    return found


def resumed_lines(
    args: CPTConfig,
    configured: Sequence[Facts],
    used: Sequence[Facts],
    saved: Facts,
    now: Facts,
) -> list[str]:
    """One line for each setting in which checkpoint and configuration differ: both values, and which is used.

    Args:
        args: The configuration of the run.
        configured: The settings of the optimizer's groups before the checkpoint was loaded into it.
        used: The same now, see :func:`settings_of`.
        saved: What :func:`saved_settings` gave when the checkpoint was saved; empty of older ones.
        now: What it gives now.

    Example:
        >>> args = CPTConfig("out", use_cpu=True, learning_rate=0.1)
        >>> resumed_lines(args, [{"learning_rate": 0.1}], [{"learning_rate": 0.5}], {}, {})
        ["learning_rate: 0.5 in the checkpoint, 0.1 in the configuration: the checkpoint's is used"]
    """
    changed: dict[str, tuple[object, object]] = {}
    for asked, actual in zip(configured, used, strict=False):
        for name in asked.keys() & actual.keys():
            if actual[name] != asked[name]:
                changed.setdefault(name, (actual[name], asked[name]))
    # A tower without a rate of its own has that of the language tower: it is said once.
    for key in set(LEARNING_RATES.values()) - {"learning_rate"}:
        if getattr(args, key) is None and changed.get(key) == changed.get("learning_rate"):
            changed.pop(key, None)
    lines = {name: _line(name, *both, "checkpoint") for name, both in changed.items()}
    for name in saved.keys() & now.keys():
        if saved[name] != now[name]:
            lines[name] = _line(name, saved[name], now[name], "configuration")
    return [lines[name] for name in sorted(lines)]


def _line(name: str, saved: object, configured: object, winner: str) -> str:
    return (
        f"{name}: {_shown(saved)} in the checkpoint, {_shown(configured)} in the configuration: "
        f"the {winner}'s is used"
    )


def _shown(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


# What each fact is for people, and what to do where it differs.
_MEANING = {
    "data": (
        "the plan of the training data",
        "rows, their order, max_length, packing or data_seed were changed",
    ),
    "seed": ("seed", "it decides the order of the data and dropout"),
    "data_seed": ("data_seed", "it decides the order of the data"),
    "sampling": ("train_sampling_strategy", "it decides the order of the data"),
    "precision": ("the type of products", "set bf16 and fp16 as they were; the numbers would be others"),
    "items_per_step": ("packs in a step", "keep processes × per_device_train_batch_size × accumulation"),
    "engine": ("the format of the states", "keep deepspeed as it was"),
    "processes": ("processes", "states of this engine are cut for a number of processes"),
    "optimizer": ("optim", "its states do not fit another"),
    "model": ("the model's configuration", "use the same base model"),
    "base_weights": ("the weights that do not train", "use the same base model, dtype and quantization"),
    "lora": ("LoRA", "keep the adapter's shape"),
    "trained": ("the tensors that train", "keep tuning, the trained towers and lora_target_modules"),
}
_LORA = (
    *("r", "lora_alpha", "use_dora", "use_rslora", "bias", "rank_pattern", "alpha_pattern"),
    *("target_modules", "modules_to_save"),
)
_NOT_OF_THE_MODEL = (
    *("_name_or_path", "transformers_version", "use_cache", "_commit_hash", "dtype"),
    "architectures",  # set when a model is saved, also where its base names none
    # Trainer takes them from the tokenizer when it starts to train; nothing here trains by them.
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
_THREADS = 8


def run_facts(model: PreTrainedModel | PeftModel, args: CPTConfig, dataset: object) -> dict[str, object]:
    """What a run must have in common with the one whose checkpoint it resumes; JSON only.

    Weights that do not train are in no adapter's checkpoint, so all of them are hashed: about a second
    for each 10 GB. Under ZeRO-3 that gathers one after the other, so all ranks call this together.

    Args:
        model: Before it is wrapped, or after.
        args: Those of the run.
        dataset: That of the training.

    Example:
        >>> from vlcpt import ModelConfig, load_model
        >>> from vlcpt.demo import base_path
        >>> model = load_model(ModelConfig(base_path(), lora_r=4))
        >>> run_facts(model, CPTConfig("out", use_cpu=True, seed=7), [1, 2])["seed"]
        7
    """
    data: object = f"{len(dataset)} items" if isinstance(dataset, Sized) else None
    if isinstance(dataset, CPTDataset):
        data = dataset.digest
    stage = asked_stage(args)
    items = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    facts: dict[str, object] = {
        "data": data,
        "sources": dataset.source_rows if isinstance(dataset, CPTDataset) else None,
        "seed": args.seed,
        "data_seed": args.data_seed,
        # None, as in what was saved before there was a choice.
        "sampling": None if (order := str(args.train_sampling_strategy)) == "random" else order,
        "precision": str(autocast_type(args) or torch.float32).removeprefix("torch."),
        "items_per_step": items,
        "engine": "plain" if stage is None else f"ZeRO-{stage}",
        "processes": args.world_size,
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "model": _config_digest(base_model(model)),
        "base_weights": frozen_digest(model, converted_type(args)),
        "lora": _lora(model),
        "trained": _shapes(model),
        # Not what makes it another run: a resume says which of them have changed.
        "settings": saved_settings(model, args),
    }
    return json.loads(json.dumps(facts))  # as it will be read again


def require_same_run(folder: Path, saved: Facts, now: Facts, dataset: object = None) -> None:
    """Raise where a checkpoint is of another run.

    Args:
        folder: The checkpoint's.
        saved: Facts of its manifest.
        now: Those of this run.
        dataset: The training data of this run; the message names its first row that is another.

    Raises:
        CheckpointError: That names every difference.

    Example:
        >>> require_same_run(Path("out/checkpoint-2"), {"seed": 1}, {"seed": 2})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.training.checkpoints.files.CheckpointError: checkpoint-2 is of another run. seed: ...
    """
    found = []
    for name, (what, hint) in _MEANING.items():
        if name == "processes" and now.get("engine") == saved.get("engine") == "plain":
            continue  # each process has all states
        if name == "precision" and name not in saved:
            continue  # of a checkpoint from before it was kept
        if difference := differences(saved.get(name), now.get(name)):
            rows = changed_rows(dataset, folder, saved.get("sources")) if name == "data" else None
            found.append(f"{what}: {rows or f'{difference} ({hint})'}")
    if found:
        raise CheckpointError(
            f"{folder.name} is of another run. {'; '.join(found)}. Put that back as it was, see "
            "config.yaml; or start a new run in another output_dir, from the weights alone if you give the "
            "checkpoint as adapter_name_or_path (or, tuned in full, as model_name_or_path)."
        )


def frozen_digest(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """A hash over every parameter that does not train, with its name, type and shape.

    Args:
        model: Before it is wrapped, or after.
        dtype: That wrapping converts numbers to, as DeepSpeed does; the digest is then of the converted
            numbers, so it is the same before and after. None: they stay as they are.

    Example:
        >>> layer = nn.Linear(2, 2).requires_grad_(False)
        >>> before = frozen_digest(layer)
        >>> _ = layer.bias.data.add_(1)
        >>> frozen_digest(layer) == before
        False
    """
    digest = xxhash.xxh3_128()
    frozen = [(name, one) for name, one in model.named_parameters() if not one.requires_grad]
    with ThreadPoolExecutor(_THREADS) as pool:
        # A few at a time: those of a GPU, or of other ranks, come into memory for it.
        for first in range(0, len(frozen), _THREADS):
            some = frozen[first : first + _THREADS]
            with _gathered([parameter for _, parameter in some]):
                digest.update("".join(pool.map(partial(_tensor_digest, dtype=dtype), some)).encode())
    return digest.hexdigest()


def _gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[object]:
    if not any(hasattr(one, "ds_id") for one in parameters):
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(parameters)
    return gathered


def _tensor_digest(named: tuple[str, nn.Parameter], dtype: torch.dtype | None) -> str:
    name, parameter = named
    values = parameter.detach().cpu().contiguous()
    if dtype is not None and values.is_floating_point():
        values = values.to(dtype)
    found = xxhash.xxh3_128(f"{name} {values.dtype} {tuple(values.shape)}".encode())
    found.update(values.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _config_digest(model: PreTrainedModel) -> str:
    def of_the_model(value: object) -> object:
        if isinstance(value, Mapping):
            return {key: of_the_model(one) for key, one in value.items() if key not in _NOT_OF_THE_MODEL}
        return value

    config = json.dumps(of_the_model(model.config.to_dict()), sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest(config.encode())


def lora_facts(config: PeftConfig) -> dict[str, object]:
    """The part of an adapter's configuration on which its tensors and their effect depend; JSON only.

    Example:
        >>> from peft import LoraConfig
        >>> lora_facts(LoraConfig(r=4, target_modules=["q_proj"]))["r"]
        4
    """
    found = {name: getattr(config, name, None) for name in _LORA}
    return {name: sorted(one) if isinstance(one, set | list) else one for name, one in found.items()}


def _lora(model: PreTrainedModel | PeftModel) -> object:
    return lora_facts(model.peft_config[model.active_adapter]) if isinstance(model, PeftModel) else None


def _shapes(model: nn.Module) -> object:
    # Under ZeRO-3 a parameter has lost its shape, and keeps it elsewhere.
    shapes = [
        f"{name} {tuple(getattr(one, 'ds_shape', one.shape))}"
        for name, one in model.named_parameters()
        if one.requires_grad
    ]
    return {"tensors": len(shapes), "xxh3_128": xxhash.xxh3_128_hexdigest("\n".join(sorted(shapes)).encode())}


def differences(saved: object, now: object) -> str:
    """What two facts differ in, for a message; of mappings, only those entries. Empty if in nothing.

    Example:
        >>> differences({"r": 4, "bias": "none"}, {"r": 8, "bias": "none"})
        'saved with r 4, now r 8'
    """
    if saved == now:
        return ""
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        keys = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
        saved, now = (", ".join(f"{key} {one.get(key)}" for key in keys) for one in (saved, now))
    return f"saved with {_shown(saved)}, now {_shown(now)}"
