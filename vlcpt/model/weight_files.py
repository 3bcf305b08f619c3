"""Weights into safetensors files, one tensor in memory at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from vlcpt.errors import ConfigError
from vlcpt.model.merged_weights import MergedWeight

# The names of the format's types.
_TYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def write_weights(
    folder: Path, base: PreTrainedModel, weights: Sequence[MergedWeight], max_shard_size: int | str
) -> None:
    """Write weights as ``save_pretrained`` would: names, shards and index, but each is made, written, let go.

    Args:
        base: As ``from_pretrained`` gave it: it knows which names its files have.
        max_shard_size: Bytes, or text such as ``5GB``. One weight that is larger has a file of its own.

    Raises:
        ConfigError: If ``max_shard_size`` is no size.

    Example:
        >>> import tempfile
        >>> from vlcpt.demo import base_path
        >>> from vlcpt.model.loading import load_base
        >>> base, folder = load_base(base_path()), Path(tempfile.mkdtemp())
        >>> one = MergedWeight("lm_head.weight", torch.Size([2, 3]), torch.float32, lambda: torch.ones(2, 3))
        >>> write_weights(folder, base, [one], "5GB")
        >>> [path.name for path in folder.iterdir()]
        ['model.safetensors']
    """
    named = _names_in_files(base, weights)
    try:
        plan = split_state_dict_into_shards_factory(
            named,
            get_storage_size=lambda weight: weight.size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ConfigError(f"max_shard_size {max_shard_size!r} is no size: {error} Write 5GB, say.") from error
    for file, names in plan.filename_to_tensors.items():
        _write_file(folder / file, {name: named[name] for name in names})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _names_in_files(base: PreTrainedModel, weights: Sequence[MergedWeight]) -> dict[str, MergedWeight]:
    """Each weight by the name that it has on the Hub, in the order of a saved file."""
    empty = {weight.name: torch.empty(weight.shape, device="meta") for weight in weights}
    owners = {id(empty[weight.name]): weight for weight in weights}
    renamed = revert_weight_conversion(base, empty)
    # For this model transformers renames weights; it neither joins nor splits any.
    return {name: owners[id(tensor)] for name, tensor in renamed.items()}


def _write_file(path: Path, weights: Mapping[str, MergedWeight]) -> None:
    """One safetensors file: the length of the header, the header, the tensors' bytes one after another."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight in weights.items():
        offsets = [end, end + weight.size]
        header[name] = {
            "dtype": _TYPES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": offsets,
        }
        end = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights.values():
            file.write(weight.make().contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
