"""Whether loaded weights are finite, and in which file the first is that is not."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from vlcpt.model.saved_files import WEIGHTS, shards_of


def first_not_finite(named: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinite number; None if all are finite.

    Reads each tensor once and makes no copy of it: NaN and infinity both show in its least and largest
    number. What is packed in 4 bits, or on the meta device, is passed over; of what ZeRO-3 has
    partitioned this rank's part is read.

    Example:
        >>> first_not_finite([("a", torch.ones(2)), ("b", torch.tensor([0.0, float("nan")]))])
        'b'
    """
    names, ends = [], []
    for name, tensor in named:
        values = getattr(tensor, "ds_tensor", tensor).detach()
        is_number = values.is_floating_point() and values.dtype.itemsize > 1
        if not is_number or values.is_meta or not values.numel() or hasattr(tensor, "quant_state"):
            continue
        names.append(name)
        ends.append(torch.stack([end.float() for end in values.aminmax()]))
    if not ends:
        return None
    # Together, so that a GPU is waited for once.
    bad = ~torch.stack([end.to(ends[0].device) for end in ends]).isfinite().all(dim=1)
    return names[int(bad.nonzero()[0])] if bool(bad.any()) else None


def tensors_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of a model, by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def require_finite_base(model: PreTrainedModel, name_or_path: str, dtype: torch.dtype) -> None:
    """Refuse a model that was loaded with a weight that is not finite: no document could be trained on it.

    Weights in 4 bits no longer show it, so their files are read once more.

    Args:
        model: As it was loaded.
        name_or_path: From there.
        dtype: The type it was loaded in.

    Raises:
        ValueError: With file and tensor.
    """
    found = first_not_finite(tensors_of(model))
    packed = any(hasattr(one, "quant_state") for one in model.parameters())
    if found is None and not packed:
        return
    for file in weight_files(name_or_path, "model", getattr(model.config, "_commit_hash", None)):
        require_finite_file(file)
    if found is not None:
        raise ValueError(
            f"{name_or_path}: {found} is finite in its file and not as {str(dtype).removeprefix('torch.')}, "
            f"which holds numbers up to {torch.finfo(dtype).max:,.0f}. Set dtype: bfloat16 or float32."
        )


def require_finite_file(file: Path) -> None:
    """Refuse a file of weights that holds a number that is not finite; its tensors are read one by one.

    Raises:
        ValueError: With the tensor's name.

    Example:
        >>> from importlib.resources import files
        >>> require_finite_file(Path(str(files("vlcpt") / "demo/base/model.safetensors")))
    """
    found = first_not_finite(_tensors_in(file))
    if found is not None:
        raise not_finite(file, found)


def not_finite(file: Path | str, tensor: str) -> ValueError:
    """The error for a saved tensor that is not finite."""
    return ValueError(
        f"{file}: {tensor} holds numbers that are not finite (NaN or infinity), and with it no loss could be "
        "computed. Get the file again, or use another checkpoint."
    )


def _tensors_in(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    if file.suffix != ".safetensors":
        loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        yield from ((name, value) for name, value in loaded.items() if isinstance(value, torch.Tensor))
        return
    with safe_open(file, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118  # it is no mapping
            yield name, weights.get_tensor(name)


def weight_files(
    name_or_path: str, what: Literal["model", "adapter"], commit: str | None = None
) -> list[Path]:
    """The files that a model's or an adapter's weights were loaded from: of a folder, or of the Hub's cache.

    Example:
        >>> from vlcpt.demo import base_path
        >>> [file.name for file in weight_files(base_path(), "model")]
        ['model.safetensors']
    """
    for name in WEIGHTS[what]:
        found = _local(name_or_path, name, commit)
        if found is None:
            continue
        if not name.endswith(".index.json"):
            return [found]
        shards = [_local(name_or_path, shard, commit) for shard in shards_of(found)]
        return [shard for shard in shards if shard is not None]
    return []


def _local(name_or_path: str, name: str, commit: str | None) -> Path | None:
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    cached = try_to_load_from_cache(name_or_path, name, revision=commit)
    return Path(cached) if isinstance(cached, str) else None
