"""The weights of base and adapter as one model, one tensor in memory at a time."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from vlcpt.data.families import family_of
from vlcpt.errors import ConfigError
from vlcpt.model.early_checks import bare_model
from vlcpt.model.tuning import base_model, is_tied


@dataclass(frozen=True)
class MergedWeight:
    """A weight of the merged model that is not made yet.

    Args:
        name: In the model in memory.
        shape: Of it.
        dtype: That of the base's weight.
        make: Gives it; nothing else holds on to what it gives.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def size(self) -> int:
        """In bytes."""
        return self.shape.numel() * self.dtype.itemsize


def merged_weights(tuned: PeftModel, dtype: torch.dtype | None = None) -> list[MergedWeight]:
    """Each weight of the model that base and adapter make together, in the base's own types or in ``dtype``.

    What an adapter adds is computed and added in float32 by peft's own code for its kind (LoRA, DoRA,
    rank-stabilised), and rounded once. A module that was trained in full takes the place of the base's. The
    model is as before, also after a weight was made. Of tied embeddings there is one, unless the adapter has
    made them differ.

    Raises:
        ValueError: If the adapter holds something that cannot be merged; from ``make``, if a weight would
            not be finite.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from vlcpt.demo import base_path
        >>> from vlcpt.model.loading import load_base
        >>> tuned = get_peft_model(load_base(base_path()), LoraConfig(target_modules=["q_proj"]))
        >>> weights = {weight.name: weight for weight in merged_weights(tuned)}
        >>> weights["model.language_model.layers.0.self_attn.q_proj.weight"].make().dtype
        torch.float32
    """
    base = base_model(tuned)
    with torch.device("meta"):
        plain = bare_model(copy.deepcopy(base.config), "sdpa")
    found = {name: _weight(base, tuned.active_adapter, name, dtype) for name in plain.state_dict()}
    family = family_of(base.config.model_type)
    first, second = (f"{path}.weight" for path in family.embeddings)
    if is_tied(plain, family) and torch.equal(found[first].make(), found[second].make()):
        del found[second]
    return list(found.values())


def whole_weights(model: PreTrainedModel, dtype: torch.dtype) -> list[MergedWeight]:
    """Each weight of a model that was trained in full, in another type; of tied embeddings there is one.

    Example:
        >>> from vlcpt.demo import base_path
        >>> from vlcpt.model.loading import load_base
        >>> {weight.make().dtype for weight in whole_weights(load_base(base_path()), torch.bfloat16)}
        {torch.bfloat16}
    """
    family = family_of(model.config.model_type)
    _, head = (f"{path}.weight" for path in family.embeddings)
    one_of_two = head if is_tied(model, family) else None
    return [
        MergedWeight(name, held.shape, dtype, partial(_finite, held, dtype, name))
        for name, held in model.state_dict().items()
        if name != one_of_two
    ]


def _weight(base: PreTrainedModel, adapter: str, name: str, wanted: torch.dtype | None) -> MergedWeight:
    """The one of this name, wherever peft has put it."""
    path, _, leaf = name.rpartition(".")
    module: nn.Module = base
    original: nn.Module = base  # the same place in the base as it was
    for part in path.split("."):
        module, original = module.get_submodule(part), original.get_submodule(part)
        if isinstance(module, ModulesToSaveWrapper):
            original = module.get_submodule("original_module")
            module = module.get_submodule(f"modules_to_save.{adapter}")
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(
                f"{path} is changed by a {type(module).__name__} of peft, which cannot be merged here. "
                "Merge it with peft's merge_and_unload."
            )
    if isinstance(module, BaseTunerLayer):
        held = getattr(module.get_base_layer(), leaf)
        dtype = wanted or held.dtype
        return MergedWeight(name, held.shape, dtype, partial(_merged, module, path, leaf, dtype))
    held, dtype = getattr(module, leaf), wanted or getattr(original, leaf).dtype
    return MergedWeight(name, held.shape, dtype, partial(_finite, held, dtype, name))


@torch.no_grad()
def _merged(layer: BaseTunerLayer, path: str, leaf: str, dtype: torch.dtype) -> torch.Tensor:
    """A weight of an adapted layer: the sum in float32, rounded once."""
    own = layer.get_base_layer()
    held = {name: parameter.data for name, parameter in own.named_parameters(recurse=False)}
    try:
        for name, parameter in own.named_parameters(recurse=False):
            parameter.data = held[name].float()
        # safe_merge: peft puts a new tensor into the layer, and leaves the one that is there.
        layer.merge(safe_merge=True)
        merged = getattr(own, leaf).data
    except ValueError as error:
        raise _not_finite(f"{path}.{leaf}") from error
    finally:
        for name, parameter in own.named_parameters(recurse=False):
            parameter.data = held[name]
        layer.merged_adapters.clear()
    return _finite(merged, dtype, f"{path}.{leaf}")


@torch.no_grad()
def _finite(weight: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    rounded = weight.detach().to(dtype)
    # Rounded first: float16 holds less than float32. isfinite would make three copies of embeddings.
    if rounded.numel() and not all(torch.isfinite(end) for end in rounded.aminmax()):
        raise _not_finite(name)
    return rounded


def _not_finite(name: str) -> ValueError:
    return ValueError(
        f"{name}: the merged weight holds numbers that are not finite, so the adapter or its base is broken. "
        "Merge an earlier checkpoint."
    )


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
