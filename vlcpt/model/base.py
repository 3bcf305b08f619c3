"""A base model: whether its name stands for one, and whether its ``config.json`` is that of its weights."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_url,
    is_offline_mode,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import set_zero3_state

from vlcpt.errors import ConfigError, wrong_config
from vlcpt.model.attention import with_attention
from vlcpt.model.saved import CONFIGS, Kind, not_loaded, read_json
from vlcpt.model.weights import UNREADABLE, as_load_error, read_shapes, weight_files
from vlcpt.run_files import read_mapping, run_settings

_PAUSE = 1.0  # seconds before the second and last try


def only_cached(what: Kind | Literal["processor"], name_or_path: str, revision: str | None = None) -> bool:
    """Whether only the cache can be asked for this name, because the Hub does not answer.

    transformers 5.24 and peft 0.21 try each of their files six times, for 24 seconds, where the network is
    down: two to three minutes and thirty lines before one message. tests/model/test_base_lookup.py counts.

    Args:
        what: What is looked for, of a model its processor or itself.
        name_or_path: A folder, of which nothing is asked, or an id on the Hub.

    Raises:
        ConfigError: If the Hub has no such id for this user, or does not answer, and nothing is cached.

    Example:
        >>> from importlib.resources import files
        >>> only_cached("model", str(files("vlcpt") / "demo/base"))
        False
    """
    if Path(name_or_path).is_dir() or is_offline_mode():
        return False  # the libraries then look nowhere else themselves
    file = CONFIGS["adapter" if what == "adapter" else "model"]
    try:
        error = _asked(hf_hub_url(name_or_path, file, revision=revision))
        is_cached = isinstance(try_to_load_from_cache(name_or_path, file, revision=revision), str)
    except HFValidationError as invalid:  # no id that the Hub could have
        raise ConfigError(not_loaded(what, name_or_path, invalid)) from None
    if error is None or is_cached:
        return error is not None
    raise ConfigError(not_loaded(what, name_or_path, error)) from error


def _asked(url: str) -> Exception | None:
    """Why nothing can be fetched; None if the Hub answers, even if it has no such file."""
    error: Exception | None = None
    for pause in (_PAUSE, 0.0):
        try:
            get_hf_file_metadata(url)
            return None
        except (RepositoryNotFoundError, OfflineModeIsEnabled) as final:
            return final
        except HfHubHTTPError:
            return None  # the libraries know what it means for them
        except HTTPError as failed:
            error = failed
            time.sleep(pause)
    return error


def local_folder(what: Kind, name_or_path: str, files: list[str], revision: str | None = None) -> Path:
    """A folder itself; for an id on the Hub that of its cache, into which missing files are fetched.

    Args:
        what: What is looked for.
        files: Names or patterns of the files to fetch.

    Raises:
        ConfigError: If the Hub has no such id for this user, or does not answer, and nothing is cached.

    Example:
        >>> from vlcpt.demo import base_path
        >>> local_folder("model", base_path(), ["*.json"]).name
        'base'
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    cached = only_cached(what, name_or_path, revision)
    with as_load_error(what, name_or_path):
        return Path(
            snapshot_download(name_or_path, revision=revision, allow_patterns=files, local_files_only=cached)
        )


def base_folders(named: str, checkpoint: Path) -> list[Path]:
    """Folders of models that an adapter may mean by the name of its base; none for a name on the Hub.

    A run writes the name as it was given, often relative to the directory of training, which a checkpoint
    does not know. So it is looked for from the current directory, from the checkpoint, from its parent,
    and where a ``config.yaml`` in one of these two says, if the folder there has the same name.

    Args:
        named: ``base_model_name_or_path`` of ``adapter_config.json``.
        checkpoint: Folder of the adapter.

    Returns:
        Each folder once, also if it was found in several ways.

    Example:
        >>> from importlib.resources import files
        >>> [folder.name for folder in base_folders(str(files("vlcpt") / "demo/base"), Path("checkpoint-2"))]
        ['base']
        >>> base_folders("Qwen/Qwen2.5-VL-3B-Instruct", Path("checkpoint-2"))
        []
    """
    path = Path(named).expanduser()
    if path.is_absolute() and (path / CONFIGS["model"]).is_file():
        return [path]
    found: dict[str, Path] = {}
    # Another name means that somebody has corrected the one in adapter_config.json.
    configured = [one for model, one in _models_of(checkpoint) if Path(model).name == path.name]
    for folder in (path, checkpoint / path, checkpoint.parent / path, *configured):
        if (folder / CONFIGS["model"]).is_file():
            found.setdefault(os.path.realpath(folder), folder)
    return list(found.values())


def is_same_base(named: str, used: str, checkpoint: Path) -> bool:
    """Whether the model in use is the one that an adapter names, as far as is known without a network.

    It is if the names are equal, lead to one folder, or to two with equal ``config.json``.

    Args:
        named: ``base_model_name_or_path`` of ``adapter_config.json``.
        used: Folder or Hub id of the model in use.
        checkpoint: Folder of the adapter.

    Example:
        >>> is_same_base("Qwen/Qwen2.5-VL-3B-Instruct", "some/other-model", Path("checkpoint-2"))
        False
    """
    if named == used:
        return True
    folders = base_folders(named, checkpoint)
    if any(os.path.realpath(folder) == os.path.realpath(used) for folder in folders):
        return True
    in_use = _config(used)
    return bool(in_use) and in_use in map(_config, [str(folder) for folder in folders] or [named])


def base_of_run(checkpoint: Path) -> str | None:
    """Folder or Hub id of the model that a run started from, as its config.yaml says; None without one.

    Example:
        >>> base_of_run(Path("/none/checkpoint-2")) is None
        True
    """
    return next((str(path) if path.is_dir() else named for named, path in _models_of(checkpoint)), None)


def _models_of(checkpoint: Path) -> Iterator[tuple[str, Path]]:
    """The model that a config.yaml in or above a checkpoint names, and the folder if it is one."""
    for folder, settings in run_settings(checkpoint):
        if isinstance(named := settings.get("model_name_or_path"), str):
            yield named, folder / Path(named).expanduser()


def _config(name_or_path: str) -> dict[str, object]:
    """The content of a model's config.json, from its folder or the Hub's cache; empty if it is in neither."""
    if Path(name_or_path).is_dir():
        return read_mapping(Path(name_or_path, "config.json"))
    try:
        cached = try_to_load_from_cache(name_or_path, "config.json")
    except HFValidationError:  # a path, not an id
        return {}
    return read_mapping(Path(cached)) if isinstance(cached, str) else {}


# A configuration makes lists as long as there are layers, and a model an object for each.
_MAX_LAYERS = 1_000
_LAYERS = ("num_hidden_layers", "depth", "num_layers", "n_layer")
# Above every size and token number that there is; below what a product of two of them can overflow.
_MAX_SIZE = 2**31


def check_config_file(path: Path) -> None:
    """Refuse a ``config.json`` that cannot be read, or has sizes that no model has.

    Raises:
        ConfigError: With the file, the key, what was found and what to do.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp(), "config.json")
        >>> _ = path.write_text('{"text_config": {"num_hidden_layers": 1000000000}}')
        >>> check_config_file(path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: .../config.json: text_config.num_hidden_layers is 1000000000, ...
    """
    with wrong_config():
        found = read_json(path)
    for key, value in _entries(found):
        name = key.rpartition(".")[2]
        most = _MAX_LAYERS if name in _LAYERS else _MAX_SIZE
        wrong = ""
        if isinstance(value, int) and abs(value) > most:
            wrong = f"can be at most {most:,}"
        elif name in ("dtype", "torch_dtype") and value is not None:
            is_type = isinstance(getattr(torch, str(value).removeprefix("torch."), None), torch.dtype)
            wrong = "" if is_type else "must be float32, bfloat16 or float16"
        if wrong:
            raise ConfigError(
                f"{path}: {key} is {repr(value)[:40]}, and {wrong}. Get the file again from where the "
                "model is published."
            )


def check_parameters(found: PreTrainedConfig, name_or_path: str, *, times: int = 2) -> None:
    """Refuse a configuration whose model has far more parameters than the files of its weights hold.

    ``from_pretrained`` makes up what is missing, of whatever size. A model that is not on this machine yet is
    not looked at.

    Args:
        found: The configuration.
        name_or_path: Where it is from.
        times: How many times as many parameters are let through; 1 where nothing loads them afterwards.

    Raises:
        ConfigError: If no model can be made of the configuration, or one that is too large.
        ValueError: If a file of weights is cut or damaged.

    Example:
        >>> from vlcpt.demo import base_path
        >>> from vlcpt.model.loading import read_config
        >>> check_parameters(read_config(base_path()), base_path())
    """
    files = weight_files(name_or_path, getattr(found, "_commit_hash", None))
    if not files:
        return
    held = sum(math.prod(shape) for file in files for shape in read_shapes(file).values())
    if getattr(found, "quantization_config", None) is not None:
        held = 8 * sum(file.stat().st_size for file in files)  # several numbers share a byte
    config = f"{name_or_path}/config.json" if Path(name_or_path).is_dir() else f"{name_or_path}: config.json"
    try:
        needed = sum(one.numel() for one in bare_model(found).parameters())
    except UNREADABLE as error:
        raise ConfigError(
            f"{config} describes a model that cannot be made ({type(error).__name__}). Get the file again "
            "from where the model is published."
        ) from error
    # A missing tensor is named where the model is loaded; this check is against a full memory.
    if needed > times * held:
        raise ConfigError(
            f"{config} describes a model of {needed:,} parameters, but its weights hold {held:,}. Get both "
            "again from where the model is published."
        )


def bare_model(config: PreTrainedConfig, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """The model that a configuration describes, without any numbers: its modules and their shapes.

    Example:
        >>> from vlcpt.demo import base_path
        >>> from vlcpt.model.loading import read_config
        >>> bare_model(read_config(base_path())).device.type
        'meta'
    """
    bare = with_attention(config, attn_implementation)
    vars(bare).pop("quantization_config", None)  # shapes are those of weights that are not packed
    # As if DeepSpeed stage 3 were active already: else it would partition this model over the ranks.
    with torch.device("meta"), set_zero3_state():
        model = AutoModelForImageTextToText.from_config(bare)
    assert isinstance(model, PreTrainedModel)
    return model


def _entries(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Each value that is no mapping, with the path of keys to it; lists by what is in them."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield from _entries(one, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for one in value:
            yield from _entries(one, key)
    else:
        yield key, value
