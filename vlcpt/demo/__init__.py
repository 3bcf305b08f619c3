"""The embedded base model and data, so that the main job runs anywhere at once."""

from importlib.resources import files


def base_path() -> str:
    """Folder of the embedded base model.

    Example:
        >>> base_path().endswith("base")
        True
    """
    return str(files(__name__) / "base")


def data_path(name: str = "") -> str:
    """A file of the embedded data, or its folder.

    Example:
        >>> data_path("new_train.jsonl").endswith("new_train.jsonl")
        True
    """
    return str(files(__name__) / "data" / name) if name else str(files(__name__) / "data")
