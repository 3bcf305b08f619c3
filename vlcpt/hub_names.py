"""Names on the Hub: which ones it can have, and what a model that is called by a folder is called there."""

import re
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from vlcpt.config import ConfigError
from vlcpt.model.bases import base_folders

_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # a model's folder in the Hub's cache


def is_revision(name: str) -> bool:
    """Whether a branch or commit can have this name.

    Example:
        >>> is_revision("v1/a"), is_revision("a b")
        (True, False)
    """
    return re.fullmatch(r"\w[\w./-]*", name, re.ASCII) is not None


def check_names(repo_id: str, base_model: str | None = None, revision: str | None = None) -> None:
    """Raise ConfigError for an id or a branch that the Hub cannot have.

    Example:
        >>> check_names("me/adapter")
        >>> check_names("a/b/c")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: 'a/b/c' is no name of a repository on the Hub...
    """
    for name in (repo_id, *([base_model] if base_model is not None else [])):
        if hub_id(name) is None:
            raise ConfigError(f"{name!r} is no name of a repository on the Hub. Write owner/name.")
    if revision is not None and not is_revision(revision):
        raise ConfigError(f"{revision!r} is no name of a branch. Use letters, digits, dots, dashes, slashes.")


def hub_id(name: str) -> str | None:
    """The name if the Hub could have it, or the id of a folder in the Hub's cache; else None.

    Example:
        >>> hub_id("/home/me/hub/models--Qwen--Qwen2.5-VL-3B-Instruct/snapshots/1b2c")
        'Qwen/Qwen2.5-VL-3B-Instruct'
        >>> hub_id("../base") is None
        True
    """
    if cached := [found for part in Path(name).parts if (found := _CACHED.fullmatch(part))]:
        return f"{cached[-1][1]}/{cached[-1][2]}"
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def hub_base(named: str, checkpoint: Path) -> str:
    """The Hub id of an adapter's base.

    Raises:
        ConfigError: If the adapter names a folder, which nobody else has.

    Example:
        >>> hub_base("Qwen/Qwen2.5-VL-3B-Instruct", Path("out"))
        'Qwen/Qwen2.5-VL-3B-Instruct'
    """
    found = hub_id(named)
    if found is None or (found == named and base_folders(named, checkpoint)):
        raise ConfigError(
            f"{checkpoint}: the adapter's base model is the folder {named!r}, which others do not have. Say "
            "what it is on the Hub: --base_model owner/name. If it is not there, merge, and push the model."
        )
    return found
