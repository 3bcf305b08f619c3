"""What makes a run the one that a checkpoint is of: its data, its order, its model, how it is spread."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import xxhash
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from vlcpt.config import CPTConfig
from vlcpt.config_precision import autocast_type
from vlcpt.data.dataset import CPTDataset
from vlcpt.model.adapters import base_model
from vlcpt.training.changed_rows import source_blocks
from vlcpt.training.manifests import CheckpointError
from vlcpt.training.resumed_settings import saved_settings

Facts = Mapping[str, object]

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
    engine = _engine(args)
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
        "engine": engine,
        "processes": args.world_size,
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "model": _config_digest(base_model(model)),
        "base_weights": frozen_digest(model, _converted_to(args)),
        "lora": _lora(model),
        "trained": _shapes(model),
        # Not what makes it another run: a resume says which of them have changed.
        "settings": saved_settings(model, args),
    }
    return json.loads(json.dumps(facts))  # as it will be read again


def require_same_run(checkpoint: str, saved: Facts, now: Facts, *, rows: str | None = None) -> None:
    """Raise where a checkpoint is of another run.

    Args:
        checkpoint: Its name, for the message.
        saved: Facts of its manifest.
        now: Those of this run.
        rows: Where the data differ first, where that is known.

    Raises:
        CheckpointError: That names every difference.

    Example:
        >>> require_same_run("checkpoint-2", {"seed": 1}, {"seed": 2})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.training.manifests.CheckpointError: checkpoint-2 is of another run. seed: saved with 1, ...
    """
    differences = []
    for name, (what, hint) in _MEANING.items():
        if name == "processes" and now.get("engine") == saved.get("engine") == "plain":
            continue  # each process has all states
        if name == "precision" and name not in saved:
            continue  # of a checkpoint from before it was kept
        if saved.get(name) != now.get(name):
            if name == "data" and rows:
                differences.append(f"{what}: {rows}")
                continue
            was, is_now = _values(saved.get(name), now.get(name))
            differences.append(f"{what}: saved with {was}, now {is_now} ({hint})")
    if differences:
        raise CheckpointError(
            f"{checkpoint} is of another run. {'; '.join(differences)}. Put that back as it was, see "
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


def _converted_to(args: CPTConfig) -> torch.dtype | None:
    """What DeepSpeed of 16 bits converts every weight to when it wraps the model; None where nothing does."""
    config = getattr(args, "hf_deepspeed_config", None)
    dtype = None if config is None else config.dtype()
    return None if dtype == torch.float32 else dtype


def _engine(args: CPTConfig) -> str:
    config = getattr(args, "hf_deepspeed_config", None)
    return "plain" if config is None else f"ZeRO-{config.get_value('zero_optimization.stage', 0)}"


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


def differences(saved: Facts, now: Facts) -> str:
    """What two mappings of facts differ in, for a message; empty if in nothing.

    Example:
        >>> differences({"r": 4, "bias": "none"}, {"r": 8, "bias": "none"})
        'saved with r 4, now r 8'
    """
    if saved == now:
        return ""
    was, is_now = _values(saved, now)
    return f"saved with {was}, now {is_now}"


def _values(saved: object, now: object) -> tuple[object, object]:
    """Two values as a message shows them: of mappings, only what differs."""
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        keys = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
        return tuple(", ".join(f"{key} {one.get(key)}" for key in keys) for one in (saved, now))  # type: ignore[return-value]
    return ("none" if saved is None else saved), ("none" if now is None else now)
