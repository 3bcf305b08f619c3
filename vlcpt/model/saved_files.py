"""What a folder must hold to be a model or an adapter, and what is said where something cannot be loaded."""

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from huggingface_hub.constants import HF_HUB_CACHE

from vlcpt.errors import ConfigError
from vlcpt.file_writes import refusal, write_error
from vlcpt.model.tensor_files import damaged, read_json

Saved = Literal["model", "processor", "adapter"]

_OTHER_CACHE = "HF_HUB_CACHE, or HF_HOME, names another one."
CONFIGS = {"model": "config.json", "adapter": "adapter_config.json"}
# One of them is needed, looked for in this order.
WEIGHTS = {
    "model": (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ),
    "adapter": ("adapter_model.safetensors", "adapter_model.bin"),
}


def check_files(what: Literal["model", "adapter"], folder: str) -> None:
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
    weights = next((name for name in WEIGHTS[what] if (path / name).is_file()), None)
    config = path / CONFIGS[what]
    if config.is_file() and what == "model" and '"transformers_weights"' in config.read_text("utf-8"):
        return  # transformers then reads weights of the name that is written there
    if weights is None or not config.is_file():
        raise ConfigError(
            not_loaded(
                what, folder, f"It needs {config.name} and {WEIGHTS[what][0]}, one of them is missing."
            )
        )
    shards = shards_of(path / weights) if weights.endswith(".index.json") else []
    if missing := [shard for shard in shards if not (path / shard).is_file()]:
        raise ConfigError(not_loaded(what, folder, f"{weights} lists {missing[0]}, which is not there."))


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
    try:
        named = read_json(index).get("weight_map")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(named, dict) or not all(
        isinstance(one, str) and Path(one).name == one for one in named.values()
    ):
        raise ConfigError(
            str(damaged(index, "its weight_map does not give a file of this folder to each tensor"))
        )
    return sorted(set(named.values()))


def check_checkpoint(folder: str) -> Literal["model", "adapter"]:
    """What a folder holds, whole as far as its files' names tell.

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
    kinds: tuple[Literal["model", "adapter"], ...] = ("adapter", "model")
    for what in kinds:
        if (path / CONFIGS[what]).is_file():
            check_files(what, folder)
            return what
    raise ConfigError(
        f"{folder} holds neither an adapter ({CONFIGS['adapter']} and {WEIGHTS['adapter'][0]}) nor "
        f"a model ({CONFIGS['model']} and {WEIGHTS['model'][0]}). Give a checkpoint or a saved model."
    )


def not_loaded(what: Saved, name_or_path: str, error: Exception | str) -> str:
    """The message for something that is not there, or not readable.

    Example:
        >>> print(not_loaded("model", "no/where", "Offline."))  # doctest: +ELLIPSIS
        no/where: no such folder, and no model of this id could be had from the Hub. ... Offline.
    """
    cache = Path(HF_HUB_CACHE)
    if isinstance(error, Exception) and (found := refusal(error, cache, reads=True)) is not None:
        return f"{name_or_path}: {write_error(cache, 'the cache of the Hub', found, todo=_OTHER_CACHE)}"
    reason = without_advice(str(error).strip().split("\n")[0])
    if isinstance(error, pickle.UnpicklingError):  # torch's message tells how to run it all the same
        reason = (
            "Its weights are a pickle that holds more than tensors, or a damaged one. Loading it could run "
            "code, so it is not loaded. Use weights in safetensors."
        )
    if Path(name_or_path).is_dir():
        held = ", ".join(sorted(p.name for p in Path(name_or_path).iterdir())[:8]) or "nothing"
        return f"{name_or_path}: no {what} could be loaded from this folder, which holds {held}. {reason}"
    return (
        f"{name_or_path}: no such folder, and no {what} of this id could be had from the Hub. "
        f"Check the spelling, and for a private or gated one log in with `hf auth login`. {reason}"
    )


# What upstream advises where it refuses a file: to read it all the same.
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
