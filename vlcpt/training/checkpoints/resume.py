"""Resuming with every tensor, and with the random numbers that the run would have had."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.modeling_utils import str_to_torch_dtype

from vlcpt.model.adapters import read_adapter_config, read_adapter_shapes
from vlcpt.model.attention import with_attention
from vlcpt.model.weights import (
    UNREADABLE,
    compare_shapes,
    first_few,
    not_loaded,
    read_shapes,
    shards_of,
    weight_files,
)
from vlcpt.training.checkpoints.files import CheckpointError
from vlcpt.training.checkpoints.identity import differences, lora_facts


def restore_weights(model: PreTrainedModel | PeftModel, checkpoint: str) -> None:
    """Load every tensor of a full fine-tuning checkpoint into the model in memory.

    Trainer of transformers 5.23 loads a checkpoint's Hub names into the in-memory names with
    ``strict=False``, which restores 1 of 57 tensors; tests/training/checkpoints/test_resume.py tells when
    that ends. Adapters it restores whole, so they are left to it.

    Raises:
        CheckpointError: If any tensor is missing, unexpected, or of another shape.
    """
    if isinstance(model, PeftModel):
        return
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


def check_adapter(model: PreTrainedModel | PeftModel, checkpoint: str) -> None:
    """Compare a checkpoint's adapter with the one in memory: Trainer and peft load what fits, silently.

    Raises:
        CheckpointError: If any tensor is missing, unexpected, or of another shape.
    """
    if not isinstance(model, PeftModel):
        return
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


def declare_dtype(directory: Path) -> None:
    """Let a saved ``config.json`` say a type that holds every saved weight: a plain load then rounds none.

    ``save_pretrained`` of transformers 5.24 writes the type of the first parameter in memory. That may be a
    frozen one in bfloat16 beside trained ones in float32, to which ``from_pretrained`` would round them; or
    float32 where DeepSpeed has saved its own weights of 16 bits.

    Args:
        directory: Of a model. One of an adapter has no ``config.json``, and stays as it is.
    """
    path = directory / "config.json"
    dtype = _saved_dtype(directory)
    if dtype is None or not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        # What a part lacks it takes from the whole. `torch_dtype` is the key's name before transformers 4.56.
        part |= {key: name for key in ("dtype", "torch_dtype") if key in part}
    if "torch_dtype" not in config:
        config["dtype"] = name
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _saved_dtype(directory: Path) -> torch.dtype | None:
    """The smallest type that holds the weights in a folder's safetensors files; None if it has none."""
    names = ["model.safetensors"]
    if not (directory / names[0]).is_file():
        index = directory / "model.safetensors.index.json"
        names = shards_of(index) if index.is_file() else []
    found: set[torch.dtype] = set()
    for name in names:
        with safe_open(directory / name, framework="pt") as file:
            found |= {str_to_torch_dtype[file.get_slice(key).get_dtype()] for key in file.keys()}  # noqa: SIM118
    weights = [dtype for dtype in found if dtype.is_floating_point]
    return reduce(torch.promote_types, weights) if weights else None
