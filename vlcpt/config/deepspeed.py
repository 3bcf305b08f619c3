"""The DeepSpeed configs that come with vlcpt, and those of a user."""

import json
from importlib.resources import files
from pathlib import Path


def shipped_deepspeed() -> dict[str, Path]:
    """Map the name of each DeepSpeed config that comes with vlcpt to its file."""
    folder = files("vlcpt.deepspeed_configs")
    found = [Path(str(entry)) for entry in folder.iterdir()]
    return {path.stem: path for path in found if path.suffix == ".json"}


def read_deepspeed(given: dict[str, object] | str | None) -> dict[str, object] | None:
    """A DeepSpeed config, given as a mapping, as JSON, by its path, or by the name of a shipped one.

    Raises:
        ValueError: If it is no mapping, or there is no such file.

    Example:
        >>> read_deepspeed('{"zero_optimization": {"stage": 2}}')
        {'zero_optimization': {'stage': 2}}
        >>> read_deepspeed("zero9")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: deepspeed 'zero9' is no file and no shipped config. Shipped: ...
    """
    if not given:
        return None
    found = given
    if isinstance(given, str):
        shipped = shipped_deepspeed()
        path = shipped.get(given, Path(given).expanduser())
        try:
            found = json.loads(given if given.startswith("{") else path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"deepspeed {given} is not JSON: {error}. Correct it.") from error
        except OSError as error:
            raise ValueError(
                f"deepspeed {given!r} is no file and no shipped config. Shipped: "
                f"{', '.join(sorted(shipped))}."
            ) from error
    if not isinstance(found, dict):
        raise ValueError(f"deepspeed: expected a mapping, found {type(found).__name__}. Correct it.")
    return found
