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
from vlcpt.config.training import CPTConfig
from vlcpt.data.dataset import CPTDataset
from vlcpt.model.tuning import base_model
from vlcpt.training.checkpoints.files import CheckpointError
from vlcpt.training.guards import asked_stage, converted_type

ROWS = "data_rows.npy"  # in a checkpoint: a number for each row, or for each block of rows
# Of a source at most so many numbers are kept, 8 MB: beyond that, one stands for several rows.
MAX_NUMBERS = 2_000_000
_AGREEING = 16  # numbers that must agree again after a row that was put in or taken out


def source_blocks(dataset: object) -> list[list[object]] | None:
    """Name, rows and rows a number of each source, for the manifest; None of a data set that is not ours.

    Example:
        >>> source_blocks([1, 2]) is None
        True
    """
    if not isinstance(dataset, CPTDataset):
        return None
    rows = dataset.source_rows
    return [[name, count, max(1, -(-count // MAX_NUMBERS))] for name, count in rows.items()]


def save_rows(dataset: object, folder: Path) -> None:
    """Put a number for each row into a checkpoint: a checksum of its tokens, targets and grids."""
    if isinstance(dataset, CPTDataset):
        np.save(
            folder / ROWS, np.concatenate([np.zeros(0, np.int32), *_numbers(dataset)]), allow_pickle=False
        )


def changed_rows(dataset: object, folder: Path, saved: object) -> str | None:
    """Where the data differ first from those of a checkpoint, for a message; None where that is not known.

    Args:
        dataset: Of this run.
        folder: Of the checkpoint.
        saved: What :func:`source_blocks` gave for its manifest.

    Example:
        >>> changed_rows([1, 2], Path("checkpoint-2"), None) is None
        True
    """
    if not isinstance(dataset, CPTDataset) or not isinstance(saved, list):
        return None
    try:
        kept = np.load(folder / ROWS, mmap_mode="r", allow_pickle=False)
        before = [(str(name), int(rows), int(block)) for name, rows, block in saved]
    except (OSError, ValueError, TypeError):
        return None
    mine = list(dataset.source_rows)
    if (names := [name for name, *_ in before]) != mine:
        return f"its sources were {', '.join(names)}, and are {', '.join(mine)} now"
    start = 0
    for number, ((name, rows, block), now) in enumerate(zip(before, _numbers(dataset), strict=True)):
        count = -(-rows // block)
        then, start = np.asarray(kept[start : start + count]), start + count
        if block == max(1, -(-dataset.source_rows[name] // MAX_NUMBERS)):
            place = int(_first_difference(then, now))
            if place < max(len(then), len(now)):
                what = _what(then, now, place)
                return _row_message(dataset.row_name(number, place * block), block, what)
        elif rows != dataset.source_rows[name]:
            return f"{name} had {rows:,} rows and has {dataset.source_rows[name]:,} now"
    return (
        "all rows and their order are the same, so it is max_length, packing, data_seed, a share or "
        "replay_share that was changed"
    )


def _numbers(dataset: CPTDataset) -> list[np.ndarray]:
    """The checksums of each source's rows, int32; of a block of several rows, one over theirs."""
    found = []
    for checksums in dataset.row_checksums():
        block = max(1, -(-len(checksums) // MAX_NUMBERS))
        if block > 1:
            digests = [
                xxhash.xxh32_intdigest(checksums[first : first + block].tobytes())
                for first in range(0, len(checksums), block)
            ]
            checksums = np.array(digests, dtype=np.uint32).view(np.int32)
        found.append(checksums)
    return found


def _first_difference(then: np.ndarray, now: np.ndarray) -> int:
    shared = min(len(then), len(now))
    differs = np.flatnonzero(then[:shared] != now[:shared])
    return int(differs[0]) if len(differs) else shared


def _what(then: np.ndarray, now: np.ndarray, place: int) -> str:
    """What happened at the first difference, as far as the rows after it tell."""
    old, new = then[place:], now[place:]
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


def _agree(first: Sequence[int] | np.ndarray, other: Sequence[int] | np.ndarray) -> bool:
    count = min(len(first), len(other), _AGREEING)
    return count > 0 and bool(np.array_equal(first[:count], other[:count]))


def _row_message(name: str, block: int, what: str) -> str:
    if block > 1:
        return f"the first difference is within {block:,} rows from {name} on: {what}"
    return f"the first difference is at {name}: {what}"


Facts = Mapping[str, object]
Groups = Sequence[Mapping[str, object]]

# Settings that change what a run learns, and that it takes from the configuration also after a resume. What
# would make it another run is refused instead, see identity.py.
_OF_CONFIGURATION = (
    *("num_train_epochs", "max_steps", "warmup_steps", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("tf32", "metric_for_best_model", "greater_is_better"),
)
_RATES = {
    "language": "learning_rate",
    "vision": "vision_learning_rate",
    "merger": "merger_learning_rate",
    "embeddings": "embedding_learning_rate",
}
_NAMES = {"eps": "adam_epsilon"}
# Of a group: what is no setting, or only how a step is computed.
_PASSED_OVER = ("params", "name", "lr", "initial_lr", "foreach", "fused", "capturable", "differentiable")


def saved_settings(model: nn.Module, args: TrainingArguments) -> dict[str, object]:
    """The settings to keep in a checkpoint, so that a resume can say which have changed; JSON only.

    Example:
        >>> saved_settings(nn.Linear(1, 1), CPTConfig("out", use_cpu=True, max_steps=7))["max_steps"]
        7
    """
    found: dict[str, object] = {}
    for name in _OF_CONFIGURATION:
        value = getattr(args, name)
        found[name] = getattr(value, "value", value)
    if isinstance(model, PeftModel):
        found["lora_dropout"] = getattr(model.peft_config[model.active_adapter], "lora_dropout", None)
    return json.loads(json.dumps(found))  # as it will be read again


def settings_of(groups: Groups) -> list[dict[str, object]]:
    """The settings in an optimizer's groups, to be compared with later ones.

    Example:
        >>> settings_of([{"params": [], "lr": 0.1, "weight_decay": 0.0}])
        [{'lr': 0.1, 'weight_decay': 0.0}]
    """
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def resumed_lines(args: CPTConfig, configured: Groups, used: Groups, saved: Facts, now: Facts) -> list[str]:
    """One line for each setting in which checkpoint and configuration differ: both values, and which is used.

    Args:
        args: The configuration of the run.
        configured: The optimizer's groups before the checkpoint was loaded into it.
        used: Its groups now.
        saved: What :func:`saved_settings` gave when the checkpoint was saved; empty of older ones.
        now: What it gives now.

    Example:
        >>> args = CPTConfig("out", use_cpu=True, learning_rate=0.1)
        >>> resumed_lines(args, [{"lr": 0.1, "name": "language"}], [{"lr": 0.5, "name": "language"}], {}, {})
        ["learning_rate: 0.5 in the checkpoint, 0.1 in the configuration: the checkpoint's is used"]
    """
    lines: dict[str, str] = {}
    rates: set[tuple[object, object]] = set()
    for group, actual in zip(configured, used, strict=False):
        key = _RATES.get(str(group.get("name")), "learning_rate")
        pair = (_rate(actual), _rate(group))
        # A tower without a rate of its own has that of the language tower: it is said once.
        if getattr(args, key) is None and ("learning_rate" in lines or key == "learning_rate"):
            key = "learning_rate" if pair in rates else key
        if pair[0] != pair[1]:
            rates.add(pair)
            lines.setdefault(key, _line(key, *pair, "checkpoint"))
        for name, is_used, asked in _others(group, actual):
            if is_used != asked:
                lines.setdefault(name, _line(name, is_used, asked, "checkpoint"))
    for name in saved.keys() & now.keys():
        if saved[name] != now[name]:
            lines[name] = _line(name, saved[name], now[name], "configuration")
    return [lines[name] for name in sorted(lines)]


def _rate(group: Mapping[str, object]) -> object:
    """The learning rate that the schedule starts from, not what it has come to."""
    found = group.get("initial_lr", group["lr"])
    return found.item() if isinstance(found, torch.Tensor) else found


def _others(group: Mapping[str, object], actual: Mapping[str, object]) -> list[tuple[str, object, object]]:
    """Name, value in use and value asked for, of what a group has besides its learning rate."""
    found: list[tuple[str, object, object]] = []
    for key, asked in group.items():
        if key in _PASSED_OVER or key not in actual:
            continue
        is_used = actual[key]
        if key == "betas" and isinstance(asked, Sequence) and isinstance(is_used, Sequence):
            found += [(f"adam_beta{n}", *both) for n, both in enumerate(zip(is_used, asked, strict=True), 1)]
        else:
            found.append((_NAMES.get(key, key), is_used, asked))
    return found


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
    """What a run must have in common with the one whose checkpoint it goes on from; JSON only.

    Weights that do not train are in no adapter's checkpoint, so they are hashed, whole: about a second
    for each 10 GB. Under ZeRO-3 that gathers one after the other, so all ranks call this together.

    Args:
        model: Before it is wrapped, or after.
        args: Of the run.
        dataset: Of the training.

    Example:
        >>> from vlcpt import ModelConfig, load_model
        >>> from vlcpt.demo import base_path
        >>> model = load_model(ModelConfig(base_path(), lora_r=4))
        >>> run_facts(model, CPTConfig("out", use_cpu=True, seed=7), [1, 2])["seed"]
        7
    """
    stage = asked_stage(args)
    items = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    facts: dict[str, object] = {
        "data": _data(dataset),
        "sources": source_blocks(dataset),
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
    whole = xxhash.xxh3_128()
    with ThreadPoolExecutor(_THREADS) as pool:
        # A few at a time: those of a GPU, or of other ranks, come into memory for it.
        for digests in _batches(model, dtype, pool):
            whole.update("".join(digests).encode())
    return whole.hexdigest()


def _batches(model: nn.Module, dtype: torch.dtype | None, pool: ThreadPoolExecutor) -> Iterator[list[str]]:
    frozen = [(name, one) for name, one in model.named_parameters() if not one.requires_grad]
    for first in range(0, len(frozen), _THREADS):
        some = frozen[first : first + _THREADS]
        with _gathered([parameter for _, parameter in some]):
            yield list(pool.map(partial(_tensor_digest, dtype=dtype), some))


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


def _data(dataset: object) -> object:
    if isinstance(dataset, CPTDataset):
        return dataset.digest
    return f"{len(dataset)} items" if isinstance(dataset, Sized) else None


def _config_digest(model: PreTrainedModel) -> str:
    def of_the_model(value: object) -> object:
        if isinstance(value, Mapping):
            return {key: of_the_model(one) for key, one in value.items() if key not in _NOT_OF_THE_MODEL}
        return value

    config = json.dumps(of_the_model(model.config.to_dict()), sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest(config.encode())


def lora_facts(config: PeftConfig) -> dict[str, object]:
    """What of an adapter's configuration its tensors and their effect depend on; JSON only.

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
