"""What of a checkpoint may leave the machine: an allow-list of files, without this machine's paths."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlcpt.model.base_files import GENERATION, is_licence
from vlcpt.model.weights import check_files

Kind = Literal["adapter", "model"]

# All else stays here: optimizer and trainer state, logs, pickles, whatever a person put there.
_PROCESSOR = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)
_ALLOWED: Mapping[Kind, tuple[str, ...]] = {
    "adapter": ("adapter_config.json", "adapter_model.safetensors", GENERATION, *_PROCESSOR),
    "model": (
        *("config.json", GENERATION, "model.safetensors", "model.safetensors.index.json"),
        *_PROCESSOR,
    ),
}
# A licence to read, not one that unlocks a program: license.key, license.json.
_TEXT = re.compile(r"|\.(txt|md|rst|html?|pdf|\d+)")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# In other files a text that begins with a slash may be what a model reads and writes.
_CONFIGS = re.compile(r"(.*_)?config\.json")
_PATH = re.compile(r"(/|~|[A-Za-z]:[\\/]|\\\\|file:)")
_NAMES = ("_name_or_path", "name_or_path", "_commit_hash")  # of the folder that something was loaded from


@dataclass(frozen=True)
class PushedFile:
    """A file as it goes to the Hub.

    Args:
        name: Its name there.
        content: The file, or its bytes where they are not those on disk.
        size: In bytes.
    """

    name: str
    content: Path | bytes
    size: int


def kind_of(checkpoint: Path) -> Kind:
    """Whether a folder holds an adapter or a whole model.

    Raises:
        ValueError: If it holds neither, or only a part.

    Example:
        >>> from vlcpt.demo import base_path
        >>> kind_of(Path(base_path()))
        'model'
    """
    kind: Kind = "adapter" if (checkpoint / "adapter_config.json").is_file() else "model"
    check_files(kind, str(checkpoint))
    return kind


def is_allowed(name: str, kind: Kind | None = None) -> bool:
    """Whether a file of this name is part of an adapter or a model, or of either.

    Example:
        >>> is_allowed("model-00001-of-00002.safetensors"), is_allowed("optimizer.pt")
        (True, False)
        >>> is_allowed("model.safetensors", "adapter")
        False
    """
    kinds: tuple[Kind, ...] = (kind,) if kind else ("adapter", "model")
    return any(
        name in _ALLOWED[one] or (one == "model" and _SHARD.fullmatch(name) is not None) for one in kinds
    )


def _is_terms(name: str) -> bool:
    return is_licence(name) and _TEXT.fullmatch(Path(name).suffix.lower()) is not None


def pushed_files(checkpoint: Path, kind: Kind, base_model: str | None) -> list[PushedFile]:
    """The files of an adapter or model that go to the Hub, in order of their names, with its licences.

    A configuration goes byte for byte unless something in it must not go, or names the base otherwise.

    Args:
        base_model: What an adapter's configuration shall call its base.

    Raises:
        ValueError: If the weights are only there as a pickle, or a configuration is not JSON or has
            a key twice.

    Example:
        >>> from vlcpt.demo import base_path
        >>> [file.name for file in pushed_files(Path(base_path()), "model", None)][:2]
        ['config.json', 'generation_config.json']
    """
    weights = "adapter_model.safetensors" if kind == "adapter" else "model.safetensors"
    names = sorted(path.name for path in checkpoint.iterdir() if path.is_file())
    shards = [name for name in names if _SHARD.fullmatch(name)]
    if weights not in names and not (kind == "model" and shards):
        raise ValueError(
            f"{checkpoint} holds no {weights}, but weights in a format that can run code when it is loaded. "
            "Load the model and save it with safetensors first."
        )
    index = "model.safetensors.index.json"
    if weights in names:  # then loaders read nothing else, and shards are left from an earlier save
        names = [name for name in names if name not in (*shards, index)]
    files = []
    for name in names:
        if not is_allowed(name, kind) and not _is_terms(name):
            continue
        path = checkpoint / name
        content = _cleaned(path, base_model) if _CONFIGS.fullmatch(name) else path
        size = len(content) if isinstance(content, bytes) else path.stat().st_size
        files.append(PushedFile(name, content, size))
    return files


def _cleaned(path: Path, base_model: str | None) -> Path | bytes:
    """A configuration without names of folders; the file itself where it has none."""
    try:
        found = json.loads(path.read_text("utf-8"), object_pairs_hook=_mapping)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON that can be read: {error}. Save the model anew.") from error
    cleaned = without_paths(found)
    if path.name == "adapter_config.json":
        assert isinstance(cleaned, dict)
        cleaned["base_model_name_or_path"] = base_model
    if cleaned == found:
        return path
    return (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def _mapping(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Of a key that stands twice only the last would be looked at, and the file might go as it is."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place]))
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def without_paths(value: object) -> object:
    """JSON without entries that name a place on this machine.

    Example:
        >>> without_paths({"_name_or_path": "out", "a": {"b": "/home/me/base", "c": 1}})
        {'a': {'c': 1}}
    """
    if isinstance(value, dict):
        # The tokens of a tokenizer are no paths, whatever they look like.
        return {
            key: item if key in ("added_tokens_decoder", "extra_special_tokens") else without_paths(item)
            for key, item in value.items()
            if key not in _NAMES and not (isinstance(item, str) and _PATH.match(item))
        }
    if isinstance(value, list):
        return [without_paths(item) for item in value if not (isinstance(item, str) and _PATH.match(item))]
    return value
