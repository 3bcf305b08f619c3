"""Files of weights: what their headers say, whether they are complete, whether their numbers are finite."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from vlcpt.errors import ConfigError
from vlcpt.model.saved import HOLDS_CODE, WEIGHTS, Kind, damaged, not_loaded, shards_of, weights_in

Shapes = Mapping[str, tuple[int, ...]]

# What torch and transformers raise for a file that does not hold what its name says.
UNREADABLE = (
    *(OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, RuntimeError),
    *(ArithmeticError, AssertionError, MemoryError, RecursionError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, StrictDataclassError),
)


def read_shapes(path: Path) -> Shapes:
    """The shape of each tensor in a file of weights; no tensor is read.

    Args:
        path: Safetensors, or an archive that ``torch.save`` wrote, of which only tensors are taken.

    Raises:
        ValueError: With the file, if it is cut, damaged, or holds more than tensors.

    Example:
        >>> from importlib.resources import files
        >>> shapes = read_shapes(Path(str(files("vlcpt") / "demo/base/model.safetensors")))
        >>> shapes["visual.merger.ln_q.weight"]
        (96,)
    """
    if path.suffix != ".safetensors":
        return {name: tuple(one.shape) for name, one in _tensors_in(path)}
    try:
        # With torch it maps the file for writing, which a machine with less memory than that refuses.
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(". ")
        raise damaged(path, f"it is no complete safetensors file ({reason})") from error


def read_archive(path: Path) -> object:
    """What ``torch.save`` put into a file: tensors stay on disk until they are used, and no code is run.

    torch's own messages about a file that it does not take say how to run the code in it, so none of them
    gets out. Members that are compressed could fill memory, and ``torch.save`` writes none.

    Raises:
        ValueError: With the file and what is wrong with it.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp(), "scheduler.pt")
        >>> torch.save({"last_epoch": 2}, path)
        >>> read_archive(path)
        {'last_epoch': 2}
    """
    try:
        with zipfile.ZipFile(path) as archive:
            kinds = {(one.compress_type, one.file_size == one.compress_size) for one in archive.infolist()}
        if kinds <= {(zipfile.ZIP_STORED, True)}:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError as error:
        raise damaged(path, "there is no such file") from error
    except pickle.UnpicklingError as error:
        raise damaged(path, HOLDS_CODE) from error
    except UNREADABLE as error:
        raise damaged(path, "it is cut, or no file that torch.save writes") from error
    raise damaged(path, "it is compressed, which torch.save never does")


@contextmanager
def as_load_error(what: Kind | Literal["processor"], name_or_path: str) -> Iterator[None]:
    """Make what the libraries raise in the block one message of :func:`not_loaded`.

    Example:
        >>> with as_load_error("model", "no/where"):
        ...     raise OSError("Offline.")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: no/where: no such folder, and no model of this id was found on the Hub. ...
    """
    try:
        yield
    except ConfigError:
        raise
    except (HfHubHTTPError, *UNREADABLE) as error:
        raise ConfigError(not_loaded(what, name_or_path, error)) from error


def compare_shapes(expected: Shapes, found: Shapes) -> dict[str, list[str]]:
    """Names of tensors that are missing, unexpected or of another shape; each list is empty where none is.

    Example:
        >>> compare_shapes({"a": (2, 3), "b": (1,)}, {"a": (3, 2)})
        {'missing': ['b'], 'unexpected': [], 'of another shape': ['a']}
    """
    common = expected.keys() & found.keys()
    return {
        "missing": sorted(expected.keys() - common),
        "unexpected": sorted(found.keys() - common),
        "of another shape": sorted(name for name in common if tuple(expected[name]) != tuple(found[name])),
    }


def first_few(wrong: Mapping[str, Sequence[str]]) -> str:
    """The kinds of wrong keys with their number and three names of each.

    Example:
        >>> first_few({"missing_keys": ["a", "b", "c", "d"], "unexpected_keys": []})
        '4 missing (a, b, c, …)'
    """
    return "; ".join(
        f"{len(keys)} {kind.removesuffix('_keys')} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
        for kind, keys in wrong.items()
        if keys
    )


def first_not_finite(named: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinite number; None if all are finite.

    Reads each tensor once and makes no copy of it: NaN and infinity both show in its least and largest
    number. Weights in 4 bits or on the meta device are skipped; if ZeRO-3 has
    partitioned a tensor, this rank's part is read.

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
    for file in weight_files(name_or_path, getattr(model.config, "_commit_hash", None)):
        if (broken := first_not_finite(_tensors_in(file))) is not None:
            raise not_finite(file, broken)
    if found is not None:
        raise ValueError(
            f"{name_or_path}: {found} is finite in its file and not as {str(dtype).removeprefix('torch.')}, "
            f"which holds numbers up to {torch.finfo(dtype).max:,.0f}. Set dtype: bfloat16 or float32."
        )


def not_finite(file: Path | str, tensor: str) -> ValueError:
    """The error for a saved tensor that is not finite."""
    return ValueError(
        f"{file}: {tensor} holds numbers that are not finite (NaN or infinity), and with it no loss could be "
        "computed. Get the file again, or use another checkpoint."
    )


def _tensors_in(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    if file.suffix != ".safetensors":
        held = read_archive(file)
        tensors = held.items() if isinstance(held, dict) else ()
        yield from ((str(name), one) for name, one in tensors if isinstance(one, torch.Tensor))
        return
    with safe_open(file, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118  # it is no mapping
            yield name, weights.get_tensor(name)


def weight_files(name_or_path: str, commit: str | None = None) -> list[Path]:
    """The files that a model's weights are in, of a folder or of the Hub's cache; none where none are there.

    Example:
        >>> from vlcpt.demo import base_path
        >>> [file.name for file in weight_files(base_path())]
        ['model.safetensors']
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        cached = [try_to_load_from_cache(name_or_path, name, revision=commit) for name in WEIGHTS["model"]]
        found = next((one for one in cached if isinstance(one, str)), None)
        if found is None:
            return []
        folder = Path(found).parent
    weights = weights_in(folder, "model")
    if weights is None or weights.suffix != ".json":
        return [] if weights is None else [weights]
    return [folder / shard for shard in shards_of(weights) if (folder / shard).is_file()]
