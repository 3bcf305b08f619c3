"""Which model an adapter was trained on: where its folder is now, and whether another is the same one."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError


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
    if path.is_absolute() and _is_model(path):
        return [path]
    found: dict[str, Path] = {}
    for folder in (path, checkpoint / path, checkpoint.parent / path, *_configured(path.name, checkpoint)):
        if _is_model(folder):
            found.setdefault(os.path.realpath(folder), folder)
    return list(found.values())


def find_base(named: str, checkpoint: Path) -> str:
    """The folder that an adapter means by the name of its base, or the name itself if it is none.

    Raises:
        ValueError: If there are two, because the wrong one would give a wrong model.

    Example:
        >>> find_base("Qwen/Qwen2.5-VL-3B-Instruct", Path("checkpoint-2"))
        'Qwen/Qwen2.5-VL-3B-Instruct'
    """
    found = base_folders(named, checkpoint)
    if len(found) > 1:
        raise ValueError(
            f"{checkpoint}/adapter_config.json: the base model {named!r} may be "
            f"{' or '.join(os.path.realpath(folder) for folder in found)}. Write the absolute path of the "
            "right one into base_model_name_or_path."
        )
    return str(found[0]) if found else named


def is_same_base(named: str, used: str, checkpoint: Path) -> bool:
    """Whether the model in use is the one that an adapter names, as far as can be told without a network.

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
    return in_use is not None and in_use in map(_config, [str(folder) for folder in folders] or [named])


def run_settings(checkpoint: Path) -> Iterator[tuple[Path, dict[str, object]]]:
    """What a run's config.yaml says, in or above the checkpoint, each with its folder; none if there is none.

    Example:
        >>> list(run_settings(Path("/none/checkpoint-2")))
        []
    """
    for folder in (checkpoint, checkpoint.parent):
        try:
            written = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue  # none there, or somebody else's
        if isinstance(written, dict):
            yield folder, written


def _configured(name: str, checkpoint: Path) -> Iterator[Path]:
    """Folders called ``name`` that a config.yaml in or above the checkpoint gives as its model."""
    for folder, written in run_settings(checkpoint):
        model = written.get("model_name_or_path")
        # Another name means that somebody has corrected the one in adapter_config.json.
        if isinstance(model, str) and Path(model).name == name:
            yield folder / Path(model).expanduser()


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _config(name_or_path: str) -> object:
    """The content of a model's config.json, from its folder or the Hub's cache; None if it is in neither."""
    file: object = Path(name_or_path, "config.json")
    if not Path(name_or_path).is_dir():
        try:
            file = try_to_load_from_cache(name_or_path, "config.json")
        except HFValidationError:  # a path, not an id
            return None
    try:
        return json.loads(Path(file).read_text("utf-8")) if isinstance(file, str | Path) else None
    except (OSError, ValueError):
        return None
