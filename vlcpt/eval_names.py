"""The names under which an evaluation is logged, made here and read back here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Number = Literal["loss", "perplexity", "blank_images_loss", "reliance"]
_NUMBERS: tuple[Number, ...] = ("loss", "perplexity", "blank_images_loss", "reliance")
_BLANK = "blank_images_"
# What a set is called that CPTTrainer was given alone, and not by a name.
UNNAMED = "eval_data"


def logged_name(name: str, number: Number) -> str:
    """The key of a number of an evaluation set, in the log and in trackers.

    Example:
        >>> logged_name("manuals", "reliance")
        'eval_manuals_reliance'
    """
    return f"eval_{name}_{number}"


def measured_in(line: Mapping[str, object]) -> dict[str, dict[Number, float]]:
    """The sets that were evaluated in a line of the log, each with its numbers.

    ``eval_a_blank_images_loss`` is a number of ``a``, or the loss of a set ``a_blank_images``. It is of ``a``
    where the line has ``a``'s loss too, and the name alone has no perplexity.

    Example:
        >>> measured_in({"step": 7, "loss": 2.5, "eval_a_loss": 1.0, "eval_a_blank_images_loss": 1.5})
        {'a': {'loss': 1.0, 'blank_images_loss': 1.5}}
        >>> measured_in({"step": 7, "eval_a_blank_images_loss": 1.5})
        {'a_blank_images': {'loss': 1.5}}
    """
    found: dict[str, dict[Number, float]] = {}
    for key in line:
        if not key.startswith("eval_") or not key.endswith("_loss") or _is_of_another(key, line):
            continue
        stem = key.removesuffix("loss")
        numbers: dict[Number, float] = {
            number: float(value)
            for number in _NUMBERS
            if isinstance(value := line.get(stem + number), int | float) and not isinstance(value, bool)
        }
        if f"{stem}{_BLANK}perplexity" in line:  # that name is of a set
            numbers.pop("blank_images_loss", None)
        if "loss" in numbers:
            found[stem.removeprefix("eval_").removesuffix("_") or UNNAMED] = numbers
    return found


def _is_of_another(key: str, line: Mapping[str, object]) -> bool:
    """Whether a key that ends with ``_loss`` is the loss of another set's blank images."""
    stem = key.removesuffix("loss")
    owner = stem.removesuffix(_BLANK)
    return owner != stem and f"{owner}loss" in line and f"{stem}perplexity" not in line
