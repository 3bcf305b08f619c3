"""Files of weights: what their headers say, whether they are complete, whether their numbers are finite."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, HTTPError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from vlcpt.errors import ConfigError, wrong_config
from vlcpt.file_writes import Writing

Shapes = Mapping[str, tuple[int, ...]]

# A configuration of a model or an adapter has a few kilobytes; reading JSON takes ten times its size.
MAX_JSON_BYTES = 16 * 2**20
# What torch and transformers raise for a file that does not hold what its name says.
UNREADABLE = (
    *(OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, RuntimeError),
    *(ArithmeticError, AssertionError, MemoryError, RecursionError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, StrictDataclassError),
)


def read_json(path: Path) -> dict[str, object]:
    """A file that holds one JSON object.

    Raises:
        ValueError: With the file, what is wrong with it, and what to do.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp(), "config.json")
        >>> _ = path.write_text('["r"]')
        >>> read_json(path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: .../config.json: expected a JSON object, found a list. Get the file again, or use ...
    """
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise damaged(path, f"it has {size:,} bytes, more than any such file")
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise damaged(path, f"it cannot be read: {error.strerror}") from error
    except RecursionError:
        raise damaged(path, "it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise damaged(path, "it is no text in UTF-8") from error
    except json.JSONDecodeError as error:
        raise damaged(path, f"line {error.lineno} is no JSON: {error.msg}") from error
    if not isinstance(found, dict):
        kind = "a list" if isinstance(found, list) else "a value"
        raise damaged(path, f"expected a JSON object, found {kind}")
    return found


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


_PICKLE = (
    "it is a pickle that holds more than tensors, or a damaged one. Loading it could run code, so it is not "
    "loaded"
)


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
        raise damaged(path, _PICKLE) from error
    except UNREADABLE as error:
        raise damaged(path, "it is cut, or no file that torch.save writes") from error
    raise damaged(path, "it is compressed, which torch.save never does")


def damaged(path: Path | str, found: str) -> ValueError:
    """The error for a saved file that cannot be used.

    Example:
        >>> str(damaged("out/optimizer.pt", "it is cut"))
        'out/optimizer.pt: it is cut. Get the file again, or use another checkpoint.'
    """
    return ValueError(f"{path}: {found}. Get the file again, or use another checkpoint.")


Kind = Literal["model", "adapter"]

_OTHER_CACHE = "HF_HUB_CACHE, or HF_HOME, names another one."
# In this order: an adapter's folder may hold its base's config.json as well.
CONFIGS: Mapping[Kind, str] = {"adapter": "adapter_config.json", "model": "config.json"}
# One of them is needed, looked for in this order.
WEIGHTS = {
    "model": (
        *("model.safetensors", "model.safetensors.index.json"),
        *("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ),
    "adapter": ("adapter_model.safetensors", "adapter_model.bin"),
}


def check_files(what: Kind, folder: str) -> None:
    """Look whether the files of a model or adapter are there, without reading weights.

    Raises:
        ConfigError: If its configuration, its weights, or a shard that its index lists is missing.

    Example:
        >>> from importlib.resources import files
        >>> base = str(files("vlcpt") / "demo/base")
        >>> check_files("model", base)
        >>> check_files("adapter", base)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: ...no adapter could be loaded from this folder... It needs ...
    """
    path = Path(folder)
    weights, config = weights_in(path, what), path / CONFIGS[what]
    if config.is_file() and what == "model" and '"transformers_weights"' in config.read_text("utf-8"):
        return  # transformers then reads weights of the name that is written there
    if weights is None or not config.is_file():
        needed = f"It needs {config.name} and {WEIGHTS[what][0]}, one of them is missing."
        raise ConfigError(not_loaded(what, folder, needed))
    shards = shards_of(weights) if weights.suffix == ".json" else []
    if missing := [shard for shard in shards if not (path / shard).is_file()]:
        raise ConfigError(not_loaded(what, folder, f"{weights.name} lists {missing[0]}, which is not there."))


def weights_in(folder: Path, what: Kind) -> Path | None:
    """The file of a folder that holds a model's or adapter's weights, or lists the files that do; or None.

    Example:
        >>> from vlcpt.demo import base_path
        >>> weights_in(Path(base_path()), "model").name
        'model.safetensors'
    """
    return next((folder / name for name in WEIGHTS[what] if (folder / name).is_file()), None)


def shards_of(index: Path) -> list[str]:
    """The files that an index of weights lists, in order.

    Raises:
        ConfigError: If it is no such index, or lists a file outside its folder.

    Example:
        >>> from tempfile import mkdtemp
        >>> index = Path(mkdtemp(), "model.safetensors.index.json")
        >>> _ = index.write_text('{"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}')
        >>> shards_of(index)
        ['1.safetensors', '2.safetensors']
    """
    with wrong_config():
        named = read_json(index).get("weight_map")
        files = named.values() if isinstance(named, dict) else [None]
        if not all(isinstance(one, str) and Path(one).name == one for one in files):
            raise damaged(index, "its weight_map does not give a file of this folder to each tensor")
    return sorted(set(map(str, files)))


def check_checkpoint(folder: str) -> Kind:
    """What a folder holds; that no file is missing is checked by the names.

    Raises:
        ConfigError: If that is neither, or some of its files are missing.

    Example:
        >>> from importlib.resources import files
        >>> check_checkpoint(str(files("vlcpt") / "demo/base"))
        'model'
    """
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError(f"{folder}: no such folder. Give a checkpoint or a saved model.")
    for what, config in CONFIGS.items():
        if (path / config).is_file():
            check_files(what, folder)
            return what
    raise ConfigError(
        f"{folder} holds neither an adapter ({CONFIGS['adapter']} and {WEIGHTS['adapter'][0]}) nor "
        f"a model ({CONFIGS['model']} and {WEIGHTS['model'][0]}). Give a checkpoint or a saved model."
    )


def not_loaded(what: Kind | Literal["processor"], name_or_path: str, error: Exception | str) -> str:
    """The message for a model, processor or adapter that is missing or unreadable.

    Example:
        >>> print(not_loaded("model", "no/where", "Offline."))  # doctest: +ELLIPSIS
        no/where: no such folder, and no model of this id was found on the Hub. ... Offline.
    """
    writing = Writing(Path(HF_HUB_CACHE), "the cache of the Hub", todo=_OTHER_CACHE, reads=True)
    if isinstance(error, Exception) and (found := writing.refused(error)):
        return f"{name_or_path}: {found}"
    reason = without_advice(str(error).strip().split("\n")[0])
    if isinstance(error, pickle.UnpicklingError):  # torch's message says how to run the code in it
        reason = f"One of its files: {_PICKLE}. Use weights in safetensors."
    if Path(name_or_path).is_dir():
        held = ", ".join(sorted(p.name for p in Path(name_or_path).iterdir())[:8]) or "nothing"
        return f"{name_or_path}: no {what} could be loaded from this folder, which holds {held}. {reason}"
    if isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError):  # it did not answer
        return (
            f"{name_or_path}: no such folder, and no {what} of this id is on this machine. The Hub cannot be "
            f"reached: {reason.rstrip('.')}. Set HF_ENDPOINT to a mirror, or download the model into a "
            "folder."
        )
    return (
        f"{name_or_path}: no such folder, and no {what} of this id was found on the Hub. "
        f"Check the spelling, and for a private or gated one log in with `hf auth login`. {reason}"
    )


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


# Libraries that refuse a file advise to read it without the check.
_ADVICE = re.compile(
    r"trust_remote_code|weights_only|ignore_mismatched_sizes|TORCH_FORCE|safe_globals|allow_pickle"
    r"|trusted source|use_safetensors|unsafe|upgrade torch",
    re.IGNORECASE,
)


def without_advice(reason: str) -> str:
    """A library's reason, without the sentences that advise to weaken a check.

    Example:
        >>> without_advice("It holds code. Set trust_remote_code=True to run it.")
        'It holds code.'
        >>> without_advice("Use weights_only=False.")
        'It is damaged, or holds code, which is never run.'
    """
    kept = [one for one in re.split(r"(?<=[.!?;])\s+", reason) if not _ADVICE.search(one)]
    return " ".join(kept) or ("It is damaged, or holds code, which is never run." if reason else "")


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
