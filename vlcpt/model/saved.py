"""What a folder holds, by the names of its files: a model, an adapter or neither. Loads no torch."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from vlcpt.errors import ConfigError, wrong_config
from vlcpt.file_writes import Writing

Kind = Literal["model", "adapter"]
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
# A configuration of a model or an adapter has a few kilobytes; reading JSON takes ten times its size.
MAX_JSON_BYTES = 16 * 2**20
_OTHER_CACHE = "HF_HUB_CACHE, or HF_HOME, names another one."
HOLDS_CODE = (
    "it is a pickle that holds more than tensors, or a damaged one. Loading it could run code, so it is not "
    "loaded"
)
# Libraries that refuse a file advise to read it without the check.
_ADVICE = re.compile(
    r"trust_remote_code|weights_only|ignore_mismatched_sizes|TORCH_FORCE|safe_globals|allow_pickle"
    r"|trusted source|use_safetensors|unsafe|upgrade torch",
    re.IGNORECASE,
)


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


def damaged(path: Path | str, found: str) -> ValueError:
    """The error for a saved file that cannot be used.

    Example:
        >>> str(damaged("out/optimizer.pt", "it is cut"))
        'out/optimizer.pt: it is cut. Get the file again, or use another checkpoint.'
    """
    return ValueError(f"{path}: {found}. Get the file again, or use another checkpoint.")


def not_loaded(what: Kind | Literal["processor"], name_or_path: str, error: Exception | str) -> str:
    """The message for a model, processor or adapter that is missing or unreadable.

    Example:
        >>> print(not_loaded("model", "no/where", "Offline."))  # doctest: +ELLIPSIS
        no/where: no such folder, and no model of this id was found on the Hub. ... Offline.
    """
    from huggingface_hub.constants import HF_HUB_CACHE  # here: a folder is refused before it is imported
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    writing = Writing(Path(HF_HUB_CACHE), "the cache of the Hub", todo=_OTHER_CACHE, reads=True)
    if isinstance(error, Exception) and (found := writing.refused(error)):
        return f"{name_or_path}: {found}"
    reason = without_advice(str(error).strip().split("\n")[0])
    if isinstance(error, pickle.UnpicklingError):  # torch's message says how to run the code in it
        reason = f"One of its files: {HOLDS_CODE}. Use weights in safetensors."
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
